"""Memory on huge pages: pools of equal objects, and the budget that several users share."""

from pyruntime.pool.budget import UNIT_BYTES, Budget, BudgetClient
from pyruntime.pool.objects import Buf, Pool

__all__ = ["UNIT_BYTES", "Budget", "BudgetClient", "Buf", "Pool"]
