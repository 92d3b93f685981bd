"""What a scheduler knows: requests, their states, and the resources of one engine."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

__all__ = ["Request", "Resources", "State"]


class State(enum.Enum):
    """Where a request is in its life; the last four are final."""

    QUEUED = "queued"
    PREFILL = "prefill"
    PAUSED = "paused"
    DECODE = "decode"
    SWAPPED = "swapped"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REJECTED = "rejected"

    @property
    def final(self) -> bool:
        """Whether the request's life is over."""
        return self in _FINAL


_FINAL = {State.FINISHED, State.CANCELLED, State.FAILED, State.REJECTED}


@dataclass(slots=True, eq=False)
class Request:
    """A request as the scheduler sees it: lengths and limits, never tokens.

    `known` counts prompt and generated tokens, `computed` those whose keys and values are complete
    in all layers. In between, `layer_done` layers of the tokens ``[computed, slice_hi)`` are done.
    """

    id: int
    prompt_len: int
    max_new: int
    arrival: float = 0.0
    priority: int = 0
    tenant: str = ""
    program: str = ""
    last_turn: bool = True
    tool: str = ""
    slo_class: str = ""
    ttft_deadline: float = math.inf
    deadline: float = math.inf
    cached_len: int = 0
    state: State = State.QUEUED
    known: int = 0
    computed: int = 0
    layer_done: int = 0
    slice_hi: int = 0
    layers_per_slice: int = 0
    swapped: bool = False
    """Whether the pool keeps its blocks in a lower tier."""
    num_preempted: int = 0
    bypassed: int = 0
    unfit_since: float = math.inf
    wait_reason: str = ""
    wait_since: float = 0.0
    order: int = 0
    """Position in the order of admission; preemption takes from its end."""

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.known - self.prompt_len

    @property
    def to_prefill(self) -> int:
        """Tokens that have to be computed before the next one can be sampled."""
        return self.known - self.computed


@dataclass(frozen=True, slots=True)
class Resources:
    """Limits of one engine."""

    num_layers: int
    max_len: int
    """Longest sequence, prompt and output, in tokens."""
    max_running: int = 64
    max_queued: int = 1024
    hidden_tokens: int = 8192
    """Tokens whose hidden states may wait between layer slices."""
