"""Stores of nested experts on disk: ``.mxs`` files (``docs/mxs.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.errors import InvalidArgumentError, NotFoundError
from pyruntime.moe.nested import NestedMatrix

__all__ = ["ExpertStore", "Extent", "StoreWriter"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Extent:
    """One run of bytes in a store: a plane of a whole expert, or a dense matrix."""

    index: int
    dense: bool
    layer: int
    expert: int
    """For a dense matrix its number."""
    level: int
    offset: int
    bytes: int
    crc: int
    rows: int
    columns: int
    bits: list[int]
    """Rows, columns and widths of a dense matrix; 0 and empty for experts."""
    unit: list[float]
    error: list[float]
    """Of gate, up and down: sum of squared errors at this level."""
    energy: list[float]


class ExpertStore:
    """An open store; no weights are read until they are asked for.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    num_layers, num_experts, hidden, ffn : int
    bits : list of list of int
        Widths of gate, up and down at each level.
    model_hash : bytes
    extents : list of Extent

    Raises
    ------
    pyruntime.errors.NotFoundError
        There is no such file.
    pyruntime.errors.CorruptDataError
        It is truncated, half-written or damaged; the message says where.
    pyruntime.errors.VersionError
        Its format is not the one this library reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._native = _native.MoeStore(str(path))
        info = self._native.info()
        self.num_layers: int = info["num_layers"]
        self.num_experts: int = info["num_experts"]
        self.hidden: int = info["hidden"]
        self.ffn: int = info["ffn"]
        self.bits: list[list[int]] = info["bits"]
        self.model_hash: bytes = info["model_hash"]
        self.file_bytes: int = info["file_bytes"]
        self.extents = [Extent(i, **e) for i, e in enumerate(self._native.extents())]
        self._places = {(e.dense, e.layer, e.expert, e.level): e for e in self.extents}

    def __repr__(self) -> str:
        return f"ExpertStore({str(self.path)!r}, layers={self.layers}, bits={self.bits})"

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.bits[0])

    @property
    def layers(self) -> list[int]:
        """Layers that have experts."""
        return sorted({e.layer for e in self.extents if not e.dense})

    def level_of(self, bits: int) -> int:
        """Return the level at which gate and up have `bits` bits."""
        if bits not in self.bits[0]:
            raise InvalidArgumentError(
                f"{self.path} has no experts of {bits} bits; it has {sorted(set(self.bits[0]))}"
            )
        return self.bits[0].index(bits)

    def extent(self, layer: int, expert: int, level: int) -> Extent:
        """Return the extent of an expert's plane; NotFoundError outside the store."""
        found = self._places.get((False, layer, expert, level))
        if found is None:
            raise NotFoundError(f"{self.path} has no layer {layer}, expert {expert}, level {level}")
        return found

    def read(self, extent: Extent, out: Bytes | None = None) -> Bytes:
        """Read an extent and check it.

        Raises
        ------
        pyruntime.errors.StorageError
            It could not be read whole.
        pyruntime.errors.CorruptDataError
            Its checksum differs.
        """
        if out is None:
            out = np.empty(extent.bytes, np.uint8)
        self._native.read(extent.index, out)
        return out

    def read_dense(self, layer: int, number: int) -> NestedMatrix | None:
        """Read a dense matrix; None if the store has no such one."""
        extent = self._places.get((True, layer, number, 0))
        if extent is None:
            return None
        data, planes, at = self.read(extent), [], 0
        for level in range(len(extent.bits)):
            size = _native.moe_plane_bytes(extent.rows, extent.columns, extent.bits, level)
            planes.append(data[at : at + size])
            at += size
        return NestedMatrix(
            extent.rows,
            extent.columns,
            extent.bits,
            planes,
            extent.unit[0],
            [extent.error[0]] * len(planes),
            extent.energy[0],
            len(planes) - 1,
        )

    def verify(self) -> None:
        """Read and check every extent; raises at the first that is bad."""
        for extent in self.extents:
            self.read(extent)


class StoreWriter:
    """Writes a store; it gets its name only when `commit` is done.

    Parameters
    ----------
    path : path
    num_layers, num_experts, hidden, ffn : int
    bits : sequence of sequence of int
        Widths of gate, up and down at each level.
    model_hash : bytes
        32 bytes that tell which model this is.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_layers: int,
        num_experts: int,
        hidden: int,
        ffn: int,
        bits: Sequence[Sequence[int]],
        model_hash: bytes = bytes(32),
    ) -> None:
        self.bits = [list(row) for row in bits]
        self._native = _native.MoeWriter(
            str(path), num_layers, num_experts, hidden, ffn, self.bits, model_hash
        )

    def add_plane(self, layer: int, expert: int, level: int, parts: Sequence[NestedMatrix]) -> None:
        """Append the extent of one expert's plane, from its gate, up and down."""
        self._native.add_plane(
            layer,
            expert,
            level,
            np.concatenate([part.planes[level] for part in parts]),
            [part.unit for part in parts],
            [part.error[level] for part in parts],
            [part.energy for part in parts],
        )

    def add_layer(self, layer: int, experts: Sequence[Sequence[NestedMatrix]]) -> None:
        """Append a layer's experts, the base planes of all of them first."""
        for level in range(len(self.bits[0])):
            for expert, parts in enumerate(experts):
                self.add_plane(layer, expert, level, parts)

    def add_dense(self, layer: int, number: int, matrix: NestedMatrix) -> None:
        """Append a dense matrix."""
        self._native.add_dense(
            layer,
            number,
            matrix.rows,
            matrix.columns,
            matrix.bits,
            np.concatenate(matrix.planes),
            matrix.unit,
            matrix.error[-1],
            matrix.energy,
        )

    def commit(self) -> None:
        """Finish the file and give it its name.

        Raises
        ------
        pyruntime.errors.StateError
            A layer is not whole.
        """
        self._native.commit()

    def close(self) -> None:
        """End; without `commit` nothing remains."""
        self._native.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
