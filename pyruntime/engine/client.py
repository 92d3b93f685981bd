"""The engine client: all a server or router knows of an engine.

Contract
--------
An `EngineClient` takes `Submit` messages and streams `Delta` messages. It never sees text: the
tokeniser is on the caller's side. Messages are plain values, so that the engine may be a thread
(`ThreadClient`, below), another process (spawned, never forked once threads exist) or another
machine. Every submitted request ends in exactly one delta with a finish reason, also when it is
refused, aborted, or the engine is closed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

from pyruntime.engine.loop import EngineLoop
from pyruntime.engine.messages import Delta, Submit
from pyruntime.errors import ClosedError

__all__ = ["EngineClient", "ThreadClient"]

log = logging.getLogger(__name__)


class EngineClient(Protocol):
    """See the module's page."""

    def submit(self, request: Submit) -> AsyncIterator[Delta]:
        """Send a request and stream its deltas; leaving the iterator aborts the request."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish reason "abort"."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return the engine's counters and gauges."""
        ...

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Say why a request waits."""
        ...

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the next sequence number and the KV events from `since` on."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; wait for what is running; True if all of it ended in time."""
        ...


class ThreadClient:
    """An engine loop on a thread of its own.

    Parameters
    ----------
    loop : EngineLoop
        Owned by the thread from now on.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._wake = threading.Condition()
        self._inbox: deque[Submit | str] = deque()  # a string aborts; guarded by _wake
        self._closed = False
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._streams: dict[str, _Mailbox] = {}
        self._thread = threading.Thread(target=self._serve, name="pyruntime-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Submit) -> AsyncIterator[Delta]:
        """See `EngineClient`.

        Raises
        ------
        pyruntime.errors.ClosedError
            The client is closed or draining.
        """
        mailbox = _Mailbox(asyncio.get_running_loop())
        with self._wake:
            if self._closed or self._draining:
                raise ClosedError("the engine takes no new requests")
            if request.id in self._streams:
                taken = f"request id {request.id!r} is in use"
                yield Delta(request.id, finish_reason="error", error=taken, error_kind="invalid")
                return
            self._streams[request.id] = mailbox
            self._inbox.append(request)
            self._idle.clear()
            self._wake.notify()
        ended = False
        try:
            while not ended:
                delta = await mailbox.take()
                ended = delta.finish_reason is not None
                yield delta
        finally:
            if not ended:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        with self._wake:
            if request_id in self._streams:
                self._inbox.append(request_id)
                self._wake.notify()

    def stats(self) -> dict[str, Any]:
        """See `EngineClient`; gauges are those of some moment, counters never fall."""
        return self._loop.snapshot()

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """See `EngineClient`."""
        return self._loop.explain(request_id)

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """See `EngineClient`; this engine's pool publishes nothing."""
        return 0, []

    async def drain(self, timeout_s: float) -> bool:
        """See `EngineClient`; what is left after the timeout is aborted by `close`."""
        with self._wake:
            self._draining = True
        return await asyncio.to_thread(self._idle.wait, timeout_s)

    def close(self) -> None:
        """Abort what is left and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._loop.stop.set()
        self._thread.join()

    # The engine's thread

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._loop.busy or self._closed):
                    self._idle.set()
                    self._wake.wait()
                messages = list(self._inbox)
                self._inbox.clear()
                closed = self._closed
            deltas: list[Delta] = []
            for message in messages:
                if isinstance(message, str):
                    delta = self._loop.abort(message)
                    deltas += [] if delta is None else [delta]
                else:
                    deltas.append(self._loop.submit(message))
            if closed:
                with self._wake:
                    ids = list(self._streams)
                deltas += [d for i in ids if (d := self._loop.abort(i)) is not None]
                self._deliver(deltas)
                self._idle.set()
                return
            try:
                deltas += self._loop.step()
            except Exception:  # a bug of the loop itself: end what it served, keep serving
                log.exception("the engine loop failed")
                deltas += self._abandon()
            self._deliver(deltas)

    def _abandon(self) -> list[Delta]:
        with self._wake:
            ids = list(self._streams)
        ended = []
        for request_id in ids:
            try:
                self._loop.abort(request_id)
            except Exception:
                log.exception("a request could not be ended cleanly")
            error = "the engine failed"
            ended.append(
                Delta(request_id, finish_reason="error", error=error, error_kind="internal")
            )
        return ended

    def _deliver(self, deltas: list[Delta]) -> None:
        """Hand deltas over, with one wake-up per event loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Delta]]] = {}
        with self._wake:
            for delta in deltas:
                mailbox = self._streams.get(delta.id)
                if mailbox is None:
                    continue
                if delta.finish_reason is not None:
                    del self._streams[delta.id]
                batches.setdefault(mailbox.event_loop, []).append((mailbox, delta))
        for event_loop, batch in batches.items():
            try:
                event_loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the event loop is closed: nobody listens any more
                for _, delta in batch:
                    self._loop.abort(delta.id)


class _Mailbox:
    """Deltas of one stream: a queue with one reader, filled on the reader's event loop."""

    __slots__ = ("_deltas", "_waiter", "event_loop")

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = event_loop
        self._deltas: deque[Delta] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> Delta:
        while not self._deltas:
            self._waiter = self.event_loop.create_future()
            await self._waiter
        return self._deltas.popleft()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _put_all(batch: list[tuple[_Mailbox, Delta]]) -> None:
    for mailbox, delta in batch:
        mailbox.put(delta)
