"""The engine's side of `pyruntime.engine.process`: ``python -m pyruntime.engine.worker FD``.

The specification (model, options, threads) comes as JSON on standard input.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pyruntime.engine.messages import Delta, Submit
from pyruntime.engine.process import Connection, pack_delta
from pyruntime.engine.sampling import SamplingParams

__all__ = ["main"]

STATS_EVERY_S = 0.25


class _Relay(logging.Handler):
    """Sends log records to the client, whose process decides where they go."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._connection.send("log", record.levelno, record.name, self.format(record))


def main(descriptor: int) -> None:
    """Serve the client at the other end of a socket until it closes or goes away."""
    connection = Connection(socket.socket(fileno=descriptor))
    logger = logging.getLogger("pyruntime")
    logger.addHandler(_Relay(connection))
    logger.setLevel(logging.INFO)
    given = json.load(sys.stdin)
    if given["threads"]:
        os.environ["PYRUNTIME_THREADS"] = str(given["threads"])
    try:
        from pyruntime.engine.llm import make_loop

        loop = make_loop(
            given["model"],
            **given["options"],
            progress=lambda done, total: connection.send("progress", done, total),
        )
    except Exception as error:
        connection.send("failed", type(error).__name__, str(error))
        return
    from pyruntime.engine.serving import Serving

    told, next_event = 0.0, 0

    def deliver(deltas: list[Delta]) -> None:
        nonlocal told, next_event
        if deltas:
            connection.send("deltas", [pack_delta(delta) for delta in deltas])
        following, events = loop.kv_events(next_event)
        if events:
            connection.send("kv", events)
        next_event = following
        now = time.monotonic()
        if now - told > STATS_EVERY_S or not loop.busy:
            told = now
            connection.send("stats", loop.snapshot())

    serving = Serving(loop, deliver)
    questions: dict[str, Callable[..., Any]] = {
        "explain": loop.explain,
        "kv_snapshot": loop.kv_snapshot,
    }

    def read() -> None:
        try:
            while (message := connection.receive()) is not None and message[0] != "close":
                if message[0] == "submit":
                    serving.post(_submit_of(message[1]))
                elif message[0] == "abort":
                    serving.post(message[1])
                elif message[0] == "ask":
                    answer = None
                    with suppress(Exception):  # asked beside a running step, which may interfere
                        answer = questions[message[2]](*message[3:])
                    connection.send("reply", message[1], answer)
        finally:
            serving.close()

    config = loop.engine.config
    about: dict[str, Any] = {
        "max_len": config.max_len,
        "block_size": loop.pool.block_size,
        "num_blocks": loop.pool.num_blocks,
        "stats": loop.snapshot(),
    }
    connection.send("ready", about)
    threading.Thread(target=read, daemon=True).start()
    with suppress(OSError):  # the client is gone
        serving.run()
    loop.close()
    connection.close()


def _submit_of(fields: dict[str, Any]) -> Submit:
    sampling = fields.pop("sampling")
    sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
    return Submit(sampling=SamplingParams(**sampling), **fields)


if __name__ == "__main__":
    main(int(sys.argv[1]))
