"""Prepared decode batches of a block pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyruntime._ext import _kv

if TYPE_CHECKING:
    from pyruntime.kv.block_pool import BlockPool

__all__ = ["Batch"]

Ints = npt.NDArray[np.int32]


class Batch:
    """Sequences that each grow by one token per step, with everything prepared.

    Parameters
    ----------
    pool : BlockPool
    seqs : sequence of int
    tables : sequence of ndarray of int32, shape (rows, width), optional
        Per group; written now, and by each step where they change.
    slots : sequence of ndarray of int32, shape (rows,), optional
        Per group: where each step's tokens go, block * block_size + offset.
    lengths : ndarray of int32, shape (rows,), optional
        Tokens each row holds.

    Notes
    -----
    The arrays are used in place and kept. Ends with any of its sequences: make another one then.
    """

    def __init__(
        self,
        pool: BlockPool,
        seqs: Sequence[int] | npt.NDArray[np.uint64],
        *,
        tables: Sequence[Ints] | None = None,
        slots: Sequence[Ints] | None = None,
        lengths: Ints | None = None,
    ) -> None:
        self.pool = pool
        self.native = _kv.Batch(pool.native, np.asarray(seqs, np.uint64), tables, slots, lengths)
        self.advance = self.native.advance
        """``advance(tokens)``: append int32 tokens (rows,) and return the copies (group, source,
        target) that come before the step's writes. All tokens appended before are valid in all
        layers now. `CapacityError` leaves everything as it was; `StateError` when a sequence has
        ended or was swapped out."""

    def __len__(self) -> int:
        return len(self.native)
