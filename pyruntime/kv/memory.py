"""Memory of a pool's blocks, out of a budget that others draw on too.

A high-water mark. Pages of KV memory appear when a block is first written, so blocks that never
were take nothing, and the budget lends their bytes to others, such as experts. The pool hands out
low ids first; those from the mark on are withheld from it (`BlockPool.take_blocks`), and the mark
rises as the budget grants memory, in whole units:

    block ids | 0 ... opened: charged, the pool's | opened ... num_blocks: withheld, without pages

Up to `kept_bytes` it never falls. Content that nobody uses stays in its blocks on purpose, for
prompts to come, and blocks of all ages mix in one unit: to give a unit back, content that is used
more than its neighbours would have to go, or be moved, for planes that are read again in
milliseconds. Beyond it memory is for what runs alone: content is evicted before more is taken, and
`give_back` lowers the mark again, with all content, once nothing runs. So a long context or many
requests may have what others can spare, all of it if need be, and do not keep it.

The pool asks for blocks rather than evict content and, if there are not as many, for those without
which it would refuse a step. The budget then makes others give back what they hold. What they could
give back counts as left when a step is planned, so a scheduler admits no more than there is memory
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyruntime.errors import CapacityError
from pyruntime.kv.block_pool import BlockPool
from pyruntime.pool import UNIT_BYTES, Budget

__all__ = ["BlockMemory"]


def _nothing(*_: int) -> int:
    return 0


class BlockMemory:
    """Opens blocks of a pool as a budget grants memory for them.

    Parameters
    ----------
    pool : BlockPool
        Nothing may be in use yet.
    budget : Budget
    block_bytes : sequence of int
        Of a block in all layers of each group.
    priority : int, default 1
        In the budget: others of this priority or below give back what is needed.
    spare : callable, optional
        Bytes that they would give back now. None by default.
    settle : callable, optional
        Waits until they are at rest, so that they can.
    kept_bytes : int, optional
        Memory that content may keep; no limit by default.
    discard : callable, optional
        Gives the pages of a group's blocks back to the system: (group, first, end).

    Notes
    -----
    One thread at a time, as the pool.
    """

    def __init__(
        self,
        pool: BlockPool,
        budget: Budget,
        block_bytes: Sequence[int],
        *,
        priority: int = 1,
        spare: Callable[[], int] = _nothing,
        settle: Callable[[], object] = _nothing,
        kept_bytes: int | None = None,
        discard: Callable[[int, int, int], object] = _nothing,
    ) -> None:
        self._pool = pool
        self._budget = budget
        self._block_bytes = tuple(block_bytes)
        self._spare = spare
        self._settle = settle
        self._kept_bytes = kept_bytes
        self._discard = discard
        self._client = budget.register("KV cache", priority=priority)
        self._reserved = [0] * len(self._block_bytes)
        self._opened = [0] * len(self._block_bytes)
        self._ids = []
        for group, count in enumerate(pool.num_blocks):
            ids = pool.take_blocks(count, group=group)
            ids.sort()
            self._ids.append(ids)

    @property
    def opened(self) -> list[int]:
        """Blocks of each group that have memory."""
        return list(self._opened)

    @property
    def withheld(self) -> list[int]:
        """Blocks of each group that have none yet."""
        return [len(i) - n for i, n in zip(self._ids, self._opened, strict=True)]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the budget."""
        return sum(self._reserved)

    def obtainable(self) -> list[int]:
        """Return the further blocks of each group that could be opened, all of them together."""
        withheld = self.withheld
        most = max(withheld)
        if most == 0:
            return withheld
        room = self._budget.available_bytes + max(0, self._spare())
        low = 0
        while low < most:
            middle = (low + most + 1) // 2
            fits = sum(self._more([middle] * len(withheld))) <= room
            low, most = (middle, most) if fits else (low, middle - 1)
        return [min(low, left) for left in withheld]

    def open(self, wished: Sequence[int], needed: Sequence[int]) -> None:
        """Open so many further blocks of each group, or at least what is needed.

        For what is needed it waits until others are at rest. If there is no memory for it either,
        nothing is opened: the pool then refuses the step.
        """
        kept = self._kept_bytes
        if kept is not None and self.reserved_bytes + sum(self._more(wished)) > kept:
            wished = needed
        if self._open(wished) or not any(needed) or self._open(needed):
            return
        self._settle()
        self._open(needed)

    @property
    def exceeded(self) -> bool:
        """Whether more is reserved than content may keep."""
        return self._kept_bytes is not None and self.reserved_bytes > self._kept_bytes

    def give_back(self) -> bool:
        """Evict everything and keep no more than content may; False if any block is in use."""
        groups = range(len(self._ids))
        if any(self._pool.available(group=g) < self._opened[g] for g in groups):
            return False
        assert self._kept_bytes is not None
        left = self._kept_bytes // UNIT_BYTES
        for g in groups:
            self._pool.take_blocks(self._opened[g], group=g)
            units = min(left // (len(self._ids) - g), self._reserved[g] // UNIT_BYTES)
            left -= units
            ids, before = self._ids[g], self._opened[g]
            now = min(before, units * UNIT_BYTES // self._block_bytes[g])
            self._pool.unpin_blocks(ids[:now], group=g)
            self._opened[g] = now
            self._discard(g, now, before)
            self._client.give_back(self._reserved[g] - units * UNIT_BYTES)
            self._reserved[g] = units * UNIT_BYTES
        return True

    def _more(self, blocks: Sequence[int]) -> list[int]:
        """Bytes to reserve, in each group, for so many further blocks."""
        more = []
        for ids, opened, reserved, size, n in zip(
            self._ids, self._opened, self._reserved, self._block_bytes, blocks, strict=True
        ):
            wanted = min(len(ids), opened + n) * size
            more.append(max(0, -(-wanted // UNIT_BYTES) * UNIT_BYTES - reserved))
        return more

    def _open(self, blocks: Sequence[int]) -> bool:
        more = self._more(blocks)
        if any(more):
            try:
                self._client.reserve(sum(more))
            except CapacityError:
                return False
        for group, num_bytes in enumerate(more):
            self._reserved[group] += num_bytes
            ids, before = self._ids[group], self._opened[group]
            # A unit is filled: what is left of it is less than a block.
            now = min(len(ids), self._reserved[group] // self._block_bytes[group])
            if now > before:
                self._pool.unpin_blocks(ids[before:now], group=group)
                self._opened[group] = now
        return True
