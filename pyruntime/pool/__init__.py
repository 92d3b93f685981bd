"""Memory on huge pages: pools of equal objects, arenas of many sizes, and the budget they share."""

from pyruntime.pool.arena import Arena, Block
from pyruntime.pool.budget import UNIT_BYTES, Budget, BudgetClient
from pyruntime.pool.nodes import NodePools
from pyruntime.pool.objects import Buf, Pool

__all__ = ["UNIT_BYTES", "Arena", "Block", "Budget", "BudgetClient", "Buf", "NodePools", "Pool"]
