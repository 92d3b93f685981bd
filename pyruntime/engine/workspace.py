"""Memory of a step's activations, kept from one step to the next.

What `numpy` frees stays with the allocator: arrays of all sizes, made and dropped operator by
operator, leave holes that take twice what is in use at a time. Under a memory budget every array of
a layer therefore has a place of its own, as large as the largest step needs it; its pages appear as
rows are first written.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyruntime.kv.tables import zeroed

__all__ = ["Workspace"]


class Workspace:
    """Float32 arrays by name.

    Parameters
    ----------
    rows : int, default 0
        Rows of the largest step; 0 keeps nothing: each array is a new one.
    """

    def __init__(self, rows: int = 0) -> None:
        self._rows = rows
        self._kept: dict[str, NDArray[np.float32]] = {}

    def array(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Return an array whose first axis is rows; it is valid until the name is used again."""
        if self._rows == 0:
            return np.empty(shape, np.float32)
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            width = math.prod(shape[1:])
            _, kept = zeroed((max(self._rows, shape[0]) * width,))
            self._kept[name] = kept
        return kept[:size].reshape(shape)

    def copy(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `values` in an array of that name."""
        out = self.array(name, *values.shape)
        out[...] = values
        return out
