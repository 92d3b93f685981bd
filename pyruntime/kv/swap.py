"""Copies of KV blocks between tiers, on threads of their own, and a host tier of engine pools.

The core, its conflict rules and its failure behaviour are described in ``pyruntime/kv_tiers.h`` and
``csrc/kv/swap.hpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.errors import InternalError, InvalidArgumentError
from pyruntime.kv.tables import KvStorage
from pyruntime.pool import UNIT_BYTES, Budget, BudgetClient

__all__ = ["HostTier", "SwapEngine", "runs_of"]

Ints = NDArray[np.int64]


def runs_of(sources: Sequence[int] | Ints, targets: Sequence[int] | Ints) -> NDArray[np.uint32]:
    """Put neighbours together: uint32 [runs, 3] of (source, target, count)."""
    source, target = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    if not len(source):
        return np.empty((0, 3), np.uint32)
    order = np.argsort(source, kind="stable")
    source, target = source[order], target[order]
    apart = (np.diff(source) != 1) | (np.diff(target) != 1)
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    count = np.diff(np.concatenate([first, [len(source)]]))
    return np.stack([source[first], target[first], count], axis=1).astype(np.uint32)


def _places(free: NDArray[np.bool_], wanted: int) -> Ints:
    """Return `wanted` free places in few runs: the tightest that fits, else the longest first.

    Fewer of them if there are no more.
    """
    places = np.flatnonzero(free)
    if wanted < 1 or not len(places):
        return places[:0]
    first = np.concatenate([[0], np.flatnonzero(np.diff(places) != 1) + 1])
    lengths = np.diff(np.concatenate([first, [len(places)]]))
    fitting = np.flatnonzero(lengths >= wanted)
    if len(fitting):
        start = first[fitting[np.argmin(lengths[fitting])]]
        return places[start : start + wanted]
    runs = np.split(places, first[1:])
    chosen = np.concatenate([runs[i] for i in np.argsort(-lengths, kind="stable")])
    return chosen[:wanted]


class SwapEngine:
    """Copies runs of blocks between spaces on threads of its own.

    Copies that touch a block in the same way that one of them writes run in the order of their
    submission; all others in any order.

    Parameters
    ----------
    workers : int, default 1
        Threads, 1..16; they sleep while there is nothing to do.
    queue_limit : int, default 4096
        Copies that have not been collected.

    Notes
    -----
    Thread-safe; `wait` releases the GIL. A forked child's calls raise `StateError`.
    Source: FastSwitch (arXiv 2411.18424), section 3.2.
    """

    def __init__(self, workers: int = 1, queue_limit: int = 4096) -> None:
        self._core = _native.KvSwap(workers, queue_limit, 0, 1)
        self._kept: dict[int, Any] = {}

    def add_space(self, pieces: Sequence[NDArray[Any]]) -> int:
        """Register where a group's blocks lie.

        Parameters
        ----------
        pieces : sequence of ndarray, shape (blocks, ...)
            K and V of each layer; alike in shape, dtype and strides, and contiguous within a
            block. They are kept alive until the space is removed.

        Returns
        -------
        int
            The space's id.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            The pieces are not alike, or a block is not contiguous.
        """
        if not pieces:
            raise InvalidArgumentError("pieces is empty; a space has one at least")
        first = pieces[0]
        for piece in pieces:
            alike = (piece.shape, piece.dtype, piece.strides) == (
                first.shape,
                first.dtype,
                first.strides,
            )
            if not alike or not len(piece) or not piece[0].flags.c_contiguous:
                raise InvalidArgumentError(
                    "pieces must be alike in shape, dtype and strides, and contiguous in a block"
                )
        space = self._core.add_space(
            [piece.ctypes.data for piece in pieces],
            first.strides[0],
            first[0].nbytes,
            len(first),
        )
        self._kept[space] = list(pieces)
        return space

    def remove_space(self, space: int) -> None:
        """Forget a space; `StateError` while a copy touches it."""
        self._core.remove_space(space)
        self._kept.pop(space, None)

    def copy(
        self,
        source: int,
        target: int,
        runs: NDArray[np.uint32],
        fence: int = 0,
        value: int = 0,
    ) -> int:
        """Submit a copy, to start once a fence has reached a value.

        Parameters
        ----------
        source, target : int
            Spaces with pieces alike; they may be the same.
        runs : ndarray of uint32, shape (n, 3)
            First source block, first target block, count. No block may be written twice, or read
            and written.

        Returns
        -------
        int
            The ticket that `collect` returns once it has ended.

        Raises
        ------
        pyruntime.errors.CapacityError
            Too many copies wait to be collected.
        """
        return self._core.copy(source, target, runs, fence, value)

    def add_fence(self) -> int:
        """Make a fence: a number, 0 at first, that `signal` raises."""
        return self._core.add_fence()

    def signal(self, fence: int, value: int) -> None:
        """Raise a fence to a value, so that the copies behind it may start."""
        self._core.signal(fence, value)

    def cancel(self, ticket: int) -> None:
        """End a copy early; one that has ended stays as it is. It is collected all the same."""
        self._core.cancel(ticket)

    def wait(self, ticket: int = 0, timeout_s: float | None = None) -> bool:
        """Wait until a copy, or every copy (0), has ended; False after `timeout_s`."""
        return self._core.wait(ticket, -1 if timeout_s is None else int(timeout_s * 1e9))

    def collect(self) -> dict[int, int]:
        """Return ticket to status (0: done) of the copies that ended and were not collected."""
        return self._core.collect()

    def busy(self, space: int, block: int, *, for_writing: bool = False) -> bool:
        """Whether an unfinished copy writes the block or, `for_writing`, touches it."""
        return self._core.busy(space, block, for_writing)

    def verify(self) -> None:
        """Count the blocks in flight again; `CorruptDataError` says what is wrong."""
        self._core.verify()

    def stats(self) -> dict[str, int]:
        """Counters and gauges of ``pyrt_kv_swap_statistics``."""
        return self._core.statistics()


class HostTier:
    """Host memory for blocks that are swapped out of a `KvStorage`.

    Parameters
    ----------
    storage : KvStorage
        If its blocks are not contiguous, they are copied by numpy rather than by the swap engine.
    num_blocks : int
        Of each group; memory appears as it is written.
    budget : Budget, optional
        All of the tier's bytes are reserved there, in whole units, as long as the tier lives.

    Raises
    ------
    pyruntime.errors.CapacityError
        The budget has no room for the tier.
    """

    def __init__(self, storage: KvStorage, num_blocks: int, budget: Budget | None = None) -> None:
        self._reserved: BudgetClient | None = None
        if budget is not None:
            parts = (*storage.keys, *storage.values)
            num_bytes = sum(part[0].nbytes for part in parts) * num_blocks
            self._reserved = budget.register("KV host tier")
            self._reserved.reserve(-(-num_bytes // UNIT_BYTES) * UNIT_BYTES)
        self._engine = SwapEngine()
        self._pieces: list[list[NDArray[Any]]] = []
        self._memory: list[NDArray[Any]] = []
        self._spaces: list[tuple[int, int] | None] = []
        self._free: list[NDArray[np.bool_]] = []
        for group in storage.groups:
            pieces = [p for la in group.layers for p in (storage.keys[la], storage.values[la])]
            memory = np.empty((len(pieces), num_blocks, *pieces[0].shape[1:]), storage.dtype)
            self._pieces.append(pieces)
            self._memory.append(memory)
            self._free.append(np.ones(num_blocks, np.bool_))
            try:
                near = self._engine.add_space(pieces)
            except InvalidArgumentError:
                self._spaces.append(None)
                continue
            self._spaces.append((near, self._engine.add_space(list(memory))))

    def out(self, group: int, blocks: Sequence[int]) -> list[int]:
        """Begin to copy blocks to the host; return their places there. `finish` ends it."""
        places = _places(self._free[group], len(blocks))
        assert len(places) == len(blocks), "the owner counts"
        self._free[group][places] = False
        self._copy(group, blocks, places, back=False)
        return [int(place) for place in places]

    def back(self, group: int, places: Sequence[int], blocks: Sequence[int]) -> None:
        """Begin to copy from the host to blocks; call `free` after `finish`."""
        self._copy(group, blocks, np.asarray(places, np.int64), back=True)

    def free(self, group: int, places: Sequence[int]) -> None:
        """Give places on the host back."""
        self._free[group][np.asarray(places, np.int64)] = True

    def finish(self) -> None:
        """Wait until all copies have ended; `InternalError` if one has failed."""
        self._engine.wait()
        failed = [status for status in self._engine.collect().values() if status != 0]
        if failed:
            raise InternalError(f"a copy of KV blocks ended with status {failed[0]}")

    def stats(self) -> dict[str, int]:
        """Counters of the swap engine, and ``reserved_bytes`` of the budget."""
        reserved = 0 if self._reserved is None else self._reserved.reserved_bytes
        return {**self._engine.stats(), "reserved_bytes": reserved}

    def _copy(self, group: int, blocks: Sequence[int], places: Ints, *, back: bool) -> None:
        if not len(places):
            return
        spaces = self._spaces[group]
        if spaces is not None:
            near, far = spaces
            if back:
                self._engine.copy(far, near, runs_of(places, blocks))
            else:
                self._engine.copy(near, far, runs_of(blocks, places))
            return
        chosen = np.asarray(blocks, np.int64)
        for piece, memory in zip(self._pieces[group], self._memory[group], strict=True):
            if back:
                piece[chosen] = memory[places]
            else:
                memory[places] = piece[chosen]
