"""How a memory budget is divided before a model runs, and what is shared while it does.

The budget holds everything that a model makes the process use: dense weights, keys and values,
hidden states, activations, scratch and experts. What the interpreter and its libraries took before
is not in it.

What the other parts leave is one `pyruntime.pool.Budget` that experts and the KV cache draw on.
Experts use what keys and values do not yet (`pyruntime.kv.memory`); when those grow, experts give
back refinement planes first, the coldest ones' first, then base planes, down to what they need to
compute at all. Both minima are in the plan: the KV cache can always reach its limit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pyruntime.engine.config import ModelConfig
from pyruntime.errors import CapacityError
from pyruntime.pool import UNIT_BYTES

__all__ = ["MemoryPlan", "plan_memory"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose."""

    budget: int
    dense: int
    other: int
    """Keys and values swapped out, hidden states between layer slices, and queues."""
    activations: int
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
    config: ModelConfig,
    dense_bytes: int,
    other_bytes: int,
    kv_bytes: int,
    experts_bytes: int,
    step_tokens: int,
    max_running: int,
) -> MemoryPlan:
    """Divide a budget.

    Parameters
    ----------
    budget : int
        Bytes.
    config : ModelConfig
    dense_bytes, other_bytes, kv_bytes, experts_bytes : int
        See `MemoryPlan`; the last two are rounded up to the budget's units.
    step_tokens : int
        Tokens of a step at most.
    max_running : int
        Requests of a step at most: each may sample.

    Raises
    ------
    pyruntime.errors.CapacityError
        Too little is left for the experts; the message has the plan.
    """
    c = config
    wide = c.hidden * 6 + (c.heads + 2 * c.kv_heads) * c.head_dim * 2
    rope = 2 * c.max_len * (c.head_dim // 2) * 4
    activations = step_tokens * wide * 4 + 2 * max_running * c.vocab_size * 4 + rope
    scratch = min(64 * _MIB, max(_MIB, budget // 16))
    kv, experts = (-(-part // UNIT_BYTES) * UNIT_BYTES for part in (kv_bytes, experts_bytes))
    left = budget - dense_bytes - other_bytes - activations - scratch
    shared = left // UNIT_BYTES * UNIT_BYTES
    plan = MemoryPlan(budget, dense_bytes, other_bytes, activations, scratch, shared, kv, experts)
    if shared < kv + experts:
        raise CapacityError(f"the memory budget leaves nothing for experts: {plan}")
    return plan
