"""KV blocks: who owns which slots of the paged KV cache.

Contract
--------
The pool alone owns block ids, block tables, eviction and copies. Everybody else names requests.

- ``admit(request, tokens, namespace, reserve) -> cached``: make a request known; returns how many
  of its first tokens are in memory already. `reserve` tokens count as promised.
- ``dry_run(grow, free) -> blocks left``: what a step would leave, negative for a deficit. ``grow``
  holds (request, tokens it then holds), ``free`` requests whose blocks return first. No change.
- ``step(grow, free) -> StepTables``: all or nothing. `CapacityError` leaves everything as it was.
- ``commit(request, tokens, layers)``: the first `tokens` are valid in `layers` layers. Only what is
  valid in all of them may ever be shared.
- ``free(request)``: its blocks return.
- ``fits(tokens)``: whether a lone sequence of `tokens` could ever fit. ``promised``: blocks that
  admitted requests reserved and do not hold yet.

Tables
------
`StepTables.tables` is int32 [rows, max blocks], row ``row_of[request]`` holding the request's block
ids in order, -1 behind them or where a hole is. Slot s of a sequence lives in block
``tables[row, s // block_size]`` at offset ``s % block_size``. The slot is not the rotary position:
once slots are freed inside a sequence, the two differ. `device` and `stream` say where the arrays
live and which work they are ordered after; here ``"cpu"`` and 0.
"""

from pyruntime.kv.reference import ReferenceBlockPool, StepTables

__all__ = ["ReferenceBlockPool", "StepTables"]
