"""Agent programs between their turns: what a turn leaves in the KV cache waits for the next one.

A turn that is not the last ends with the program calling a tool. What it computed is pinned for as
long as that pays (`pyruntime.kv.Retention`), by how long the tool's calls took, how long requests
wait and what computing the content again would cost, all as measured here. Pins hold nobody up: the
scheduler counts their blocks as free, and a step that needs them ends the latest programs' first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pyruntime.errors import CapacityError
from pyruntime.kv import Retention, ServingPool
from pyruntime.sched import Request

__all__ = ["MAX_PROGRAMS", "Programs"]

MAX_PROGRAMS = 4096
"""Known at a time; the one that was quiet longest is forgotten."""
NEW = 0.1
"""Weight of a new value in a mean."""


@dataclass(slots=True)
class _Program:
    arrival: int
    turns: int = 0
    pin: int = 0
    left: float | None = None
    tool: str = ""


class Programs:
    """Pins the turns of programs that call tools, for one engine loop.

    Parameters
    ----------
    pool : ServingPool
    rule : {"formula", "fixed"}
        Of `pyruntime.kv.Retention`.
    clock : callable
        Seconds.
    """

    def __init__(self, pool: ServingPool, rule: str, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._clock = clock
        self._retention = Retention(pool.pool, rule=rule, clock=lambda: int(clock() * 1e9))
        self._programs: OrderedDict[tuple[str, str], _Program] = OrderedDict()
        self._arrivals = 0
        self._wait: float | None = None  # seconds between a turn's arrival and its admission
        self._cost: float | None = None  # seconds per token of a prompt

    def arrived(self, request: Request) -> None:
        """Note a request, maybe a program's new turn: the tool it had called has answered."""
        if not request.program:
            return
        key = request.tenant, request.program
        known = self._programs.get(key)
        if known is None:
            if len(self._programs) >= MAX_PROGRAMS:
                self._retention.back(self._programs.popitem(last=False)[1].pin)
            self._arrivals += 1
            known = self._programs[key] = _Program(self._arrivals)
        self._programs.move_to_end(key)
        known.turns += 1
        if known.left is not None:
            self._retention.observe(known.tool, max(0.0, self._clock() - known.left))
            known.left = None

    def admitted(self, request: Request) -> None:
        """Note that a turn holds its blocks itself."""
        self._wait = _mean(self._wait, max(0.0, self._clock() - request.arrival))
        known = self._programs.get((request.tenant, request.program))
        if known is not None:
            self._retention.back(known.pin)
            known.pin = 0

    def computed(self, tokens: int, seconds: float) -> None:
        """Note how many seconds a step with prompts took, and for how many tokens in all."""
        self._cost = _mean(self._cost, seconds / tokens)

    def ended(self, request: Request, finished: bool) -> None:
        """Pin what a finished turn leaves; before its blocks are freed."""
        key = request.tenant, request.program
        known = self._programs.get(key)
        if known is None:
            return
        if request.last_turn:
            self._retention.back(known.pin)
            self._retention.ended(known.turns)
            del self._programs[key]
            return
        if not finished:
            return
        self._retention.back(known.pin)  # of a turn beside this one
        known.pin, known.left, known.tool = 0, self._clock(), request.tool
        with suppress(CapacityError):  # as many sequences as there may be
            known.pin = self._retention.leave(
                self._pool.sequence(request.id),
                request.tool,
                arrival=known.arrival,
                wait=self._wait or 0.0,
                reload=(self._cost or 0.0) * request.computed,
            )

    def tick(self) -> None:
        """End the pins whose time is over."""
        self._retention.tick()


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + NEW * (new - old)
