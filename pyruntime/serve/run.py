"""The engine requests behind one HTTP request: followed, merged, cut at stop strings, ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from pyruntime.engine.client import EngineClient
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.engine.text import StopStrings
from pyruntime.errors import ClosedError
from pyruntime.serve.keys import Tenant
from pyruntime.serve.metrics import ServerMetrics

__all__ = ["ApiError", "Choice", "Run"]

log = logging.getLogger(__name__)
STATUS_OF = {"invalid": 400, "full": 429, "internal": 500, "lost": 503}
TYPE_OF = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ApiError(Exception):
    """Becomes an OpenAI error object with a status code."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = TYPE_OF.get(
            self.status, "server_error" if self.status >= 500 else "rate_limit_error"
        )
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.status,
            }
        }

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


@dataclass(slots=True)
class Choice:
    """One engine request behind a choice of the answer."""

    index: int
    submit: Submit
    decoder: Any
    stops: StopStrings
    prompt_text: str = ""
    text: str = ""
    num_tokens: int = 0
    cached_tokens: int = 0
    degraded_tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last_time: float = 0.0

    def feed(self, delta: Delta) -> tuple[str, bool]:
        """Take a delta; return the new text, and whether a stop string ended the choice."""
        self.num_tokens += len(delta.tokens)
        self.degraded_tokens = max(self.degraded_tokens, delta.degraded_tokens)
        self.logprobs += delta.logprobs or []
        text, stopped = self.stops.feed(self.decoder.feed(delta.tokens))
        if stopped:
            self.finish_reason = "stop"
        elif delta.finish_reason:
            text += self.stops.flush()
            self.finish_reason = delta.finish_reason
        self.text += text
        return text, stopped and delta.finish_reason is None


class Run:
    """The engine requests of one HTTP request."""

    def __init__(
        self,
        client: EngineClient,
        metrics: ServerMetrics,
        choices: list[Choice],
        route: str,
        tenant: Tenant,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._route = route
        self._tenant = tenant
        self.choices = choices
        self._streams = [client.submit(choice.submit) for choice in choices]
        self._begin = time.perf_counter()
        self._ttft: float | None = None

    async def start(self) -> None:
        """Wait until the engine has accepted every choice; raise `ApiError` if it has not."""
        for stream in self._streams:
            try:
                first = await anext(stream)
            except ClosedError as error:
                self.abort()
                raise ApiError(503, str(error)) from None
            if first.finish_reason:
                self.abort()
                raise ApiError(STATUS_OF.get(first.error_kind, 500), first.error)

    async def deltas(self) -> AsyncIterator[tuple[Choice, str, Delta]]:
        """Yield (choice, new text, delta) until every choice has ended; raise `ApiError`."""
        try:
            if len(self.choices) == 1:
                async for item in self._follow(self.choices[0], self._streams[0]):
                    yield item
            else:
                async for item in self._merge():
                    yield item
        finally:
            self.abort()
            self._log()

    async def _follow(
        self, choice: Choice, stream: AsyncIterator[Delta]
    ) -> AsyncIterator[tuple[Choice, str, Delta]]:
        async for delta in stream:
            now = time.perf_counter()
            if delta.error:
                raise ApiError(STATUS_OF.get(delta.error_kind, 500), delta.error)
            if delta.tokens:
                if choice.num_tokens == 0:
                    choice.cached_tokens = delta.cached_tokens
                    self._metrics.first_token(now - self._begin)
                    self._ttft = self._ttft or now - self._begin
                else:
                    self._metrics.next_token(now - choice.last_time)
                choice.last_time = now
            text, cut = choice.feed(delta)
            yield choice, text, delta
            if cut:
                self._client.abort(choice.submit.id)
                return

    async def _merge(self) -> AsyncIterator[tuple[Choice, str, Delta]]:
        queue: asyncio.Queue[tuple[Choice, str, Delta] | Exception | None] = asyncio.Queue()

        async def pump(choice: Choice, stream: AsyncIterator[Delta]) -> None:
            try:
                async for item in self._follow(choice, stream):
                    queue.put_nowait(item)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [
            asyncio.create_task(pump(choice, stream))
            for choice, stream in zip(self.choices, self._streams, strict=True)
        ]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def abort(self) -> None:
        """End what has not ended."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._client.abort(choice.submit.id)

    async def abort_when_gone(self, receive: Receive) -> None:
        """Wait for the client to go away, then end its requests."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort()

    def usage(self) -> dict[str, Any]:
        """Return token counts as OpenAI does; `degraded_tokens` if there are any (see `Delta`)."""
        prompt = sum(
            len(c.submit.tokens) for c in {id(c.submit.tokens): c for c in self.choices}.values()
        )
        completion = sum(choice.num_tokens for choice in self.choices)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in self.choices)},
        }
        if degraded := sum(choice.degraded_tokens for choice in self.choices):
            usage["degraded_tokens"] = degraded
        return usage

    def _log(self) -> None:
        self._metrics.requests.labels(self._route, 200).inc()
        log.info(
            "request",
            extra={
                "fields": {
                    "id": self.choices[0].submit.id.rpartition("-")[0],
                    "route": self._route,
                    "tenant": self._tenant.name,
                    "choices": len(self.choices),
                    "prompt_tokens": sum(len(c.submit.tokens) for c in self.choices),
                    "completion_tokens": sum(c.num_tokens for c in self.choices),
                    "finish": [c.finish_reason for c in self.choices],
                    "ttft_s": None if self._ttft is None else round(self._ttft, 4),
                    "seconds": round(time.perf_counter() - self._begin, 4),
                }
            },
        )
