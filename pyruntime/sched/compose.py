"""Policies as compositions of parts, the presets, and what the scheduler asks of a KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pyruntime.errors import NotFoundError
from pyruntime.sched.parts import (
    Admission,
    Batching,
    ChunkedPrefill,
    Fairness,
    Fcfs,
    LayeredPrefill,
    Ordering,
    Partition,
    Preemption,
    PromptFits,
    TailRecompute,
    TailSwap,
)

__all__ = ["PRESETS", "Explanation", "KvView", "Policy", "preset"]


class KvView(Protocol):
    """What the scheduler asks of a KV pool; it names requests, never blocks."""

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """Return the blocks left after such a step, negative for a deficit; changes nothing."""
        ...

    def need(self, request: int, tokens: int) -> int:
        """Return the further blocks `request` needs to hold `tokens`."""
        ...

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` can ever fit."""
        ...

    def start(self, request: int) -> int:
        """Make a request that leaves the queue known; return its tokens in memory already."""
        ...

    def can_swap(self, request: int) -> bool:
        """Whether the request's blocks could move to a lower tier now."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...


@dataclass
class Policy:
    """A composition of parts."""

    name: str = "fcfs"
    ordering: Ordering = field(default_factory=Fcfs)
    admission: Admission = field(default_factory=PromptFits)
    partition: Partition = field(default_factory=ChunkedPrefill)
    preemption: Preemption = field(default_factory=TailRecompute)
    fairness: Fairness | None = None
    batching: Batching | None = None


def _fcfs() -> Policy:
    return Policy("fcfs")


def _layered() -> Policy:
    return Policy("layered", partition=LayeredPrefill())


def _swap() -> Policy:
    return Policy("swap", preemption=TailSwap())


PRESETS = {"fcfs": _fcfs, "layered": _layered, "swap": _swap}


def preset(name: str) -> Policy:
    """Make a preset policy.

    Parameters
    ----------
    name : {"fcfs", "layered", "swap"}
        ``fcfs`` is first come first served with chunked prefill; ``layered`` cuts long prefills
        along layers instead, chosen per batch; ``swap`` is ``fcfs`` that keeps what it preempts in
        a lower tier instead of computing it anew.

    Raises
    ------
    pyruntime.errors.NotFoundError
        There is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise NotFoundError(f"no policy {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


@dataclass(frozen=True)
class Explanation:
    """Why a request is where it is."""

    state: str
    reason: str
    """"running", or kv_full, max_running, budget, window, isolation, tenant_turn, or behind."""
    behind: int | None
    """The request it waits behind, if any."""
    since: float
    position: int
    """Place in the queue, from 0; -1 when it does not wait."""
