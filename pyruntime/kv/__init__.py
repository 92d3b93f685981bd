"""KV blocks: who owns which slots of the paged KV cache.

Contract
--------
The pool alone owns block ids, block tables, eviction and copies. Everybody else names requests.

- ``admit(request, tokens, namespace, reserve) -> cached``: make a request known; returns how many
  of its first tokens are there already, in memory or on disk, and now its own; the last token never
  is. `reserve` tokens count as promised. The scheduler asks for it, by ``start``, when a request
  leaves the queue.
- ``dry_run(grow, free) -> blocks left``: what a step would leave, negative for a deficit. ``grow``
  holds (request, tokens it then holds), ``free`` requests whose blocks return first, freed or
  swapped out. No change. With several groups: of the group where least is left.
- ``step(grow, free, swap_out, swap_in) -> StepTables``: all or nothing. `CapacityError` leaves
  everything as it was. Swapping out what is out, or in what is in, does nothing, so that the step
  of a failed plan may be repeated.
- ``commit(request, tokens, layers, ids)``: the first `tokens` are valid in `layers` layers; `ids`
  begins with them. Only what is valid in all layers may ever be shared, and only then may a sliding
  window release blocks.
- ``observe(requests, marks)``: the attention marks of a step whose tables had `alpha`.
- ``free(request)``: its blocks return, in every tier.
- ``events(since)``, ``snapshot()``, where a pool shares content: see `pyruntime.kv.events`.
- ``fits(tokens)``: whether a lone sequence of `tokens` could ever fit. ``promised``: blocks that
  admitted requests reserved and do not hold yet. ``can_swap(request)``: whether a lower tier has
  room for its blocks.

Tables
------
Layers that attend alike form a `KvGroup`: all full-attention layers one, all layers of a sliding
window another. Each group has its own blocks, ids and tables. `StepTables.groups[g].tables` is
int32 [rows, max blocks], row ``row_of[request]`` holding the request's block ids in order, -1
behind them or where a hole is: a block whose tokens were evicted, or which the window has left
behind. Slot s of a sequence lives in block ``tables[row, s // block_size]`` at offset ``s %
block_size``; the engine derives the slot mapping from that. The slot is not the rotary position:
once kept tokens are moved together inside a sequence, positions run ahead of slots by ``shift``.

K and V are addressed by base, strides and dtype (`KvStorage`), so a pool may lay them out as it
likes. Tables, storage, plan and result each say in `device` and `stream` where their arrays live
and which work they are ordered after; here ``"cpu"`` and 0.
"""

from pyruntime.kv.batch import Batch
from pyruntime.kv.block_pool import BlockPool
from pyruntime.kv.disk import DiskTier
from pyruntime.kv.disk_cache import DiskCache
from pyruntime.kv.events import EventLog, block_keys
from pyruntime.kv.export import export_keys
from pyruntime.kv.memory import BlockMemory
from pyruntime.kv.planner import PrefixGroup, PrefixPlan, plan_prefixes
from pyruntime.kv.prefix import ReferencePrefixPool
from pyruntime.kv.records import Admission, Match, StepOutcome
from pyruntime.kv.reference import ReferenceBlockPool
from pyruntime.kv.retention import Retention
from pyruntime.kv.serving import ServingPool
from pyruntime.kv.swap import HostTier, SwapEngine
from pyruntime.kv.tables import EnginePool, GroupTable, KvGroup, KvStorage, StepTables

__all__ = [
    "Admission",
    "Batch",
    "BlockMemory",
    "BlockPool",
    "DiskCache",
    "DiskTier",
    "EnginePool",
    "EventLog",
    "GroupTable",
    "HostTier",
    "KvGroup",
    "KvStorage",
    "Match",
    "PrefixGroup",
    "PrefixPlan",
    "ReferenceBlockPool",
    "ReferencePrefixPool",
    "Retention",
    "ServingPool",
    "StepOutcome",
    "StepTables",
    "SwapEngine",
    "block_keys",
    "export_keys",
    "plan_prefixes",
]
