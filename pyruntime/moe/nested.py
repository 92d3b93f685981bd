"""A matrix in the nested code: one set of planes, usable at several widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native

__all__ = ["NestedMatrix", "isa"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def isa() -> str:
    """Return the instruction set of the kernels: avx512_vnni, avx_vnni, avx2 or scalar."""
    return _native.moe_isa()


@dataclass(slots=True)
class NestedMatrix:
    """Planes of a matrix [rows, columns] and the widths they make.

    The format is that of ``docs/mxs.md``. Level l has ``bits[l]`` bits and needs planes 0..l.

    Notes
    -----
    `linear` releases the GIL and uses the process's thread pool. A result row's bits depend on its
    own input only.
    """

    rows: int
    columns: int
    bits: list[int]
    planes: list[Bytes]
    """uint8, one per level."""
    unit: float
    """Power of two the weights were divided by."""
    error: list[float]
    """Sum of squared errors per level."""
    energy: float
    """Sum of squared weights."""
    level: int
    """The level `linear` uses."""

    @classmethod
    def quantize(
        cls,
        weights: Floats,
        bits: Sequence[int],
        *,
        importance: Floats | None = None,
        gain: Sequence[float] | None = None,
        search: int = 1,
    ) -> NestedMatrix:
        """Quantize a matrix.

        Parameters
        ----------
        weights : ndarray of float32, shape (rows, columns)
        bits : sequence of int
            Rising widths: the first and each difference 2, 4 or 8 (a difference may be 0), at most
            8 in all.
        importance : ndarray of float32, shape (columns,), optional
            Mean square of each column's activation; errors are weighted by it.
        gain : sequence of float, optional
            Per level 0..1: how much of the gain that least squares takes is given back; 0 by
            default.
        search : int, default 1
            Places tried for each end of the range of a group of 32 weights, 1..16; 1 takes the
            whole range.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            A weight is not finite (the message has its place), or an argument is out of range.
        """
        weights = np.ascontiguousarray(weights, np.float32)
        rows, columns = weights.shape
        widths = list(bits)
        planes = [
            np.empty(_native.moe_plane_bytes(rows, columns, widths, level), np.uint8)
            for level in range(len(widths))
        ]
        unit, error, energy = _native.moe_quantize(
            weights, widths, importance, list(gain or [0.0] * len(widths)), search, planes
        )
        return cls(rows, columns, widths, planes, unit, error, energy, len(widths) - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the planes that `level` needs."""
        return sum(plane.nbytes for plane in self.planes[: self.level + 1])

    def dequantize(self, level: int | None = None) -> Floats:
        """Return the weights at a level (the current one by default) as float32 [rows, columns]."""
        out = np.empty((self.rows, self.columns), np.float32)
        level = self.level if level is None else level
        _native.moe_dequantize(
            self.rows, self.columns, self.bits, self.planes, level, self.unit, out
        )
        return out

    def linear(self, x: Floats, level: int | None = None, out: Floats | None = None) -> Floats:
        """Return ``x @ w.T``, float32 [n, rows], for float32 [n, columns]."""
        if out is None:
            out = np.empty((len(x), self.rows), np.float32)
        level = self.level if level is None else level
        _native.moe_linear(
            self.rows, self.columns, self.bits, self.planes, level, self.unit, x, out
        )
        return out
