"""How a memory budget is divided before a model runs.

The budget holds everything that a model makes the process use: dense weights, keys and values,
hidden states, activations, scratch and experts. What the interpreter and its libraries took before
is not in it. The experts get what the other parts leave.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pyruntime.engine.config import ModelConfig
from pyruntime.errors import CapacityError

__all__ = ["MemoryPlan", "plan_memory"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose."""

    budget: int
    dense: int
    kv: int
    """Keys and values, here and swapped out, and hidden states kept between layer slices."""
    activations: int
    scratch: int
    """Of the experts' kernels."""
    experts: int
    """What is left, for experts' planes."""

    def __str__(self) -> str:
        """Say it in MiB."""
        parts = asdict(self)
        budget = parts.pop("budget")
        named = ", ".join(f"{name} {value / _MIB:.1f}" for name, value in parts.items())
        return f"{budget / _MIB:.1f} MiB: {named}"


def plan_memory(
    budget: int,
    config: ModelConfig,
    dense_bytes: int,
    kv_bytes: int,
    step_tokens: int,
    max_running: int,
) -> MemoryPlan:
    """Divide a budget.

    Parameters
    ----------
    budget : int
        Bytes.
    config : ModelConfig
    dense_bytes, kv_bytes : int
    step_tokens : int
        Tokens of a step at most.
    max_running : int
        Requests of a step at most: each may sample.

    Raises
    ------
    pyruntime.errors.CapacityError
        Nothing is left for the experts; the message has the plan.
    """
    c = config
    wide = c.hidden * 6 + (c.heads + 2 * c.kv_heads) * c.head_dim * 2
    rope = 2 * c.max_len * (c.head_dim // 2) * 4
    activations = step_tokens * wide * 4 + 2 * max_running * c.vocab_size * 4 + rope
    scratch = min(64 * _MIB, max(_MIB, budget // 16))
    left = budget - dense_bytes - kv_bytes - activations - scratch
    plan = MemoryPlan(budget, dense_bytes, kv_bytes, activations, scratch, left)
    if left <= 0:
        raise CapacityError(f"the memory budget leaves nothing for experts: {plan}")
    return plan
