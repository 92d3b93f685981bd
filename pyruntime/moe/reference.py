"""Float32 experts in memory: the oracle of the quantized store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops

__all__ = ["ReferenceExperts"]

Floats = NDArray[np.float32]


class ReferenceExperts:
    """All experts of all sparse layers as float32 arrays.

    Parameters
    ----------
    layers : dict of int to (gate, up, down)
        For each sparse layer float32 arrays [experts, f, d], [experts, f, d], [experts, d, f].
    """

    def __init__(self, layers: dict[int, tuple[Floats, Floats, Floats]]) -> None:
        self._layers = layers
        self._bytes = sum(part.nbytes for parts in layers.values() for part in parts)

    def begin_step(self, plan: Any) -> None:
        """Nothing is loaded, so nothing has to be ordered."""

    def hint(self, layer: int, x: Floats) -> None:
        """Nothing is loaded, so nothing can be prefetched."""

    def ffn(
        self,
        layer: int,
        x: Floats,
        ids: NDArray[np.int32],
        weights: Floats,
        out: Floats,
    ) -> NDArray[np.uint8]:
        """Compute the experts; see `pyruntime.moe`."""
        gate, up, down = self._layers[layer]
        ops.moe_ffn(x, ids, weights, gate, up, down, out)
        return np.zeros(len(x), np.uint8)

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of `layer`."""
        return sum(part[0].nbytes for part in self._layers[layer])

    def stats(self) -> dict[str, int]:
        """Return the cumulative counters."""
        return {"bytes_read": self._bytes, "resident_bytes": self._bytes}
