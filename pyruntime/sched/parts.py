"""Parts a policy is composed of: small interfaces, each with a null default.

A part is a pure function of what it is shown; the core (`pyruntime.sched.core`) alone changes
state, so no part can oversubscribe KV memory or lose a request. A part that raises or returns
nonsense is replaced by its null default for that decision and counted.

=============  ======================================================  ===========================
part           decides                                                 null default
=============  ======================================================  ===========================
Ordering       which waiting request is next                           arrival, within priority
Fairness       which tenant's turn it is, over Ordering                none: all tenants in one row
Admission      whether a waiting request may start now                 prompt and one token fit
Partition      how prefills are cut along tokens and layers            chunks of a token budget
Batching       whether to dispatch prefill work now                    at once
Preemption     who gives way when KV memory runs out                   last admitted, recompute
=============  ======================================================  ===========================

Prediction, retention of a program's KV between turns and turn control join with the first policy
that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pyruntime.sched.model import Request, Resources
from pyruntime.sched.plan import Piece, Preempt

__all__ = [
    "Admission",
    "Batching",
    "ChunkedPrefill",
    "Fairness",
    "Fcfs",
    "LayeredPrefill",
    "Ordering",
    "Partition",
    "Preemption",
    "PromptFits",
    "TailRecompute",
    "TailSwap",
]

Next = Callable[[int], Request | None]
"""Admits and returns the next waiting request, or None; its argument is the tokens at hand."""


class Ordering(Protocol):
    """Orders the waiting requests; the key is computed once, on arrival or requeueing."""

    def key(self, request: Request) -> tuple[float, ...]:
        """Return a sortable key; the smallest goes first."""
        ...


class Fairness(Protocol):
    """Chooses among tenants before Ordering chooses within one."""

    def pick(self, tenants: Sequence[str]) -> str:
        """Return the tenant whose turn it is."""
        ...

    def charge(self, tenant: str, prefill: int, decode: int) -> None:
        """Account for tokens that were served."""
        ...


class Admission(Protocol):
    """Says whether a waiting request may start."""

    def refuse(self, request: Request, running: Sequence[Request], free_tokens: int) -> str:
        """Return "" to admit, else the reason; `free_tokens` fit in unpromised KV memory."""
        ...


class Partition(Protocol):
    """Cuts prefills into the pieces of a step."""

    def cut(
        self, prefilling: Sequence[Request], num_decode: int, limits: Resources, take: Next
    ) -> list[Piece]:
        """Return this step's pieces; call `take` for as long as more prefills are wanted."""
        ...


class Batching(Protocol):
    """Holds prefill work back to form better batches."""

    def ready(self, waiting: int, oldest_s: float) -> bool:
        """Whether to dispatch now; a batching policy promises a bound on what it holds back."""
        ...


class Preemption(Protocol):
    """Chooses who gives way, and how it continues.

    With mode `Preempt.SWAP` its blocks move to a lower tier where that has room; where it has not,
    the request is recomputed.
    """

    mode: Preempt

    def victim(self, running: Sequence[Request]) -> Request:
        """Return one of `running`, which is in order of admission and has at least two members."""
        ...


class Fcfs:
    """First come, first served within a priority; higher priority first."""

    def key(self, request: Request) -> tuple[float, ...]:
        """See `Ordering`."""
        return (-request.priority, request.arrival, request.id)


class PromptFits:
    """Admit when all known tokens and one more fit beside a reserve of 1 %.

    Output is not reserved: when it outgrows the memory, `TailRecompute` makes room.
    """

    def refuse(self, request: Request, running: Sequence[Request], free_tokens: int) -> str:
        """See `Admission`."""
        return "" if request.known + 1 <= free_tokens or not running else "kv_full"


class TailRecompute:
    """The last admitted request of the lowest priority gives way and is recomputed later."""

    mode = Preempt.RECOMPUTE

    def victim(self, running: Sequence[Request]) -> Request:
        """See `Preemption`."""
        return min(reversed(running), key=lambda request: request.priority)


class TailSwap(TailRecompute):
    """The same one gives way, but its keys and values are kept in a lower tier."""

    mode = Preempt.SWAP


class ChunkedPrefill:
    """Prefill in chunks beside the decodes, within a budget of tokens per step.

    Parameters
    ----------
    budget : int, default 512
        Token rows per step, decodes included; at least one prefill token is always taken.

    References
    ----------
    Agrawal et al., Sarathi-Serve (OSDI 2024), section 4.
    """

    def __init__(self, budget: int = 512) -> None:
        self.budget = budget

    def cut(
        self, prefilling: Sequence[Request], num_decode: int, limits: Resources, take: Next
    ) -> list[Piece]:
        """See `Partition`."""
        left = max(1, self.budget - num_decode)
        pieces: list[Piece] = []

        def add(request: Request) -> None:
            nonlocal left
            high = min(request.known, request.computed + left)
            pieces.append((request.id, request.computed, high, 0, limits.num_layers))
            left -= high - request.computed

        for request in prefilling:
            if left > 0:
                add(request)
        while left > 0 and (taken := take(left)) is not None:
            add(taken)
        return pieces


class LayeredPrefill:
    """Prefill whole prompts, a group of layers per step, beside decodes in all layers.

    Every expert's weights are then loaded once per group for the whole prompt instead of once per
    chunk. The batch is cut into as many layer groups as keep a step near `target` token rows. It
    pays for long prompts only, so it is chosen per batch: below `min_tokens` in all, prompts go
    in chunks.

    Parameters
    ----------
    target : int, default 512
        Token rows through all layers that a step's work should equal.
    max_tokens : int, default 8192
        Prompt tokens per batch; the first prompt is cut along tokens if it alone is longer.
    min_tokens : int, default 1024

    References
    ----------
    From Tokens to Layers (arXiv 2510.08055), section 4. The table of group counts is replaced by
    ``ceil(tokens / target)``, which agrees with it at its powers of two.
    """

    def __init__(self, target: int = 512, max_tokens: int = 8192, min_tokens: int = 1024) -> None:
        self.target = target
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self._chunks = ChunkedPrefill(target)

    def cut(
        self, prefilling: Sequence[Request], num_decode: int, limits: Resources, take: Next
    ) -> list[Piece]:
        """See `Partition`."""
        batch = [request for request in prefilling if request.layer_done]
        if batch:  # in flight: nothing joins until its last group is done
            return [self._next(request, limits) for request in batch]
        batch = list(prefilling)
        most = min(self.max_tokens, limits.hidden_tokens)
        if most < self.min_tokens:  # no room for the hidden states between slices
            return self._chunks.cut(batch, num_decode, limits, take)
        total = sum(request.to_prefill for request in batch)
        while total < most and (taken := take(most - total)) is not None:
            batch.append(taken)
            total += taken.to_prefill
        if total < self.min_tokens:
            return self._chunks.cut(batch, num_decode, limits, lambda _: None)
        pieces = []
        left = most
        groups = min(limits.num_layers, -(-min(total, left) // self.target))
        for request in batch:
            if left <= 0:
                break
            request.layers_per_slice = -(-limits.num_layers // groups)
            request.slice_hi = min(request.known, request.computed + left)
            left -= request.slice_hi - request.computed
            pieces.append(self._next(request, limits))
        return pieces

    @staticmethod
    def _next(request: Request, limits: Resources) -> Piece:
        high = min(limits.num_layers, request.layer_done + request.layers_per_slice)
        return (request.id, request.computed, request.slice_hi, request.layer_done, high)
