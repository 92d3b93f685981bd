"""The block pool as an engine loop uses it: requests by number, and the contract of `pyruntime.kv`.

Allocation, prefix sharing, eviction and events are `BlockPool`'s; here are names of requests,
swapping to host memory, and prompts whose blocks are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError, StateError
from pyruntime.kv.block_pool import DRY, NO_COUNTS, NO_SEQS, PINS_END, BlockPool
from pyruntime.kv.disk_cache import DiskCache
from pyruntime.kv.memory import BlockMemory
from pyruntime.kv.records import REASONS
from pyruntime.kv.swap import HostTier
from pyruntime.kv.tables import GroupTable, KvGroup, KvStorage, StepTables
from pyruntime.pool import Budget

__all__ = ["ServingPool"]

EVENTS = 1 << 16


@dataclass(slots=True)
class _Request:
    seq: int
    blocks: int
    """Entries of its tables."""
    swapped: list[dict[int, int]] | None = None
    """Per group: index of a table entry to its place on the host."""
    shadow: list[dict[int, int]] | None = None
    """The same of blocks that were swapped in again and cannot have changed since."""
    namespace: bytes = b""
    full: int = 0
    """Leading blocks that are computed in all layers: they never change again."""
    saved: int = 0
    """Of them those that are on disk, on their way, or given up."""


class ServingPool:
    """`BlockPool` behind the contract of `pyruntime.kv`.

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
    max_requests : int, default 4096
        Requests known at a time.
    host_budget : Budget, optional
        The host tier's bytes are reserved there.
    disk : DiskCache, optional
        Of the same storage: computed blocks are written there, and those of admitted prompts read.
    memory : callable, optional
        Makes, of the block pool, the `BlockMemory` that its blocks come from; by default they are
        all there.
    **options
        Of `BlockPool`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_layers: int = 1,
        groups: Sequence[KvGroup] | None = None,
        host_blocks: int = 0,
        storage: KvStorage | None = None,
        *,
        max_requests: int = 4096,
        host_budget: Budget | None = None,
        disk: DiskCache | None = None,
        memory: Callable[[BlockPool], BlockMemory] | None = None,
        **options: Any,
    ) -> None:
        if min(num_blocks, block_size, num_layers) < 1:
            raise InvalidArgumentError("num_blocks, block_size and num_layers must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self.groups = tuple(groups or [KvGroup(tuple(range(num_layers)), 0, block_size)])
        self.host_blocks = host_blocks if storage is not None else 0
        options.setdefault("events", EVENTS)
        self.pool = BlockPool(
            num_blocks,
            block_size=block_size,
            groups=self.groups,
            num_layers=num_layers,
            max_seqs=max_requests,
            **options,
        )
        self._native = self.pool.native
        self._memory = None if memory is None else memory(self.pool)
        self._host = (
            None
            if storage is None or not host_blocks
            else HostTier(storage, host_blocks, host_budget)
        )
        self._disk = disk
        self._requests: dict[int, _Request] = {}
        self._spaces: dict[bytes, int] = {b"": 0}
        self._num_swapped = 0
        self._shadowed: dict[int, _Request] = {}  # by sequence, the oldest first
        self._num_shadow = 0
        self._num_clean = 0

    # Requests

    def admit(
        self, request: int, tokens: NDArray[np.int32], namespace: bytes = b"", reserve: int = 0
    ) -> int:
        """Make a request known; its leading blocks in memory, then those on disk, become its own.

        At least one token is left to compute. Returns the tokens that are not.

        Raises
        ------
        pyruntime.errors.StateError
            The request is known already.
        """
        if request in self._requests:
            raise StateError(f"request {request} is in the pool already")
        space = self._spaces.get(namespace)
        if space is None:
            space = self._spaces[namespace] = self.pool.namespace(namespace)
        self._return_memory(tokens, space)
        seq = self._native.open(space)
        cached = self.pool.admit(seq, tokens, reserve=reserve)
        known = _Request(seq, cached // self.block_size, namespace=namespace)
        self._requests[request] = known
        if self._disk is not None:
            cached = self._restore(known, tokens, cached, self._disk)
        return cached

    def _return_memory(self, tokens: NDArray[np.int32], space: int) -> None:
        """Return what a burst took, when who comes first after it finds little of use there."""
        if self._memory is None or self._requests or not self._memory.exceeded:
            return
        if 2 * self.pool.match(tokens, space=space).tokens < len(tokens):
            self._memory.give_back()

    def _restore(
        self, known: _Request, tokens: NDArray[np.int32], cached: int, disk: DiskCache
    ) -> int:
        """Read the blocks behind the cached ones from disk; return the tokens cached now."""
        have, most = cached // self.block_size, (len(tokens) - 1) // self.block_size
        if have >= most:
            return cached
        keys = disk.keys(known.namespace, tokens[: most * self.block_size])
        wanted = disk.room  # at a time: items are in memory twice until they are in their blocks
        while have < most:
            items = disk.load(keys[have : have + wanted])
            if not len(items):
                break
            end = have + len(items)
            rows = [np.empty((1, end), np.int32) for _ in self.groups]
            seqs, counts = (
                np.array([known.seq], np.uint64),
                np.array([end * self.block_size], np.uint32),
            )
            self._find_memory(NO_SEQS, seqs, counts)
            fitted, _, _ = self._native.step(NO_SEQS, (), seqs, counts, (), 0, rows)
            if not fitted:  # a lone request's blocks fit when the scheduler has admitted it
                break
            known.blocks = known.full = known.saved = end
            disk.place(items, [row[0, have:] for row in rows])
            have = end
            if len(items) < wanted:
                break
        if have * self.block_size > cached:
            cached = have * self.block_size
            self._native.commit(known.seq, cached, self.num_layers, tokens)
        return cached

    def start(self, request: int) -> int:
        """Make a request known whose tokens do not matter; see `pyruntime.sched.KvView`."""
        return 0 if self.knows(request) else self.admit(request, np.empty(0, np.int32))

    def knows(self, request: int) -> bool:
        """Whether the request was admitted and not freed since."""
        return request in self._requests

    def sequence(self, request: int) -> int:
        """Return the number of a request's sequence in `pool`.

        Raises
        ------
        pyruntime.errors.NotFoundError
            The request is not known.
        """
        known = self._requests.get(request)
        if known is None:
            raise NotFoundError(f"request {request} is not in the pool")
        return known.seq

    def commit(
        self,
        request: int,
        tokens: int,
        layers: int,
        ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Note that the first `tokens` tokens, which `ids` begins with, are valid in `layers`."""
        known = self._requests.get(request)
        if known is None:  # cancelled while the step ran
            return
        if layers >= self.num_layers:
            full = tokens // self.block_size
            if self._disk is not None and ids is not None and full > known.full:
                self._save(known, ids[:tokens], self._disk)  # before windows release blocks
            known.full = max(known.full, full)
        self._native.commit(known.seq, tokens, layers, ids)

    def _save(self, known: _Request, tokens: NDArray[np.int32], disk: DiskCache) -> None:
        """Send blocks that became full to disk."""
        full = len(tokens) // self.block_size
        keys = disk.keys(known.namespace, tokens)
        first = max(known.saved, disk.tier.match(keys))
        known.saved = full
        if first >= full:
            return
        rows = [
            self.pool.tables([known.seq], group=g, width=known.blocks)[0, first:full]
            for g in range(len(self.groups))
        ]
        # A window may have released blocks that were never written: what is behind a gap is of no
        # use.
        if all((row >= 0).all() for row in rows):
            known.saved = first + disk.save(keys[first:], rows)

    def close(self) -> None:
        """Write what is on its way to disk, and close its file."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def observe(self, requests: Sequence[int], marks: dict[int, NDArray[np.uint8]]) -> None:
        """Take attention marks: this pool never asks for them."""

    def free(self, request: int) -> None:
        """Return a request's blocks; unknown requests are ignored. Published blocks stay cached."""
        known = self._requests.pop(request, None)
        if known is not None:
            self._leave(known)
            self._native.free(known.seq)

    def _leave(self, known: _Request) -> None:
        """Give back what a request has in other tiers."""
        if self._disk is not None:
            self._disk.drop(known.full - known.saved)
        self._forget(known)
        self._drop_shadow(known)

    # Planning

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that `tokens` tokens fill."""
        return -(-tokens // self.block_size)

    def fits(self, tokens: int) -> bool:
        """Whether a lone sequence of `tokens` tokens could ever fit."""
        return self.blocks_for(tokens) <= self.num_blocks

    def held(self, request: int) -> int:
        """Return the blocks of a request in its largest group; 0 for an unknown one."""
        known = self._requests.get(request)
        if known is None or known.swapped is not None or known.blocks == 0:
            return 0
        rows = (
            self.pool.tables([known.seq], group=g, width=known.blocks)
            for g in range(len(self.groups))
        )
        return max(int((row >= 0).sum()) for row in rows)

    def need(self, request: int, tokens: int) -> int:
        """Return the further blocks `request` needs to hold `tokens`, in the neediest group."""
        known = self._requests.get(request)
        if known is not None and known.swapped is not None:
            return max(self._need_back(known, tokens))
        return max(0, -(-tokens // self.block_size) - (known.blocks if known else 0))

    def _need_back(self, known: _Request, tokens: int) -> list[int]:
        assert known.swapped is not None
        wanted = max(self.blocks_for(tokens), known.blocks)
        return [wanted - (known.blocks - len(kept)) for kept in known.swapped]

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """Return the blocks left after such a step, negative for a deficit; changes nothing.

        Pins count as ended: `step` ends those in its way.
        """
        return min(map(sum, zip(self._left(grow, free), self._obtainable(), strict=True)))

    def _obtainable(self) -> list[int]:
        """Blocks of each group that the pool does not have yet and could have."""
        return [0] * len(self.groups) if self._memory is None else self._memory.obtainable()

    def _left(self, grow: Sequence[tuple[int, int]], free: Sequence[int]) -> list[int]:
        """Blocks of the pool's left after such a step, in each group."""
        seqs, counts, extra = [], [], [0] * len(self.groups)
        for request, tokens in grow:
            known = self._requests.get(request)
            if known is not None and known.swapped is None:
                seqs.append(known.seq)
                counts.append(tokens)
                continue
            whole = [self.blocks_for(tokens)] * len(self.groups)
            for g, n in enumerate(self._need_back(known, tokens) if known else whole):
                extra[g] += n
        frees = [
            known.seq
            for request in dict.fromkeys(free)
            if (known := self._requests.get(request)) is not None and known.swapped is None
        ]
        leaving = set(frees)
        pairs = [(s, n) for s, n in zip(seqs, counts, strict=True) if s not in leaving]
        again = len(seqs) - len(pairs)
        if again:  # freed and grown: as if it were unknown
            for s, n in zip(seqs, counts, strict=True):
                if s in leaving:
                    extra = [have + self.blocks_for(n) for have in extra]
        _, result, _ = self._native.step(
            np.array(frees, np.uint64) if frees else NO_SEQS,
            (),
            np.array([s for s, _ in pairs], np.uint64) if pairs else NO_SEQS,
            np.array([n for _, n in pairs], np.uint32) if pairs else NO_COUNTS,
            (),
            DRY | PINS_END,
            None,
        )
        return [left - n for left, n in zip(result["left"], extra, strict=True)]

    def _find_memory(self, frees: Any, seqs: Any, counts: Any) -> None:
        """Open blocks for a step."""
        if self._memory is not None and any(self._memory.withheld):
            _, result, _ = self._native.step(frees, (), seqs, counts, (), DRY, None)
            self._open(result["need"], result["left"])

    def _open(self, need: Sequence[int], left: Sequence[int]) -> None:
        """Open blocks where more are needed than free, and must be where fewer than none are left.

        What is free includes nothing cached: content is evicted when there is no more memory.
        """
        if self._memory is not None:
            free = [group["free"] for group in self.pool.stats()["groups"]]
            wished = [max(0, n - f) for n, f in zip(need, free, strict=True)]
            self._memory.open(wished, [max(0, -n) for n in left])

    # Steps

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
        requests = self._requests
        growing = []
        for request, _ in grow:
            known = requests.get(request)
            if known is None or request in free:
                raise NotFoundError(f"request {request} is not in the pool; admit it first")
            if request in swap_out:
                raise StateError(f"request {request} cannot grow and be swapped out")
            if known.swapped is not None and request not in swap_in:
                raise StateError(f"request {request} is swapped out; the step must swap it in")
            growing.append(known)
        frees = [request for request in dict.fromkeys(free) if request in requests]
        if swap_out or swap_in:
            self._swap(grow, frees, swap_out, swap_in)
            frees = []
        wanted = [-(-tokens // self.block_size) for _, tokens in grow]
        width = max([1, *wanted, *(known.blocks for known in growing)])
        tables = [np.empty((len(grow), width), np.int32) for _ in self.groups]
        leaving = np.array([requests[r].seq for r in frees], np.uint64) if frees else NO_SEQS
        seqs = np.array([known.seq for known in growing], np.uint64)
        counts = np.array([tokens for _, tokens in grow], np.uint32)
        self._find_memory(leaving, seqs, counts)
        fitted, result, _ = self._native.step(leaving, (), seqs, counts, (), 0, tables)
        if not fitted:
            lacking = -min(result["left"])
            raise CapacityError(f"the step lacks {lacking} KV blocks; preempt or finish a request")
        for request in frees:
            self._leave(requests.pop(request))
        for known, blocks in zip(growing, wanted, strict=True):
            known.blocks = max(known.blocks, blocks)
        made = StepTables(
            [GroupTable(t, self.block_size, np.zeros(len(grow), np.int32)) for t in tables],
            {request: row for row, (request, _) in enumerate(grow)},
        )
        if result["copies"]:
            made.copies = np.array(result["copies"], np.int32)
        return made

    # Swapping

    def can_swap(self, request: int) -> bool:
        """Whether the host has room for the request's blocks."""
        known = self._requests.get(request)
        return (
            known is not None and known.swapped is None and self._total(known) <= self._host_left()
        )

    def _total(self, known: _Request) -> int:
        if known.blocks == 0 or known.swapped is not None:
            return 0
        return sum(
            int((self.pool.tables([known.seq], group=g, width=known.blocks) >= 0).sum())
            for g in range(len(self.groups))
        )

    def _host_left(self, free: Sequence[int] = ()) -> int:
        returning = sum(_held(self._requests[r].swapped) for r in set(free) & set(self._requests))
        return self.host_blocks - self._num_swapped + returning

    def _swap(
        self,
        grow: Sequence[tuple[int, int]],
        frees: Sequence[int],
        swap_out: Sequence[int],
        swap_in: Sequence[int],
    ) -> None:
        """Check that the whole step fits, then free and swap."""
        if not {request for request, _ in grow}.issuperset(swap_in):
            raise StateError("what is swapped in must be in the step")
        leaving = [r for r in dict.fromkeys(swap_out) if r in self._requests]
        if sum(self._total(self._requests[r]) for r in leaving) > self._host_left(frees):
            raise CapacityError("the host tier is full; preempt with recompute instead")
        left = self.dry_run(grow, [*frees, *leaving])
        if left < 0:
            raise CapacityError(f"the step lacks {-left} KV blocks; preempt or finish a request")
        for request in frees:
            self.free(request)
        if self._host is None:
            return
        going = [self._requests[request] for request in leaving]
        self._make_room(going)
        for known in going:
            self._out(known, self._host)
        self._host.finish()  # before anybody gets the blocks
        returning = [self._requests[request] for request in dict.fromkeys(swap_in)]
        self._room_for(returning)
        for known in returning:
            self._back(known, self._host)
        self._host.finish()
        for known in returning:
            self._keep_shadow(known)

    def _room_for(self, returning: Sequence[_Request]) -> None:
        """Open blocks for what is swapped in, or refuse the step before it is."""
        if self._memory is None:  # the step was found to fit
            return
        swapped = [known.swapped for known in returning if known.swapped is not None]
        need = [sum(len(places[g]) for places in swapped) for g in range(len(self.groups))]
        self._open(need, [n - m for n, m in zip(self._left((), ()), need, strict=True)])
        lacking = max(m - n for n, m in zip(self._left((), ()), need, strict=True))
        if lacking > 0:
            raise CapacityError(f"the step lacks {lacking} KV blocks; there is no memory for them")

    def _make_room(self, going: Sequence[_Request]) -> None:
        """Drop the oldest shadows until the host has room for what is to be copied there."""
        again = sum(_held(known.shadow) for known in going)
        copies = sum(map(self._total, going)) - again
        staying = {known.seq for known in going}
        for seq in list(self._shadowed):
            if copies <= self.host_blocks - self._num_swapped - self._num_shadow:
                break
            if seq not in staying:
                self._drop_shadow(self._shadowed[seq])

    def _rows(self, known: _Request) -> list[list[int]]:
        if known.blocks == 0:
            return [[] for _ in self.groups]
        return [
            self.pool.tables([known.seq], group=g, width=known.blocks)[0].tolist()
            for g in range(len(self.groups))
        ]

    def _out(self, known: _Request, host: HostTier) -> None:
        if known.swapped is not None:
            return
        known.swapped = []
        for g, row in enumerate(self._rows(known)):
            there = {i for i, block in enumerate(row) if block >= 0}
            clean = {} if known.shadow is None else known.shadow[g]
            kept = {i: clean.pop(i) for i in there & clean.keys()}
            dirty = sorted(there - kept.keys())
            places = host.out(g, [row[i] for i in dirty])
            known.swapped.append(dict(sorted([*kept.items(), *zip(dirty, places, strict=True)])))
            self._num_clean += len(kept)
            self._num_shadow -= len(kept)
        self._drop_shadow(known)  # a window has left these behind
        self._num_swapped += _held(known.swapped)
        self._native.park(known.seq)

    def _back(self, known: _Request, host: HostTier) -> None:
        if known.swapped is None:
            return
        self._native.unpark(known.seq)
        for g, row in enumerate(self._rows(known)):
            places = known.swapped[g]
            host.back(g, list(places.values()), [row[i] for i in places])

    def _keep_shadow(self, known: _Request) -> None:
        """Let the host keep blocks that cannot change, until it needs their places."""
        if known.swapped is None:
            return
        known.shadow = []
        for places in known.swapped:
            clean = {i: places.pop(i) for i in [i for i in places if i < known.full]}
            known.shadow.append(clean)
            self._num_shadow += len(clean)
            self._num_swapped -= len(clean)
        self._shadowed[known.seq] = known
        self._forget(known)

    def _drop_shadow(self, known: _Request) -> None:
        if known.shadow is not None and self._host is not None:
            for g, places in enumerate(known.shadow):
                self._host.free(g, list(places.values()))
            self._num_shadow -= _held(known.shadow)
            known.shadow = None
            del self._shadowed[known.seq]

    def _forget(self, known: _Request) -> None:
        """Give back what a request has swapped out to the host."""
        if known.swapped is not None and self._host is not None:
            for g, places in enumerate(known.swapped):
                self._host.free(g, list(places.values()))
        self._num_swapped -= _held(known.swapped)
        known.swapped = None

    # Inspection

    @property
    def num_swapped(self) -> int:
        """Blocks on the host, in all groups."""
        return self._num_swapped

    @property
    def num_free(self) -> int:
        """Blocks that are free or could be at once, in the group that has least."""
        return min(n + self._native.available(g) for g, n in enumerate(self._obtainable()))

    @property
    def promised(self) -> int:
        """Blocks reserved by admitted requests and not held yet."""
        return int(self.pool.stats()["promised"])

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens found in memory, so far."""
        return int(self.pool.stats()["hit_tokens"])

    @property
    def asked_tokens(self) -> int:
        """Prompt tokens looked for, so far."""
        return int(self.pool.stats()["asked_tokens"])

    def stats(self) -> dict[str, Any]:
        """Return the pool's counters and gauges, ``swapped`` blocks, and those of other tiers."""
        swaps = {} if self._host is None else self._host.stats()
        disk = {} if self._disk is None else self._disk.stats()
        found = self.pool.stats()
        if self._memory is not None:
            found["memory_bytes"] = self._memory.reserved_bytes
            for group, withheld in zip(found["groups"], self._memory.withheld, strict=True):
                group["withheld"] = withheld
        return {
            **found,
            "swapped": self._num_swapped,
            "swap_clean": self._num_clean,
            **{f"swap_{name}": value for name, value in swaps.items()},
            **{f"disk_{name}": value for name, value in disk.items()},
        }

    def events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the next sequence number and the events from `since` on."""
        following, lost, found = self._native.events(since, EVENTS)
        first = following - len(found)
        if lost:
            return following, [
                {"seq": following - 1, "type": "dropped", "count": lost + len(found)}
            ]
        events: list[dict[str, Any]] = []
        for seq, (kind, reason, key) in enumerate(found, first):
            event: dict[str, Any] = {"seq": seq, "type": "stored", "keys": [key.hex()]}
            if kind == 2:
                event |= {"type": "removed", "reason": REASONS[reason]}
            events.append(event)
        return following, events

    def snapshot(self) -> tuple[int, list[str]]:
        """Return the sequence number of the next event, and the keys of all published blocks."""
        following, keys = self.pool.snapshot()
        return following, [key.hex() for key in keys]

    def check(self) -> None:
        """Raise `CorruptDataError` unless every invariant of the pool holds."""
        self.pool.check()


def _held(swapped: list[dict[int, Any]] | None) -> int:
    return sum(map(len, swapped)) if swapped is not None else 0
