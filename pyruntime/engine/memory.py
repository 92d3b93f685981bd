"""How a memory budget is divided before a model runs, and what is shared while it does.

The budget holds everything that a model makes the process use: dense weights, keys and values,
hidden states, activations, scratch, experts, and what the engine itself takes to run. What the
interpreter and its libraries took before is not in it, nor are prompts that wait in a queue.

What the other parts leave is one `pyruntime.pool.Budget` that experts and the KV cache draw on.
Experts use what keys and values do not yet (`pyruntime.kv.memory`); when those grow, experts give
back refinement planes first, the coldest ones' first, then base planes, down to what they need to
compute at all. The KV cache's limit is what that leaves, or what it was given if less: it can
always reach its limit, and experts always have their least.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pyruntime.errors import CapacityError
from pyruntime.pool import UNIT_BYTES

__all__ = ["BLOCK_OVERHEAD", "EXTENT_OVERHEAD", "MemoryPlan", "plan_memory"]

_MIB = 1 << 20
BLOCK_OVERHEAD = 256
"""Bytes that the pool needs to know of a block, in each KV group."""
EXTENT_OVERHEAD = 2560
"""Bytes that the store and the cache need to know of a plane."""
_RUNTIME = 6 * _MIB
"""The pool's events and tables, code and thread stacks as they are first used, requests."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose."""

    budget: int
    dense: int
    other: int
    """Keys and values swapped out, hidden states between layer slices, queues, the index."""
    runtime: int
    """Of the engine, whatever the model."""
    activations: int
    """Of the largest step."""
    scratch: int
    """Of the experts' kernels."""
    shared: int
    """What is left: for keys and values as they are written, and for experts' planes."""
    kv: int
    """Of `shared`, keys and values at most."""
    experts: int
    """Of `shared`, what experts keep at least."""

    def __str__(self) -> str:
        """Say it in MiB."""
        parts = asdict(self)
        budget, kv, experts = (parts.pop(name) / _MIB for name in ("budget", "kv", "experts"))
        named = ", ".join(f"{name} {value / _MIB:.1f}" for name, value in parts.items())
        return f"{budget:.1f} MiB: {named} (kv at most {kv:.1f}, experts at least {experts:.1f})"


def plan_memory(
    budget: int,
    *,
    dense: int,
    other: int,
    activations: int,
    experts: int,
    kv_most: int,
    kv_least: int,
    groups: int = 1,
) -> MemoryPlan:
    """Divide a budget.

    Parameters
    ----------
    budget : int
        Bytes.
    dense, other, activations, experts : int
        See `MemoryPlan`; `experts` is rounded up to the budget's units.
    kv_most, kv_least : int
        What keys and values may take, and what they must be able to.
    groups : int, default 1
        KV groups: each takes whole units.

    Raises
    ------
    pyruntime.errors.CapacityError
        The budget is too small; the message has the least that is enough, and the plan.
    """
    experts, rounding = _whole(experts), (groups - 1) * UNIT_BYTES
    fixed = dense + other + _RUNTIME + activations
    scratch = min(64 * _MIB, max(_MIB, budget // 16))
    shared = max(0, budget - fixed - scratch) // UNIT_BYTES * UNIT_BYTES
    kv = max(0, min(kv_most, shared - experts - rounding))
    plan = MemoryPlan(budget, dense, other, _RUNTIME, activations, scratch, shared, kv, experts)
    if kv < kv_least:
        rest = fixed + experts + _whole(kv_least + rounding)
        least = max(rest + _MIB, min(16 * (rest - 1) // 15 + 1, rest + 64 * _MIB))
        raise CapacityError(
            f"the memory budget is {budget} bytes; this model needs at least {least}: {plan}"
        )
    return plan


def _whole(num_bytes: int) -> int:
    return -(-num_bytes // UNIT_BYTES) * UNIT_BYTES
