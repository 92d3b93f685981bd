"""The plain-Python block pool: the oracle of the native one, without sharing.

It swaps to host memory where it is given the storage, and releases blocks that a sliding window has
left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError, StateError
from pyruntime.kv.tables import GroupTable, KvGroup, KvStorage, StepTables

__all__ = ["ReferenceBlockPool"]

HOLE = -1


@dataclass(slots=True)
class SequenceBlocks:
    blocks: list[list[int]]
    """Per group; `HOLE` where the window has moved on."""
    reserve: int
    valid: int = 0
    swapped: list[dict[int, list[NDArray[np.float32]]]] | None = None
    """Per group: index of a block in the table to its K and V, layer by layer."""
    lengths: list[int] = field(default_factory=list)
    published: int = 0
    """Leading blocks whose sharing is settled."""


class ReferenceBlockPool:
    """Fixed-size KV blocks with lists and dicts.

    Parameters
    ----------
    num_blocks : int
        Of each group.
    block_size : int
        Tokens per block.
    num_layers : int
    groups : sequence of KvGroup, optional
        All layers in one group with full attention by default.
    host_blocks : int, default 0
        Blocks that may be swapped out at a time, counted in all groups.
    storage : KvStorage, optional
        Needed for swapping.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_layers: int = 1,
        groups: Sequence[KvGroup] | None = None,
        host_blocks: int = 0,
        storage: KvStorage | None = None,
    ) -> None:
        if min(num_blocks, block_size, num_layers) < 1:
            raise InvalidArgumentError("num_blocks, block_size and num_layers must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self.groups = tuple(groups or [KvGroup(tuple(range(num_layers)), 0, block_size)])
        if any(group.block_size != block_size for group in self.groups):
            raise InvalidArgumentError("the reference pool has one block size")
        self.host_blocks = host_blocks if storage is not None else 0
        self._storage = storage
        self._free = [list(range(num_blocks - 1, -1, -1)) for _ in self.groups]
        self._sequences: dict[int, SequenceBlocks] = {}

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that `tokens` tokens fill."""
        return -(-tokens // self.block_size)

    def fits(self, tokens: int) -> bool:
        """Whether a lone sequence of `tokens` tokens could ever fit."""
        return self.blocks_for(tokens) <= self.num_blocks

    def admit(
        self, request: int, tokens: NDArray[np.int32], namespace: bytes = b"", reserve: int = 0
    ) -> int:
        """Make a request known and return its tokens in memory already: none here.

        Raises
        ------
        pyruntime.errors.StateError
            The request is known already.
        """
        if request in self._sequences:
            raise StateError(f"request {request} is in the pool already")
        self._sequences[request] = SequenceBlocks(
            [[] for _ in self.groups], self.blocks_for(reserve)
        )
        return 0

    def start(self, request: int) -> int:
        """Make a request known whose tokens do not matter; see `pyruntime.sched.KvView`."""
        return 0 if self.knows(request) else self.admit(request, np.empty(0, np.int32))

    def knows(self, request: int) -> bool:
        """Whether the request was admitted and not freed since."""
        return request in self._sequences

    def held(self, request: int) -> int:
        """Return the blocks of a request in its largest group; 0 for an unknown one."""
        sequence = self._sequences.get(request)
        return max(_count(blocks) for blocks in sequence.blocks) if sequence else 0

    def need(self, request: int, tokens: int) -> int:
        """Return the further blocks `request` needs to hold `tokens`, in the neediest group."""
        sequence = self._sequences.get(request)
        if sequence is None or sequence.swapped is not None or len(sequence.blocks) > 1:
            return max(self._need(request, tokens))
        return max(0, -(-tokens // self.block_size) - len(sequence.blocks[0]))

    def _need(self, request: int, tokens: int) -> list[int]:
        wanted, sequence = self.blocks_for(tokens), self._sequences.get(request)
        if sequence is None:
            return [wanted] * len(self.groups)
        if sequence.swapped is not None:
            lost = [
                length - len(kept)
                for length, kept in zip(sequence.lengths, sequence.swapped, strict=True)
            ]
            return [max(wanted, n) - h for n, h in zip(sequence.lengths, lost, strict=True)]
        return [max(0, wanted - len(blocks)) for blocks in sequence.blocks]

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """Return the blocks left after such a step, negative for a deficit; changes nothing."""
        left = [len(blocks) for blocks in self._free]
        for request in dict.fromkeys(free):
            if sequence := self._sequences.get(request):
                for group, blocks in enumerate(sequence.blocks):
                    left[group] += _count(blocks)
        for request, tokens in grow:
            for group, count in enumerate(self._need(request, tokens)):
                left[group] -= count
        return min(left)

    def step(
        self,
        grow: Sequence[tuple[int, int]],
        free: Sequence[int] = (),
        swap_out: Sequence[int] = (),
        swap_in: Sequence[int] = (),
    ) -> StepTables:
        """Free and swap, then grow, and return the tables of the requests in `grow`.

        Raises
        ------
        pyruntime.errors.NotFoundError
            A request in `grow` was not admitted.
        pyruntime.errors.StateError
            A request in `grow` is swapped out and not in `swap_in`, or one in `swap_in` is not in
            `grow`.
        pyruntime.errors.CapacityError
            Blocks are missing, here or on the host; nothing has changed.
        """
        growing = {request for request, _ in grow}
        for request in growing:
            if request not in self._sequences or request in free:
                raise NotFoundError(f"request {request} is not in the pool; admit it first")
            if request in swap_out:
                raise StateError(f"request {request} cannot grow and be swapped out")
            if self._sequences[request].swapped is not None and request not in swap_in:
                raise StateError(f"request {request} is swapped out; the step must swap it in")
        if not growing.issuperset(swap_in):
            raise StateError("what is swapped in must be in the step")
        leaving = [r for r in swap_out if r in self._sequences]
        if sum(self._total(r) for r in leaving) > self._host_left(free):
            raise CapacityError("the host tier is full; preempt with recompute instead")
        left = self.dry_run(grow, [*free, *leaving])
        if left < 0:
            raise CapacityError(f"the step lacks {-left} KV blocks; preempt or finish a request")
        for request in free:
            self.free(request)
        for request in leaving:
            self._swap_out(self._sequences[request])
        for request in swap_in:
            self._swap_in(self._sequences[request])
        for request, tokens in grow:
            wanted = -(-tokens // self.block_size)
            for group, blocks in enumerate(self._sequences[request].blocks):
                if wanted > len(blocks):
                    self._reserve(group, wanted - len(blocks))
                    taken = range(wanted - len(blocks))
                    blocks.extend([self._free[group].pop() for _ in taken])
        tables = []
        for group in range(len(self.groups)):
            rows = [self._sequences[request].blocks[group] for request, _ in grow]
            table = np.full((len(grow), max([1, *map(len, rows)])), HOLE, np.int32)
            for row, blocks in enumerate(rows):
                table[row, : len(blocks)] = blocks
            tables.append(GroupTable(table, self.block_size, np.zeros(len(grow), np.int32)))
        return StepTables(tables, {request: row for row, (request, _) in enumerate(grow)})

    def commit(
        self,
        request: int,
        tokens: int,
        layers: int,
        ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Note that the first `tokens` tokens are valid in `layers` layers."""
        sequence = self._sequences.get(request)
        if sequence is None:
            return  # cancelled while the step ran
        if tokens > max(map(len, sequence.blocks)) * self.block_size:
            raise InvalidArgumentError(f"request {request} does not hold {tokens} tokens")
        if layers != self.num_layers:
            return
        sequence.valid = max(sequence.valid, tokens)
        for group, blocks in enumerate(sequence.blocks):
            if window := self.groups[group].window:  # the next query sees position valid - window+1
                passed = max(0, sequence.valid - window + 1) // self.block_size
                for index in range(min(passed, len(blocks))):
                    if blocks[index] != HOLE:
                        self._free[group].append(blocks[index])
                        blocks[index] = HOLE

    def observe(self, requests: Sequence[int], marks: dict[int, NDArray[np.uint8]]) -> None:
        """Take attention marks: this pool never asks for them."""

    def free(self, request: int) -> None:
        """Return a request's blocks; unknown requests are ignored."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self._release(sequence)

    def _release(self, sequence: SequenceBlocks) -> None:
        for group, blocks in enumerate(sequence.blocks):
            self._free[group].extend(b for b in reversed(blocks) if b != HOLE)
            blocks.clear()

    def _reserve(self, group: int, count: int) -> None:
        """Make sure that the group's free list holds `count` blocks."""

    # Swapping

    def can_swap(self, request: int) -> bool:
        """Whether the request's blocks are on the host or would fit there now."""
        sequence = self._sequences.get(request)
        if sequence is None or sequence.swapped is not None:
            return sequence is not None
        return 0 < self._total(request) <= self._host_left(())

    def _total(self, request: int) -> int:
        return sum(_count(blocks) for blocks in self._sequences[request].blocks)

    def _host_left(self, free: Sequence[int]) -> int:
        return self.host_blocks - sum(
            sum(map(len, s.swapped))
            for r, s in self._sequences.items()
            if s.swapped is not None and r not in free
        )

    def _swap_out(self, sequence: SequenceBlocks) -> None:
        if sequence.swapped is not None:
            return
        assert self._storage is not None
        sequence.swapped, sequence.lengths = [], [len(blocks) for blocks in sequence.blocks]
        for group, blocks in enumerate(sequence.blocks):
            layers = self.groups[group].layers
            arrays = [
                p for la in layers for p in (self._storage.keys[la], self._storage.values[la])
            ]
            sequence.swapped.append(
                {i: [part[b].copy() for part in arrays] for i, b in enumerate(blocks) if b != HOLE}
            )
        self._release(sequence)

    def _swap_in(self, sequence: SequenceBlocks) -> None:
        if sequence.swapped is None:
            return
        assert self._storage is not None
        for group, kept in enumerate(sequence.swapped):
            layers = self.groups[group].layers
            arrays = [
                p for la in layers for p in (self._storage.keys[la], self._storage.values[la])
            ]
            self._reserve(group, len(kept))
            for index in range(sequence.lengths[group]):
                block = self._free[group].pop() if index in kept else HOLE
                sequence.blocks[group].append(block)
                for part, saved in zip(arrays, kept.get(index, ()), strict=False):
                    part[block] = saved
        sequence.swapped = None

    @property
    def num_swapped(self) -> int:
        """Blocks on the host, in all groups."""
        return self.host_blocks - self._host_left(())

    @property
    def num_free(self) -> int:
        """Free blocks, in the group that has least."""
        return min(map(len, self._free))

    @property
    def promised(self) -> int:
        """Blocks reserved by admitted requests and not held yet."""
        return sum(max(0, s.reserve - max(map(len, s.blocks))) for s in self._sequences.values())

    def check(self) -> None:
        """Raise `StateError` unless every block is free or held exactly once."""
        for group, free in enumerate(self._free):
            held = [b for s in self._sequences.values() for b in s.blocks[group] if b != HOLE]
            if sorted(held + free) != list(range(self.num_blocks)):
                raise StateError("a KV block is lost or held twice")


def _count(blocks: list[int]) -> int:
    return sum(block != HOLE for block in blocks)
