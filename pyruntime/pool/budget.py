"""A byte budget that arenas and caches share, with priorities and reclaim.

The ledger and its locks are described in ``pyruntime/pool.h``.
"""

from __future__ import annotations

from collections.abc import Callable

from pyruntime._ext import _native
from pyruntime.errors import ClosedError
from pyruntime.pool.arguments import client, count

__all__ = ["UNIT_BYTES", "Budget", "BudgetClient"]

UNIT_BYTES: int = _native.BUDGET_UNIT_BYTES


class Budget:
    """A ledger of bytes that clients reserve before they commit memory.

    Parameters
    ----------
    limit_bytes : int
        What all clients together may reserve (2 MiB..2**62), rounded down to whole units of 2 MiB.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        The limit is out of range.

    Notes
    -----
    Thread-safe. A forked child's calls raise `StateError`: the ledger is the parent's.

    Examples
    --------
    >>> budget = Budget(64 << 20)
    >>> cache = budget.register("expert cache", priority=1)
    >>> cache.reserve(8 << 20)
    >>> budget.available_bytes >> 20
    56
    >>> cache.close(force=True)
    """

    def __init__(self, limit_bytes: int) -> None:
        self._core = _native.Budget(count("limit_bytes", limit_bytes))

    @property
    def limit_bytes(self) -> int:
        """Bytes all clients together may reserve."""
        return self.stats()["limit_bytes"]

    @property
    def available_bytes(self) -> int:
        """Bytes nobody has reserved."""
        return self.stats()["available_bytes"]

    def register(
        self,
        name: str,
        *,
        priority: int = 0,
        reclaim: Callable[[int], int] | None = None,
    ) -> BudgetClient:
        """Add a client.

        Parameters
        ----------
        name : str
            For messages.
        priority : int, optional
            A higher one is served at the cost of lower and equal ones (32-bit, default 0).
        reclaim : callable, optional
            ``reclaim(num_bytes) -> int`` is asked, on the thread of another client's `reserve` and
            with no lock held, to free about that much: it gives back what it frees through its
            client's `give_back` and returns how much that was. What it raises is reported as
            unraisable and counts as 0. A bound method is held weakly. Default: nothing is ever
            taken from this client.

        Returns
        -------
        BudgetClient
            Leaves the budget when closed or dropped.
        """
        return BudgetClient(self, name, priority, reclaim)

    def stats(self) -> dict[str, int]:
        """Counters and gauges of ``pyrt_budget_statistics``.

        ``num_clients``, ``limit_bytes``, ``available_bytes``, ``reserves``, ``failures``,
        ``reclaims``.
        """
        return self._core.statistics()

    def __repr__(self) -> str:
        """Say how much is left."""
        stats = self.stats()
        return f"<Budget: {stats['available_bytes']} of {stats['limit_bytes']} bytes available>"

    def __reduce__(self) -> str:
        """Refuse: a ledger belongs to its process."""
        raise TypeError("a budget is shared within this process and cannot be pickled")


class BudgetClient:
    """One user of a `Budget`; made by `Budget.register`."""

    def __init__(
        self,
        budget: Budget,
        name: str,
        priority: int,
        reclaim: Callable[[int], int] | None,
    ) -> None:
        self.name = name
        self.budget = budget
        self._core = _native.BudgetClient(budget._core, *client(name, priority, reclaim))

    @property
    def reserved_bytes(self) -> int:
        """Bytes this client holds."""
        return self.stats()["reserved_bytes"]

    def reserve(self, num_bytes: int) -> None:
        """Reserve a multiple of 2 MiB, at the cost of lower and equal priorities if need be.

        Raises
        ------
        pyruntime.errors.CapacityError
            It does not fit; the message has the bytes asked and available. Nothing changed.
        pyruntime.errors.InvalidArgumentError
            Not a multiple of `UNIT_BYTES`.

        Notes
        -----
        Other clients' callbacks may run inside; hold no lock that they take. Releases the GIL.
        """
        self._live().reserve(count("num_bytes", num_bytes))

    def give_back(self, num_bytes: int) -> None:
        """Give a multiple of 2 MiB back; `InvalidArgumentError` beyond what is reserved."""
        self._live().give_back(count("num_bytes", num_bytes))

    def stats(self) -> dict[str, int]:
        """Counters and gauges of ``pyrt_budget_client_statistics``.

        ``priority``, ``reserved_bytes``, ``peak_bytes``, ``reserves``, ``failures``, ``asked``,
        ``asked_bytes``, ``freed_bytes``.
        """
        return self._live().statistics()

    def close(self, *, force: bool = False) -> None:
        """Leave the budget after waiting for running callbacks; closing twice does nothing.

        Parameters
        ----------
        force : bool, optional
            Give back what is still reserved.

        Raises
        ------
        pyruntime.errors.StateError
            Bytes are still reserved, or the call comes from inside the client's own callback.
        """
        if self._core.registered:
            self._core.unregister(force)

    def __repr__(self) -> str:
        """Say who it is."""
        return f"<BudgetClient {self.name!r}{'' if self._core.registered else ', closed'}>"

    def _live(self) -> _native.BudgetClient:
        if not self._core.registered:
            raise ClosedError(f"{self.name} has left the budget")
        return self._core
