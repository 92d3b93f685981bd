"""Keeping what programs hold while they call tools: pins with a time to live."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyruntime.errors import InvalidArgumentError, StateError
from pyruntime.kv.block_pool import BlockPool

__all__ = ["Retention"]

RULES = {"formula": 0, "fixed": 1}


class Retention:
    """Pins of programs that left the batch to call a tool.

    A pin keeps what a sequence has published from eviction until its time is over, the program is
    back, or the blocks are needed: a step that does not fit ends the pins of the programs that
    arrived last, as few as make it fit.

    Parameters
    ----------
    pool : BlockPool
        A pin takes one of its sequences.
    rule : {"formula", "fixed"}
        ``formula``: the tau, of 0 and the tool's recorded durations, that maximises ``P(tau) *
        (wait * eta + reload) - tau``; P is the share of its last 1000 calls that took at most tau.
        Tools with 100 calls or fewer are taken to be like all together, or, where those are as few,
        exponential. ``fixed``: 2 s for tools whose mean is at most 2 s, else none.
    cap : float, default 0.6
        Share of the pool's blocks that all pins together may hold, counted with repetitions. A pin
        beyond it ends those of later programs, or is not made.
    unknown_mean : float, default 1.0
        Seconds that a call of a tool takes in the mean while nothing is known.
    clock : callable, default `time.monotonic_ns`
        The time, ns; it only goes forward.

    References
    ----------
    Continuum: arXiv 2511.02230.

    Examples
    --------
    >>> import numpy as np
    >>> pool, now = BlockPool(64), [0]
    >>> kept = Retention(pool, clock=lambda: now[0])
    >>> prompt = np.arange(64, dtype=np.int32)
    >>> seq = pool.open()
    >>> pool.step(grows=[(seq, 64)]).fitted
    True
    >>> pool.commit(seq, 64, ids=prompt)
    >>> pin = kept.leave(seq, "pytest", arrival=1, seconds=2.0)
    >>> pool.free(seq)
    >>> pool.available()
    60
    >>> now[0] = 3_000_000_000
    >>> kept.tick(), kept.back(pin), pool.available()
    (1, False, 64)
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        rule: str = "formula",
        cap: float = 0.6,
        unknown_mean: float = 1.0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if rule not in RULES:
            raise InvalidArgumentError(f"rule is {rule!r}; it must be one of {list(RULES)}")
        self.pool = pool
        self.rule = rule
        self.unknown_mean = unknown_mean
        self._native = pool.native
        self._clock = clock
        self._native.pin_cap(cap)
        self.suggest("", wait=0, reload=0)  # refuses what is no mean

    def suggest(
        self, tool: str, *, wait: float = 0.0, reload: float = 0.0, eta: float | None = None
    ) -> float:
        """Return how many seconds pinning for a call of `tool` pays; 0: not at all.

        Parameters
        ----------
        tool : str
        wait : float
            Mean wait for being admitted again, seconds.
        reload : float
            To compute or load the content anew, seconds.
        eta : float, optional
            How well a program's turns done foretell those left, 0 (not at all) to 1; by default as
            measured from `ended`.
        """
        return self._native.ttl_suggest(
            tool.encode(),
            RULES[self.rule],
            wait,
            -1.0 if eta is None else eta,
            reload,
            self.unknown_mean,
        )

    def leave(
        self,
        seq: int,
        tool: str,
        *,
        arrival: int,
        wait: float = 0.0,
        reload: float = 0.0,
        eta: float | None = None,
        seconds: float | None = None,
    ) -> int:
        """Pin what a sequence has published, for as long as it pays or for `seconds`.

        The sequence may be freed then. `arrival` orders programs: the latest lose their pins first.

        Returns
        -------
        int
            The pin, or 0: it does not pay, or the cap does not allow it.

        Raises
        ------
        pyruntime.errors.StateError
            It is no sequence of this pool, or is swapped out.
        pyruntime.errors.CapacityError
            All sequences are open.
        """
        if seconds is None:
            seconds = self.suggest(tool, wait=wait, reload=reload, eta=eta)
        if seconds <= 0:
            return 0
        deadline = self._clock() + int(min(seconds, 1e9) * 1e9)
        return self._native.pin(seq, deadline, arrival)

    def back(self, pin: int) -> bool:
        """End a pin after its program was admitted again; whether it still held."""
        try:
            self._native.unpin(pin)
        except StateError:
            return False
        return True

    def tick(self) -> int:
        """End the pins whose time is over, O(1) each; return how many."""
        return self._native.tick(self._clock())

    def observe(self, tool: str, seconds: float) -> None:
        """Note how long a call of a tool took."""
        self._native.ttl_observe(tool.encode(), seconds)

    def ended(self, turns: int) -> None:
        """Note how many turns a program had, when it has ended."""
        self._native.ttl_ended(turns)
