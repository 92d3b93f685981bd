"""Experts: the feed-forward networks a router chooses among.

Contract of an expert backend
-----------------------------
- ``ffn(layer, x, ids, weights, out) -> status``: for float32 x [n, d], int32 ids and float32
  weights [n, top_k], write the weighted sum of the chosen experts to out [n, d]; status is uint8
  [n]: 0 for a token that was computed, `FAILED`, or `DEGRADED` where bad planes lowered its width.
  A token's bits must not depend on the call's other tokens.
- ``hint(layer, x)``: hidden states x, as they are a layer earlier, will reach `layer`; a loader may
  guess its experts and prefetch.
- ``begin_step(plan)``: a step starts; a loader may order its queue.
- ``stats() -> dict``: cumulative counters; ``bytes_read`` and ``resident_bytes`` at least.

Arrays live on the engine's device and are ordered by its stream.
"""

from pyruntime.moe import schemes
from pyruntime.moe.cache import DEGRADED, FAILED, ExpertCache, makespan, plan_loads
from pyruntime.moe.experts import StoreExperts
from pyruntime.moe.nested import NestedMatrix, isa
from pyruntime.moe.policy import (
    AverageBits,
    BitPolicy,
    Deadline,
    Fixed,
    RankBased,
    parse_policy,
)
from pyruntime.moe.reference import ReferenceExperts
from pyruntime.moe.store import ExpertStore, Extent, StoreWriter

__all__ = [
    "DEGRADED",
    "FAILED",
    "AverageBits",
    "BitPolicy",
    "Deadline",
    "ExpertCache",
    "ExpertStore",
    "Extent",
    "Fixed",
    "NestedMatrix",
    "RankBased",
    "ReferenceExperts",
    "StoreExperts",
    "StoreWriter",
    "isa",
    "makespan",
    "parse_policy",
    "plan_loads",
    "schemes",
]
