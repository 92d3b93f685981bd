"""A plain-Python block pool that shares prefixes: the reference of the prefix cache.

Full blocks are named by content (`pyruntime.kv.events`). When a request starts, the leading blocks
that are in memory already become its own, by reference count; what is committed in all layers is
published; blocks that nobody holds stay until their room is needed, least recently used first, the
end of a sequence before its beginning. Models with sliding windows share nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import StateError
from pyruntime.kv.events import EventLog, block_keys
from pyruntime.kv.reference import ReferenceBlockPool, SequenceBlocks

__all__ = ["ReferencePrefixPool"]


class ReferencePrefixPool(ReferenceBlockPool):
    """`ReferenceBlockPool` with a prefix cache; parameters as there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shares = len(self.groups) == 1 and self.groups[0].window == 0
        self._refs: dict[int, int] = {}  # block -> sequences that hold it; 0: only cached
        self._key_of: dict[int, str] = {}
        self._block_of: dict[str, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by none; oldest first
        self._names: dict[int, tuple[bytes, list[str]]] = {}
        self._log = EventLog()
        self.hit_tokens = 0
        self.asked_tokens = 0

    def admit(
        self, request: int, tokens: NDArray[np.int32], namespace: bytes = b"", reserve: int = 0
    ) -> int:
        """Make a request known; its leading blocks in memory become its own.

        At least one token is left to compute. Returns the tokens that are not.
        """
        super().admit(request, tokens, namespace, reserve)
        if not self._shares:
            return 0
        keys = block_keys(tokens, self.block_size, namespace)
        self._names[request] = (namespace, keys)
        blocks = self._sequences[request].blocks[0]
        for key in keys[: max(0, len(tokens) - 1) // self.block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            self._refs[block] += 1
            self._idle.pop(block, None)
            blocks.append(block)
        cached = len(blocks) * self.block_size
        self._sequences[request].valid = cached
        self._sequences[request].published = len(blocks)
        self.hit_tokens += cached
        self.asked_tokens += len(tokens)
        return cached

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """See `ReferenceBlockPool`: cached blocks that nobody holds count as left."""
        if not self._shares:
            return super().dry_run(grow, free)
        left = len(self._free[0]) + len(self._idle)
        released: dict[int, int] = {}
        for request in dict.fromkeys(free):
            for block in self._sequences[request].blocks[0] if self.knows(request) else ():
                released[block] = released.get(block, 0) + 1
        left += sum(self._refs.get(block, 1) == count for block, count in released.items())
        return left - sum([self.need(request, tokens) for request, tokens in grow])

    def commit(
        self,
        request: int,
        tokens: int,
        layers: int,
        ids: NDArray[np.int32] | None = None,
    ) -> None:
        """See `ReferenceBlockPool`; publishes the full blocks that became valid."""
        super().commit(request, tokens, layers)
        sequence = self._sequences.get(request)
        if not self._shares or sequence is None:
            return
        full = sequence.valid // self.block_size
        if full == sequence.published:
            return
        namespace, keys = self._names[request]
        if full > len(keys) and ids is not None:
            keys += block_keys(ids[: full * self.block_size], self.block_size, namespace)[
                len(keys) :
            ]
        blocks = sequence.blocks[0]
        fresh = []
        first, sequence.published = sequence.published, min(full, len(keys))
        for index in range(first, sequence.published):
            block, key = blocks[index], keys[index]
            if block in self._refs or key in self._block_of:
                continue  # shared already, or a second copy, which stays private
            self._refs[block] = 1
            self._key_of[block] = key
            self._block_of[key] = block
            fresh.append(key)
        if fresh:
            self._log.add("stored", fresh)

    def free(self, request: int) -> None:
        """See `ReferenceBlockPool`; published blocks stay until their room is needed."""
        self._names.pop(request, None)
        super().free(request)

    def _release(self, sequence: SequenceBlocks) -> None:
        if self._shares:
            private = []
            for block in reversed(sequence.blocks[0]):
                if block not in self._refs:
                    private.append(block)
                    continue
                self._refs[block] -= 1
                if not self._refs[block]:
                    self._idle[block] = None  # the end of a sequence is the older
            sequence.blocks[0] = private[::-1]
        super()._release(sequence)

    def _reserve(self, group: int, count: int) -> None:
        self._evict(count - len(self._free[group]))

    def _evict(self, count: int) -> None:
        gone = []
        for _ in range(min(count, len(self._idle))):
            block, _ = self._idle.popitem(last=False)
            key = self._key_of.pop(block)
            del self._refs[block], self._block_of[key]
            self._free[0].append(block)
            gone.append(key)
        if gone:
            self._log.add("removed", gone, reason="capacity")

    @property
    def num_free(self) -> int:
        """Blocks that are free or could be at once."""
        return super().num_free + len(self._idle)

    # Events

    def events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the next sequence number and the events from `since` on."""
        return self._log.since(since)

    def snapshot(self) -> tuple[int, list[str]]:
        """Return the sequence number of the next event, and the keys of all published blocks."""
        return self._log.snapshot()

    def check(self) -> None:
        """Raise `StateError` unless every block is free, cached or held as often as counted."""
        if not self._shares:
            super().check()
            return
        held: dict[int, int] = {}
        for sequence in self._sequences.values():
            for block in sequence.blocks[0]:
                held[block] = held.get(block, 0) + 1
        for block, count in held.items():
            if count != self._refs.get(block, 1):
                raise StateError(f"block {block} is held {count} times and counted otherwise")
        private = set(held) - set(self._refs)
        everything = sorted([*self._free[0], *self._idle, *private, *(set(held) - private)])
        if everything != list(range(self.num_blocks)):
            raise StateError("a KV block is lost or in two places")
        if set(self._idle) != {b for b, count in self._refs.items() if not count}:
            raise StateError("a cached block is counted wrongly")
        if {k: b for b, k in self._key_of.items()} != self._block_of or set(self._key_of) != set(
            self._refs
        ):
            raise StateError("the index does not name the published blocks")
        if sorted(self.snapshot()[1]) != sorted(self._block_of):
            raise StateError("the events do not add up to the index")
