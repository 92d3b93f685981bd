"""Experts of a store at one width, all in memory: an expert backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.moe.store import ExpertStore

__all__ = ["StoreExperts"]

Floats = NDArray[np.float32]


class StoreExperts:
    """All experts of a store, loaded up to one level and computed at it; see `pyruntime.moe`.

    Parameters
    ----------
    store : ExpertStore
    bits : int, optional
        Width of gate and up (down has the store's width at the same level); the widest by default.
        Planes beyond it are not read.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        The store has no such width.
    pyruntime.errors.StorageError, CorruptDataError
        A plane could not be read, or is damaged.
    """

    def __init__(self, store: ExpertStore, bits: int | None = None) -> None:
        self.store = store
        self.level = store.levels - 1 if bits is None else store.level_of(bits)
        self._planes: dict[int, NDArray[np.uint64]] = {}
        self._units: dict[int, Floats] = {}
        self._memory: list[NDArray[np.uint8]] = []
        self._bytes: dict[int, int] = {}
        for layer in store.layers:
            self._load(layer)

    def _load(self, layer: int) -> None:
        store = self.store
        planes = np.zeros((store.num_experts, store.levels), np.uint64)
        units = np.zeros((store.num_experts, 3), np.float32)
        extents = [
            store.extent(layer, expert, level)
            for level in range(self.level + 1)
            for expert in range(store.num_experts)
        ]
        # One block per layer; extents at multiples of 64, which loads of whole vectors like.
        sizes = [-(-extent.bytes // 64) * 64 for extent in extents]
        block = np.empty(sum(sizes) + 64, np.uint8)
        at = -block.ctypes.data % 64
        for extent, size in zip(extents, sizes, strict=True):
            part = block[at : at + extent.bytes]
            store.read(extent, part)
            planes[extent.expert, extent.level] = part.ctypes.data
            units[extent.expert] = extent.unit
            at += size
        self._memory.append(block)
        self._planes[layer], self._units[layer] = planes, units
        self._bytes[layer] = sum(extent.bytes for extent in extents)

    def begin_step(self, plan: Any) -> None:
        """Nothing is loaded later, so nothing has to be ordered."""

    def hint(self, layer: int, x: Floats) -> None:
        """Nothing is loaded later, so nothing can be prefetched."""

    def ffn(
        self,
        layer: int,
        x: Floats,
        ids: NDArray[np.int32],
        weights: Floats,
        out: Floats,
        levels: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Compute the experts; `levels` uint8 [n, top_k] may lower them slot by slot."""
        _native.moe_ffn(
            self.store.hidden,
            self.store.ffn,
            self.store.bits,
            self._planes[layer],
            self._units[layer],
            x,
            ids,
            weights,
            levels,
            self.level,
            out,
        )
        return np.zeros(len(x), np.uint8)

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of `layer` at the width in use."""
        return self._bytes[layer] // self.store.num_experts

    def stats(self) -> dict[str, int]:
        """Return the cumulative counters."""
        total = sum(self._bytes.values())
        return {"bytes_read": total, "resident_bytes": sum(m.nbytes for m in self._memory)}
