"""Experts: the feed-forward networks a router chooses among.

Contract of an expert backend
-----------------------------
- ``ffn(layer, x, ids, weights, out) -> status``: for float32 x [n, d], int32 ids and float32
  weights [n, top_k], write the weighted sum of the chosen experts to out [n, d]; status is uint8
  [n], 0 for a token that was computed. A token's bits must not depend on the call's other tokens.
- ``hint(layer, x)``: x is about to reach `layer`; a loader may guess its experts and prefetch.
- ``begin_step(plan)``: a step starts; a loader may order its queue.
- ``stats() -> dict``: cumulative counters; ``bytes_read`` and ``resident_bytes`` at least.

Arrays live on the engine's device and are ordered by its stream.
"""

from pyruntime.moe import schemes
from pyruntime.moe.experts import StoreExperts
from pyruntime.moe.nested import NestedMatrix, isa
from pyruntime.moe.reference import ReferenceExperts
from pyruntime.moe.store import ExpertStore, Extent, StoreWriter

__all__ = [
    "ExpertStore",
    "Extent",
    "NestedMatrix",
    "ReferenceExperts",
    "StoreExperts",
    "StoreWriter",
    "isa",
    "schemes",
]
