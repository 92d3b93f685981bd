"""What goes into a step and comes out of it: pieces, results, rows, and what lies between steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.sampling import SamplingParams
from pyruntime.sched import StepPlan

__all__ = [
    "OPERATORS",
    "ExpertBackend",
    "Hidden",
    "Piece",
    "Rows",
    "Sequence",
    "StepResult",
    "add_time",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

OPERATORS = ("qkv", "rope", "attention", "output", "router", "experts")
"""The operators of a layer, in order; then, after the last layer, "logits"."""


class ExpertBackend(Protocol):
    """See `pyruntime.moe`."""

    def ffn(
        self, layer: int, x: Floats, ids: Ints, weights: Floats, out: Floats
    ) -> NDArray[np.uint8]:
        """Compute the experts of one layer."""
        ...

    def hint(self, layer: int, x: Floats) -> None:
        """Announce that hidden states `x`, a layer early, will reach `layer`."""
        ...

    def begin_step(self, plan: StepPlan) -> None:
        """Announce a step."""
        ...

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of `layer`."""
        ...

    def stats(self) -> dict[str, int]:
        """Return cumulative counters."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """How far a request's part of a step has come."""

    request: int
    token: int
    """Tokens whose part of the step is complete once `layer` and `operator` say so."""
    layer: int
    operator: str
    """Next operator; "" when the piece is done."""


@dataclass(slots=True)
class StepResult:
    """What a step did."""

    plan_id: int
    stopped: bool
    """Whether the stop flag ended the run before the plan was done."""
    reached: list[Piece]
    requests: list[int]
    """Requests that sampled, in the order of the arrays below."""
    sampled: ops.SampleResult | None
    failed: dict[int, str] = field(default_factory=dict)
    """Requests that cannot go on, and why; they are not in `requests`."""
    degraded: dict[int, int] = field(default_factory=dict)
    """Tokens of a request that were computed at a lower width because of damaged planes."""
    status: dict[int, str] = field(default_factory=dict)
    """Every request of the plan: "sampled", "advanced" (its piece ends before the last token or
    layer), "failed", or "stopped"."""
    marks: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """If the tables asked: KV group to [requests of the plan, slots], 1 where in any layer of the
    group any head of any of the request's queries gave a slot more than `alpha`."""
    logits: Floats | None = None
    """[len(requests), vocab], if asked for."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by stage: attention, experts, dense, sampling."""
    expert_tokens: NDArray[np.int64] | None = None
    """[layers, experts]: tokens routed."""
    expert_bytes: NDArray[np.int64] | None = None
    """[layers]: weight bytes of the experts that were used."""
    device: str = "cpu"
    stream: int = 0


class Sequence:
    """Tokens of one request, in a buffer that doubles."""

    __slots__ = ("params", "prompt_len", "row", "size", "tokens")

    def __init__(self, prompt: Ints, params: SamplingParams) -> None:
        self.tokens = np.empty(max(64, 2 * len(prompt)), np.int32)
        self.tokens[: len(prompt)] = prompt
        self.size = self.prompt_len = len(prompt)
        self.params = params
        self.row = params.row()

    def append(self, token: int) -> None:
        """Add a generated token."""
        if self.size == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self.size] = token
        self.size += 1


@dataclass(slots=True)
class Hidden:
    """Hidden states of tokens [low, high) that `layer` layers have been through."""

    low: int
    high: int
    layer: int
    x: Floats


@dataclass(slots=True)
class GroupRows:
    """Where the rows of a step live in one KV group."""

    tables: Ints
    slots: NDArray[np.int64]
    visible: Ints


@dataclass(slots=True)
class Rows:
    """The token rows of a step: decodes first, then the pieces in order."""

    requests: list[int]
    starts: Ints  # first row of each piece, and the end
    layer_lo: Ints
    layer_hi: Ints
    row_piece: Ints
    positions: Ints
    table_rows: Ints
    groups: list[GroupRows]
    alpha: float | None = None


def add_time(seconds: dict[str, float], stage: str, since: float) -> float:
    """Count the time since `since` for `stage`; return now."""
    now = time.perf_counter()
    seconds[stage] = seconds.get(stage, 0.0) + now - since
    return now
