"""The engine client: all a server or router knows of an engine.

Contract
--------
An `EngineClient` takes `Submit` messages and streams `Delta` messages. It never sees text: the
tokeniser is on the caller's side. Messages are plain values, so that the engine may be a thread
(`ThreadClient`, below), another process (`pyruntime.engine.process`; spawned, never forked) or
another machine. Every submitted request ends in exactly one delta with a finish reason, also when
it is refused, aborted, the engine is closed, or the engine's process dies: then with error kind
"lost".
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from pyruntime.engine.loop import EngineLoop
from pyruntime.engine.messages import Delta, Submit
from pyruntime.engine.serving import Serving
from pyruntime.errors import ClosedError

__all__ = ["EngineClient", "StreamingClient", "ThreadClient"]

log = logging.getLogger(__name__)


class EngineClient(Protocol):
    """See the module's page."""

    def submit(self, request: Submit) -> AsyncGenerator[Delta, None]:
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
        """Return the next sequence number and the events from `since` on; see `pyruntime.kv`."""
        ...

    def kv_snapshot(self) -> tuple[int, list[str]]:
        """Return the sequence number of the next KV event, and all keys that are present."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new; wait for what is running; True if all of it ended in time."""
        ...

    def close(self) -> None:
        """Abort what is left and end the engine."""
        ...


class StreamingClient:
    """The streams' side of a client; a subclass brings messages to the engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, _Mailbox] = {}  # guarded by _lock
        self._refusing = ""  # why nothing new is taken; guarded by _lock
        self._idle = threading.Event()
        self._idle.set()

    def _post(self, message: Submit | str) -> None:
        """Bring a request, or the id of one to abort, to the engine."""
        raise NotImplementedError

    async def submit(self, request: Submit) -> AsyncGenerator[Delta, None]:
        """See `EngineClient`.

        Raises
        ------
        pyruntime.errors.ClosedError
            The client is closed or draining, or its engine is dead.
        """
        mailbox = _Mailbox(asyncio.get_running_loop())
        with self._lock:
            if self._refusing:
                raise ClosedError(self._refusing)
            taken = request.id in self._streams
            if not taken:
                self._streams[request.id] = mailbox
                self._idle.clear()
        if taken:
            error = f"request id {request.id!r} is in use"
            yield Delta(request.id, finish_reason="error", error=error, error_kind="invalid")
            return
        self._post(request)
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
        with self._lock:
            known = request_id in self._streams
        if known:
            self._post(request_id)

    async def drain(self, timeout_s: float) -> bool:
        """See `EngineClient`; what is left after the timeout is aborted by `close`."""
        self._refuse("the engine takes no new requests")
        return await asyncio.to_thread(self._idle.wait, timeout_s)

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def _refuse(self, why: str) -> None:
        with self._lock:
            self._refusing = self._refusing or why

    def _ids(self) -> list[str]:
        with self._lock:
            return list(self._streams)

    def _deliver(self, deltas: list[Delta]) -> None:
        """Hand deltas over, with one wake-up per event loop."""
        if not deltas:
            return
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Delta]]] = {}
        with self._lock:
            for delta in deltas:
                mailbox = self._streams.get(delta.id)
                if mailbox is None:
                    continue
                if delta.finish_reason is not None:
                    del self._streams[delta.id]
                batches.setdefault(mailbox.event_loop, []).append((mailbox, delta))
            if not self._streams:
                self._idle.set()
        for event_loop, batch in batches.items():
            try:
                event_loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the event loop is closed: nobody listens any more
                for _, delta in batch:
                    self.abort(delta.id)


class ThreadClient(StreamingClient):
    """An engine loop on a thread of its own.

    Parameters
    ----------
    loop : EngineLoop
        Owned by the thread from now on.
    """

    def __init__(self, loop: EngineLoop) -> None:
        super().__init__()
        self._loop = loop
        self._serving = Serving(loop, self._deliver)
        self._post = self._serving.post  # type: ignore[method-assign]
        self._thread = threading.Thread(
            target=self._serving.run, name="pyruntime-engine", daemon=True
        )
        self._thread.start()

    def stats(self) -> dict[str, Any]:
        """See `EngineClient`; gauges are those of some moment, counters never fall."""
        return self._loop.snapshot()

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """See `EngineClient`."""
        return self._loop.explain(request_id)

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """See `EngineClient`."""
        return self._loop.kv_events(since)

    def kv_snapshot(self) -> tuple[int, list[str]]:
        """See `EngineClient`."""
        return self._loop.kv_snapshot()

    def close(self) -> None:
        """See `EngineClient`."""
        self._refuse("the engine is closed")
        self._serving.close()
        self._thread.join()
        self._loop.close()


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
