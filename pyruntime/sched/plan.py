"""The step plan: the scheduler's only output and the engine's only order.

Contract
--------
A plan names requests, never blocks. It is made of flat int32 arrays, so that a native engine reads
it without Python objects:

- ``decode``: requests that advance by one token, through all layers.
- ``prefill``: rows (request, token_lo, token_hi, layer_lo, layer_hi). Cut along tokens it is
  chunked prefill, along layers layered prefill; both cuts may be combined. A piece whose
  ``layer_hi`` is the model's layer count completes its tokens; if it also reaches the request's
  last known token, the step samples the next one.
- ``preempt``: rows (request, mode of `Preempt`), before the step: its blocks are freed, or kept
  elsewhere if it is in ``swap_out`` too.
- ``swap_out``, ``swap_in``, ``pin``, ``unpin``: requests for the KV pool, before the step. What is
  swapped in also computes in the step.
- ``kv_after``: rows (request, tokens): what each request of the plan holds once the step is done.

Order of a step: ``pool.dry_run`` → the policy picks victims → plan → ``pool.step(plan)`` →
``engine.run(plan, tables, stop)`` → ``pool.commit(request, tokens, layers)`` →
``scheduler.step_done(result)``. A plan is atomic: when `run` raises, nothing has advanced, and the
same plan may be run again.

The arrays live on `device`, ordered after the work of `stream`; here the host's: ``"cpu"`` and 0.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Piece", "Preempt", "StepPlan", "make_plan"]

Ints = NDArray[np.int32]
Piece = tuple[int, int, int, int, int]


class Preempt(enum.IntEnum):
    """How a preempted request continues."""

    RECOMPUTE = 0
    SWAP = 1
    PAUSE = 2


def _none() -> Ints:
    return np.empty(0, np.int32)


def _no_rows() -> Ints:
    return np.empty((0, 2), np.int32)


@dataclass(slots=True)
class StepPlan:
    """One step; see the module's page for the arrays."""

    id: int
    decode: Ints
    prefill: Ints
    kv_after: Ints
    preempt: Ints = field(default_factory=_no_rows)
    swap_out: Ints = field(default_factory=_none)
    swap_in: Ints = field(default_factory=_none)
    pin: Ints = field(default_factory=_none)
    unpin: Ints = field(default_factory=_none)
    preemptible: bool = False
    est_seconds: float = 0.0
    device: str = "cpu"
    stream: int = 0

    @property
    def num_tokens(self) -> int:
        """Token rows of the step: decodes plus the tokens of every prefill piece."""
        return len(self.decode) + int((self.prefill[:, 2] - self.prefill[:, 1]).sum())

    def requests(self) -> list[int]:
        """Return the requests that compute in this step, decodes first."""
        return [*self.decode.tolist(), *self.prefill[:, 0].tolist()]


def make_plan(
    plan_id: int,
    decode: Sequence[int],
    prefill: Sequence[Piece],
    kv_after: Sequence[tuple[int, int]],
    preempt: Sequence[tuple[int, int]] = (),
    preemptible: bool = False,
    swap_out: Sequence[int] = (),
    swap_in: Sequence[int] = (),
) -> StepPlan:
    """Pack lists into a plan's arrays."""
    return StepPlan(
        plan_id,
        np.array(decode, np.int32),
        np.array(prefill, np.int32).reshape(-1, 5),
        np.array(kv_after, np.int32).reshape(-1, 2),
        np.array(preempt, np.int32).reshape(-1, 2),
        swap_out=np.array(swap_out, np.int32),
        swap_in=np.array(swap_in, np.int32),
        preemptible=preemptible,
    )
