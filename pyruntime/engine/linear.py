"""A dense matrix of the model: float32, or quantized in a store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.moe import NestedMatrix

__all__ = ["Matrix", "apply"]

Floats = NDArray[np.float32]
Matrix = Floats | NestedMatrix


def apply(
    x: Floats, weight: Matrix, bias: Floats | None = None, out: Floats | None = None
) -> Floats:
    """Return ``x @ weight.T + bias``; a row's bits depend on that row alone."""
    if isinstance(weight, np.ndarray):
        return ops.linear(x, weight, bias, out)
    out = weight.linear(x, out=out)
    if bias is not None:
        out += bias
    return out
