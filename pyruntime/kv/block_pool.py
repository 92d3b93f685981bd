"""The KV block pool: paged allocation, exact prefix sharing and step transactions, natively.

Sequences are int handles; namespaces are small ints. Tokens are int32 arrays, taken as they are
where they are contiguous; a list of 2048 ints costs more to convert than its whole admission.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyruntime._ext import _kv
from pyruntime.errors import InvalidArgumentError
from pyruntime.kv.batch import Batch
from pyruntime.kv.records import REASONS, Admission, Copy, Event, Match, StepOutcome, as_tokens
from pyruntime.kv.tables import KvGroup
from pyruntime.policy import callback_address

__all__ = ["BlockPool"]

Ints = npt.NDArray[np.int32]
POLICIES = {"lru": 0, "slru": 1, "score": 2}
KINDS = {1: "stored", 2: "removed", 3: "cleared"}

DRY, PREFIX, PROMISES, PINS_END = _kv.DRY, _kv.PREFIX, _kv.PROMISES, _kv.PINS_END
NO_SEQS = np.empty(0, np.uint64)
NO_COUNTS = np.empty(0, np.uint32)


class BlockPool:
    """Blocks of KV memory, the tables of sequences, and what is cached between them.

    Parameters
    ----------
    num_blocks : int or sequence of int
        Of each group.
    block_size : int, default 16
        Tokens per block (1..1024).
    groups : sequence of KvGroup, optional
        Layers that attend alike; one with full attention by default.
    num_layers : int, default 1
        Layers in which a token must be valid to be shared.
    max_seqs : int, default 1024
        Sequences open at a time.
    max_blocks : int, optional
        Blocks of one sequence; as many as the largest group has by default.
    run_blocks : int, default 16
        Blocks an allocation tries to get in one run; 1 keeps no room behind sequences.
    policy : {"lru", "slru"}
        Order of eviction; `set_policy` changes it, to a function too.
    sharing : bool, default True
        Whether anything is published.
    events : int, default 0
        Events kept; 0 makes none.
    extra_nodes : int, default 0
        Content that lower tiers may hold beyond the blocks.
    seed : int, default 0
        Of the index's hash; 0 is random. Results do not depend on it.
    secret : bytes, default b""
        The deployment's, for the export keys of events: `export_keys` computes the same.

    Notes
    -----
    One thread at a time; calls hold the GIL, so Python threads may share a pool. Metadata take
    about 200 B per block of 16 tokens, tokens included, as they are first used.

    References
    ----------
    PagedAttention: Kwon et al., SOSP 2023. Runs with soft reservations: FastSwitch, arXiv
    2411.18424. Planned lifetimes: BatchLLM, arXiv 2412.03594.

    Examples
    --------
    >>> pool = BlockPool(64)
    >>> prompt = np.arange(40, dtype=np.int32)
    >>> [(seq, cached)] = pool.step(admissions=[Admission(prompt)]).admitted
    >>> pool.commit(seq, 40, ids=prompt)
    >>> pool.match(prompt).tokens
    32
    >>> pool.free(seq)
    >>> pool.available()
    64
    """

    def __init__(
        self,
        num_blocks: int | Sequence[int],
        *,
        block_size: int = 16,
        groups: Sequence[KvGroup] | None = None,
        num_layers: int = 1,
        max_seqs: int = 1024,
        max_blocks: int | None = None,
        run_blocks: int = 16,
        policy: str = "lru",
        sharing: bool = True,
        events: int = 0,
        extra_nodes: int = 0,
        seed: int = 0,
        secret: bytes = b"",
    ) -> None:
        given = tuple(groups or [KvGroup(tuple(range(num_layers)), 0, block_size)])
        counts = [num_blocks] * len(given) if isinstance(num_blocks, int) else list(num_blocks)
        if len(counts) != len(given):
            raise InvalidArgumentError(
                f"num_blocks has {len(counts)} values for {len(given)} groups"
            )
        if any(group.block_size != block_size for group in given):
            raise InvalidArgumentError("all groups must have the pool's block_size")
        for name, value in (
            ("block_size", block_size),
            ("num_layers", num_layers),
            ("max_seqs", max_seqs),
            ("max_blocks", max_blocks or 0),
            ("run_blocks", run_blocks),
            ("events", events),
            ("extra_nodes", extra_nodes),
            *(("num_blocks", count) for count in counts),
            *(("window", group.window) for group in given),
        ):
            if not 0 <= value < 1 << 32:
                raise InvalidArgumentError(f"{name} is {value}; it must be in 0..2**32-1")
        self.groups = given
        self.num_blocks = tuple(counts)
        self.block_size = block_size
        self.num_layers = num_layers
        self.native = _kv.Pool(
            [(count, group.window) for count, group in zip(counts, given, strict=True)],
            block_size,
            num_layers,
            max_seqs,
            max_blocks or 0,
            extra_nodes,
            run_blocks,
            events,
            sharing,
            seed & (2**64 - 1),
            secret,
        )
        if policy != "lru":
            self.set_policy(policy)

    # Namespaces and sequences

    def namespace(self, salt: bytes) -> int:
        """Return the namespace of a salt; equal salts have the same, ``b""`` has 0.

        Raises
        ------
        pyruntime.errors.CapacityError
            There is no node for another.
        """
        return self.native.space(salt)

    def open(self, space: int = 0) -> int:
        """Return a new, empty sequence.

        Raises
        ------
        pyruntime.errors.CapacityError
            `max_seqs` are open.
        pyruntime.errors.NotFoundError
            There is no such namespace.
        """
        return self.native.open(space)

    def admit(self, seq: int, tokens: npt.ArrayLike, *, reserve: int = 0) -> int:
        """Give an empty sequence the leading blocks of its prompt that are in memory.

        Parameters
        ----------
        seq : int
        tokens : array_like of int32, shape (n,)
        reserve : int, default 0
            Tokens that count as promised from now on.

        Returns
        -------
        int
            Tokens it holds now; always fewer than n.

        Raises
        ------
        pyruntime.errors.StateError
            It is no sequence of this pool, or not empty.
        """
        return self.native.admit(seq, as_tokens(tokens), reserve)

    def fork(self, seq: int, *, published_only: bool = False) -> int:
        """Return a sequence with the same valid tokens in the same blocks.

        Whoever writes a partial block that both hold copies it first: `StepOutcome.copies`. With
        `published_only` the new one is a pin: it keeps published blocks from eviction.
        """
        return self.native.fork(seq, published_only)

    def free(self, *seqs: int) -> None:
        """End sequences, all or none; what they published stays cached.

        Raises
        ------
        pyruntime.errors.StateError
            One is none, has ended, or is given twice; nothing has changed.
        """
        if len(seqs) == 1:
            self.native.free(seqs[0])
        else:
            self.native.free_many(np.array(seqs, np.uint64))

    def trim(self, seq: int, tokens: int) -> None:
        """Leave the first `tokens` tokens: rejected drafts go.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            It holds fewer, or a window or mask has given up what the next token needs; never for
            tokens that were not committed.
        """
        self.native.trim(seq, tokens)

    def commit(
        self,
        seq: int,
        tokens: int,
        *,
        layers: int | None = None,
        ids: npt.ArrayLike | None = None,
    ) -> None:
        """Note that the first `tokens` tokens are valid in `layers` layers, by default in all.

        Full blocks that are valid in all layers and whose tokens are known are published, and
        windows release what they left behind.

        Parameters
        ----------
        seq, tokens : int
        layers : int, optional
        ids : array_like of int32, shape (n,), optional
            Begins with the sequence's tokens. What nobody told is never published.
        """
        self.native.commit(
            seq,
            tokens,
            self.num_layers if layers is None else layers,
            None if ids is None else as_tokens(ids),
        )

    def plan(self, seq: int, tokens: int, uses: int) -> None:
        """Keep published blocks of the first `tokens` for so many further sequences.

        They are not evicted until `uses` sequences beside this one held and released them, and go
        first then. 0 ends the plan.
        """
        self.native.plan(seq, tokens, uses)

    def mask(
        self, seq: int, keep: npt.ArrayLike, *, pack: bool = False
    ) -> tuple[int, npt.NDArray[np.int64]]:
        """Drop tokens inside a sequence whose tokens are all valid.

        Parameters
        ----------
        seq : int
        keep : array_like of bool, shape (tokens held,)
        pack : bool, default False
            Move kept tokens together, from the first dropped one on; otherwise only blocks without
            a kept token are released, and leave holes.

        Returns
        -------
        held : int
            Tokens it holds now.
        moves : ndarray of int64, shape (n, 3)
            Rows (group, from slot, to slot), slot = block * block_size + offset; to be done in all
            layers of the group before the next step, all read before any is written.

        Raises
        ------
        pyruntime.errors.CapacityError
            Packing needs blocks: shared ones are not overwritten.
        pyruntime.errors.UnsupportedError
            Packing behind a sliding window.
        """
        kept = np.ascontiguousarray(keep, np.bool_)
        words = np.zeros(len(kept) // 64 + 1, np.uint64)
        bits = np.packbits(kept, bitorder="little")
        words.view(np.uint8)[: len(bits)] = bits
        held, moves = self.native.mask(seq, words, len(kept), pack)
        return held, np.array(moves, np.int64).reshape(-1, 3)

    def park(self, seq: int) -> None:
        """Swap a sequence out: it gives up all blocks and keeps its lengths."""
        self.native.park(seq)

    def unpark(self, seq: int) -> None:
        """Give a swapped-out sequence blocks again, private ones in the same entries.

        Raises
        ------
        pyruntime.errors.CapacityError
            There are not enough; nothing has changed.
        """
        self.native.unpark(seq)

    def info(self, seq: int) -> dict[str, Any]:
        """Return a sequence's ``blocks``, ``held``, ``valid`` and ``published``, and more."""
        return self.native.info(seq)

    def match(self, tokens: npt.ArrayLike, *, space: int = 0) -> Match:
        """Say how much of a prompt is in memory; nothing changes."""
        blocks, lower = self.native.match(space, as_tokens(tokens))
        return Match(blocks * self.block_size, lower * self.block_size)

    # Steps

    def step(
        self,
        *,
        frees: Sequence[int] | npt.NDArray[np.uint64] = (),
        trims: Sequence[tuple[int, int]] = (),
        grows: Sequence[tuple[int, int]] = (),
        admissions: Sequence[Admission] = (),
        prefix: bool = False,
        promises: bool = False,
        dry: bool = False,
        tables: Sequence[Ints] | None = None,
    ) -> StepOutcome:
        """Free, trim, grow and admit in one transaction.

        Parameters
        ----------
        frees : sequence of int
        trims : sequence of (int, int)
            Sequence, and tokens to leave.
        grows : sequence of (int, int)
            Sequence, and tokens to hold; in order of priority.
        admissions : sequence of Admission
            New sequences, behind all others.
        prefix : bool, default False
            Grow and admit as many as fit, in order; otherwise all or nothing.
        promises : bool, default False
            Admissions leave room for what others were promised.
        dry : bool, default False
            Change nothing.
        tables : sequence of ndarray of int32, shape (rows, width), optional
            Per group: rows of what was grown, then of what was admitted, are written; -1 behind the
            last entry.

        Returns
        -------
        StepOutcome
            Not `fitted`: nothing has changed, unless `prefix`.

        Raises
        ------
        pyruntime.errors.StateError
            A handle is none, twice in a list, freed and grown, or swapped out.
        pyruntime.errors.InvalidArgumentError
            A trim beyond what is held; a table too narrow.

        Notes
        -----
        One native call, O(rows + blocks that change).
        """
        given = []
        for a in admissions:
            tokens = as_tokens(a.tokens)
            given.append((a.space, tokens, len(tokens) if a.room is None else a.room, a.reserve))
        fitted, result, admitted = self.native.step(
            np.asarray(frees, np.uint64) if len(frees) else None,
            trims,
            grows,
            None,
            given,
            DRY * dry | PREFIX * prefix | PROMISES * promises,
            tables,
        )
        return StepOutcome(
            fitted,
            result["never_fits"],
            result["num_grown"],
            admitted,
            result["left"],
            result["need"],
            [Copy(*copy) for copy in result["copies"]] if result["copies"] else [],
            result["evictions"],
        )

    def batch(
        self,
        seqs: Sequence[int] | npt.NDArray[np.uint64],
        *,
        tables: Sequence[Ints] | None = None,
        slots: Sequence[Ints] | None = None,
        lengths: Ints | None = None,
    ) -> Batch:
        """Prepare a decode batch; see `Batch`."""
        return Batch(self, seqs, tables=tables, slots=slots, lengths=lengths)

    def tables(self, seqs: Sequence[int], *, group: int = 0, width: int | None = None) -> Ints:
        """Return the tables of sequences, int32 (rows, width), -1 behind the last entry."""
        handles = np.array(seqs, np.uint64)
        if width is None:
            width = max([1, *(self.native.info(seq)["blocks"] for seq in seqs)])
        out = np.empty((len(handles), width), np.int32)
        self.native.tables(group, handles, out)
        return out

    # Content

    def set_policy(self, policy: str, score: Any = None) -> None:
        """Set the order of eviction.

        Parameters
        ----------
        policy : {"lru", "slru", "score"}
        score : numba cfunc, ctypes function pointer or address, optional
            ``void (const pyrt_kv_candidate*, int64_t n, double* scores, void*)``: writes a score
            for every candidate, of which there are at most 64, oldest first; the lowest go first,
            NaN before all. Kept alive. One that leaves a score unwritten is switched off.
        """
        if policy not in POLICIES:
            raise InvalidArgumentError(f"policy is {policy!r}; it must be one of {list(POLICIES)}")
        if (score is not None) != (policy == "score"):
            raise InvalidArgumentError("policy 'score', and only that one, takes a function")
        address = 0 if score is None else callback_address(score)
        self.native.set_policy(POLICIES[policy], address, 0, score)

    def clear(self) -> None:
        """Forget all content that no sequence holds."""
        self.native.clear()

    def pin_blocks(self, blocks: npt.ArrayLike, *, group: int = 0) -> None:
        """Hold blocks still: neither evicted nor reused, whoever frees them."""
        self.native.pin_blocks(group, np.ascontiguousarray(blocks, np.uint32))

    def unpin_blocks(self, blocks: npt.ArrayLike, *, group: int = 0) -> None:
        """Undo `pin_blocks`, once per time a block was pinned."""
        self.native.unpin_blocks(group, np.ascontiguousarray(blocks, np.uint32))

    def take_blocks(self, num_blocks: int, *, group: int = 0) -> npt.NDArray[np.uint32]:
        """Take blocks out of the pool, evicting if need be; `unpin_blocks` gives them back.

        Returns
        -------
        ndarray of uint32, shape (num_blocks,)
            Their ids; the lowest first where nothing was handed out yet.

        Raises
        ------
        pyruntime.errors.CapacityError
            There are fewer; none was taken.
        """
        blocks = np.empty(num_blocks, np.uint32)
        self.native.take_blocks(group, blocks)
        return blocks

    def events(self, since: int, *, most: int = 65536) -> tuple[int, list[Event]]:
        """Return the number to go on with, and the events from number `since` on.

        Where some of them are gone, the first one is ``dropped``: take a `snapshot`.
        """
        following, lost, found = self.native.events(since, most)
        first = following - len(found)
        events = [Event(first - 1, "dropped", "", b"")] if lost else []
        for number, (kind, reason, key) in enumerate(found, first):
            why = REASONS[reason] if kind == 2 else ""
            events.append(Event(number, KINDS[kind], why, key))
        return following, events

    def snapshot(self) -> tuple[int, list[bytes]]:
        """Return the number of the next event, and the keys of all content announced."""
        return self.native.events_snapshot()

    # Inspection

    def available(self, *, group: int = 0) -> int:
        """Return the blocks a step could have: free, kept as room, or cached."""
        return self.native.available(group)

    def stats(self) -> dict[str, Any]:
        """Return cumulative counters and gauges; see ``pyrt_kv_statistics``."""
        return self.native.statistics()

    def picture(self, *, group: int = 0, width: int = 64, rows: int = 8) -> str:
        """Draw a group: each sign stands for as many blocks, by what most of them are.

        ``.`` free, ``-`` room behind a sequence, ``c`` cached, ``o`` held, ``S`` shared, ``#``
        pinned.
        """
        if width < 1 or rows < 1:
            raise InvalidArgumentError("width and rows must be positive")
        signs = self.native.picture(group, width * rows)
        return "\n".join(signs[at : at + width] for at in range(0, len(signs), width))

    def check(self) -> None:
        """Walk every invariant. After a failure nothing is found or published any more.

        Raises
        ------
        pyruntime.errors.CorruptDataError
            One does not hold: a bug.
        """
        self.native.check()

    def state_hash(self) -> int:
        """Return a hash of everything observable, the eviction order included."""
        return self.native.state_hash()

    def __repr__(self) -> str:
        stats = self.stats()
        parts = ", ".join(
            f"{g['free'] + g['reserved']} free, {g['cached']} cached of {g['num_blocks']}"
            for g in stats["groups"]
        )
        return f"<BlockPool: {parts}; {stats['open_seqs']} sequences>"
