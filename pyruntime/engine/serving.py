"""The thread that owns an engine loop: takes messages between steps, hands deltas out after."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from pyruntime.engine.loop import EngineLoop
from pyruntime.engine.messages import Delta, Submit

__all__ = ["Serving"]

log = logging.getLogger(__name__)


class Serving:
    """Runs a loop until it is closed.

    Any thread may call `post` and `close`; one thread calls `run`.

    Parameters
    ----------
    loop : EngineLoop
    deliver : callable
        Called on the thread of `run` with the deltas of each step, also with none.
    """

    def __init__(self, loop: EngineLoop, deliver: Callable[[list[Delta]], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._wake = threading.Condition()
        self._inbox: deque[Submit | str] = deque()  # a string aborts; guarded by _wake
        self._closed = False
        self._known: set[str] = set()  # requests that have not ended

    def post(self, message: Submit | str) -> None:
        """Bring a request, or the id of one to abort."""
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def close(self) -> None:
        """Make `run` abort what is left and return."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._loop.stop.set()

    def run(self) -> None:
        """Serve until closed; every request ends in exactly one final delta."""
        while True:
            with self._wake:
                while not (self._inbox or self._loop.busy or self._closed):
                    self._wake.wait()
                messages = list(self._inbox)
                self._inbox.clear()
                closed = self._closed
            deltas = [delta for message in messages for delta in self._take(message)]
            if closed:
                deltas += [d for i in self._known if (d := self._loop.abort(i)) is not None]
                self._hand_out(deltas)
                return
            try:
                deltas += self._loop.step()
            except Exception:  # a bug of the loop itself: end what it served, keep serving
                log.exception("the engine loop failed")
                deltas += self._abandon()
            self._hand_out(deltas)

    def _take(self, message: Submit | str) -> list[Delta]:
        if isinstance(message, str):
            delta = self._loop.abort(message)
            return [] if delta is None else [delta]
        self._known.add(message.id)
        return [self._loop.submit(message)]

    def _hand_out(self, deltas: list[Delta]) -> None:
        self._known.difference_update(d.id for d in deltas if d.finish_reason is not None)
        self._deliver(deltas)

    def _abandon(self) -> list[Delta]:
        ended = []
        for request_id in self._known:
            try:
                self._loop.abort(request_id)
            except Exception:
                log.exception("a request could not be ended cleanly")
            error = "the engine failed"
            ended.append(
                Delta(request_id, finish_reason="error", error=error, error_kind="internal")
            )
        return ended
