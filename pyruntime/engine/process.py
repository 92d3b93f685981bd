"""An engine in a process of its own, behind the same client.

The process is spawned: a fresh interpreter that shares nothing but one socket. Messages are JSON
arrays behind a length of four bytes, little endian:

==============================================  ==============================================
client to engine                                engine to client
==============================================  ==============================================
``["submit", {fields of Submit}]``              ``["ready", {about the engine}]`` once
``["abort", id]``                               ``["failed", error class, message]`` instead
``["ask", number, question, argument...]``      ``["progress", done, total]`` while loading
``["close"]``                                   ``["deltas", [[fields of Delta]...]]``
..                                              ``["stats", snapshot]``, ``["kv", [event...]]``
..                                              ``["reply", number, value]``, ``["log", ...]``
==============================================  ==============================================

Failure: when the process ends without being told to, every stream ends with error kind "lost", and
`submit` raises `ClosedError`; nothing hangs. When the client's process ends, the engine reads the
end of the socket and goes too.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pyruntime import errors
from pyruntime.engine.client import StreamingClient
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.errors import InternalError
from pyruntime.kv import EventLog

__all__ = ["Connection", "ProcessClient", "pack_delta", "unpack_delta"]

log = logging.getLogger(__name__)
MAX_FRAME = 256 << 20


class Connection:
    """Frames over a socket; one reader, many writers."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._file = end.makefile("rb")

    def send(self, *message: Any) -> None:
        """Write a message; OSError once the other end is gone."""
        data = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            self._socket.sendall(len(data).to_bytes(4, "little") + data)

    def receive(self) -> list[Any] | None:
        """Read a message; None at the end of the stream."""
        try:
            head = self._file.read(4)
            size = int.from_bytes(head, "little")
            if len(head) < 4 or size > MAX_FRAME:
                return None
            data = self._file.read(size)
        except OSError:
            return None
        if len(data) < size:
            return None
        message = json.loads(data)
        return message if isinstance(message, list) else None

    def close(self) -> None:
        """Shut the socket: both ends then read its end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def pack_delta(delta: Delta) -> list[Any]:
    """Return a delta as plain values."""
    entries = delta.logprobs
    logprobs = None if entries is None else [(e.token, e.logprob, e.top) for e in entries]
    plain: list[Any] = [delta.id, delta.tokens, logprobs, delta.finish_reason]
    if delta.error or delta.cached_tokens or delta.degraded_tokens:
        plain += [delta.error, delta.error_kind, delta.cached_tokens, delta.degraded_tokens]
    return plain


def unpack_delta(plain: list[Any]) -> Delta:
    """Return the delta that `pack_delta` packed."""
    request_id, tokens, logprobs, finish, *rest = plain
    entries = logprobs and [
        TokenLogprobs(token, value, [(t, v) for t, v in top]) for token, value, top in logprobs
    ]
    return Delta(request_id, tokens, entries, finish, *rest)


class ProcessClient(StreamingClient):
    """An engine loop in a spawned process.

    Parameters
    ----------
    model : str
        A Hugging Face model directory.
    options : dict, optional
        Of `pyruntime.engine.llm.make_loop`, plain values.
    progress : callable, optional
        Called with (layers loaded, layers).
    on_end : callable, optional
        Called once, on a thread of the client, when the process has ended unexpectedly.
    threads : int, optional
        Size of the process's thread pool; all cores by default.

    Raises
    ------
    pyruntime.errors.Error
        The engine could not be made; of the class that `make_loop` raised.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_end: Callable[[], None] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        ours, theirs = socket.socketpair()
        specification = json.dumps({"model": model, "options": options or {}, "threads": threads})
        command = [sys.executable, "-m", "pyruntime.engine.worker", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C is the server's to handle: it drains first
            text=True,
        )
        theirs.close()
        assert self.process.stdin is not None
        with suppress(OSError):  # if it died at once, the end of the socket says so
            self.process.stdin.write(specification)
            self.process.stdin.close()
        self._connection = Connection(ours)
        self._on_end = on_end
        self._closing = False
        self._numbers = itertools.count()
        self._replies: dict[int, tuple[threading.Event, list[Any]]] = {}
        self._events = EventLog()
        self.about = self._wait_until_ready(progress)
        """What the engine says of itself: ``max_len``, ``block_size``, ``num_blocks``."""
        self._stats: dict[str, Any] = self.about.pop("stats")
        self._reader = threading.Thread(target=self._read, name="pyruntime-client", daemon=True)
        self._reader.start()

    def _wait_until_ready(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        while (message := self._connection.receive()) is not None:
            if message[0] == "ready":
                return dict(message[1])
            if message[0] == "progress" and progress is not None:
                progress(message[1], message[2])
            if message[0] == "log":
                _relay(*message[1:])
            if message[0] == "failed":
                self.process.wait()
                self._connection.close()
                kind = getattr(errors, message[1], InternalError)
                raise kind(message[2])
        code = self.process.wait()
        self._connection.close()
        raise InternalError(f"the engine process ended with status {code} before it was ready")

    def _post(self, message: Submit | str) -> None:
        with suppress(OSError):  # gone: the reader ends the streams
            if isinstance(message, str):
                self._connection.send("abort", message)
            else:
                self._connection.send("submit", asdict(message))

    @property
    def alive(self) -> bool:
        """Whether the engine's process runs."""
        return self.process.poll() is None

    def stats(self) -> dict[str, Any]:
        """See `EngineClient`; as of some moment in the last half second."""
        return self._stats if self.alive else {**self._stats, "failing": True}

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """See `EngineClient`; waits for the process, so keep it off an event loop."""
        found: dict[str, Any] | None = self._ask("explain", request_id)
        return found

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """See `EngineClient`; never waits."""
        return self._events.since(since)

    def kv_snapshot(self) -> tuple[int, list[str]]:
        """See `EngineClient`; waits for the process, so keep it off an event loop."""
        seq, keys = self._ask("kv_snapshot") or (0, [])
        return seq, keys

    def _ask(self, question: str, *args: Any) -> Any:
        number, done = next(self._numbers), threading.Event()
        answer: list[Any] = []
        self._replies[number] = (done, answer)
        with suppress(OSError):
            self._connection.send("ask", number, question, *args)
            done.wait(10)
        del self._replies[number]
        return answer[0] if answer else None

    def close(self) -> None:
        """See `EngineClient`; a process that does not end in ten seconds is killed."""
        self._refuse("the engine is closed")
        self._closing = True
        try:
            self._connection.send("close")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self._connection.close()

    def _read(self) -> None:
        try:
            while (message := self._connection.receive()) is not None:
                self._take(message)
        except Exception:
            log.exception("a message of the engine process makes no sense")
        self._ended()

    def _take(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == "deltas":
            self._deliver([unpack_delta(plain) for plain in message[1]])
        elif kind == "stats":
            self._stats = message[1]
        elif kind == "kv":
            self._events.extend(message[1])
        elif kind == "log":
            _relay(*message[1:])
        elif kind == "reply" and (reply := self._replies.get(message[1])):
            reply[1].append(message[2])
            reply[0].set()

    def _ended(self) -> None:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:  # it has closed its end and does not go
            self.process.kill()
            code = self.process.wait()
        self._refuse(f"the engine process ended with status {code}")
        error = f"the engine process ended with status {code} while it served this request"
        self._deliver([Delta(i, [], None, "error", error, "lost") for i in self._ids()])
        for done, _ in list(self._replies.values()):
            done.set()
        if not self._closing:
            log.error("the engine process ended", extra={"fields": {"status": code}})
            if self._on_end is not None:
                self._on_end()


def _relay(level: int, name: str, text: str) -> None:
    logging.getLogger(name).log(level, "%s", text)
