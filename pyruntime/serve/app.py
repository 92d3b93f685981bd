"""The OpenAI-compatible HTTP server.

The server speaks to the engine through an `EngineClient` only, and only in tokens: the tokeniser
and the chat template live here. Each request becomes `n` times its prompts of engine requests,
whose deltas are turned into text, cut at stop strings, and sent as JSON or as server-sent events.

A client that goes away ends its engine requests. Status codes: 400 for what the request got wrong,
401 without a valid API key, 404 for an unknown model, 413 for a body that is too long, 429 when the
queue is full, 503 while draining. After a stream has begun, an error is its last event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

import pyruntime
from pyruntime.engine.client import EngineClient
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.engine.text import StopStrings, Tokenizer
from pyruntime.errors import ClosedError, Error
from pyruntime.serve.keys import ApiKeys, Tenant
from pyruntime.serve.metrics import ServerMetrics
from pyruntime.serve.schema import ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["ServerConfig", "create_app"]

log = logging.getLogger(__name__)
STATUS_OF = {"invalid": 400, "full": 429, "internal": 500}
TYPE_OF = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    `max_len` is the model's context in tokens; `max_body_bytes` bounds a request's body.
    """

    model: str
    max_len: int
    keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 4 << 20


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
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last_time: float = 0.0

    def feed(self, delta: Delta) -> tuple[str, bool]:
        """Take a delta; return the new text, and whether a stop string ended the choice."""
        self.num_tokens += len(delta.tokens)
        self.logprobs += delta.logprobs or []
        text, stopped = self.stops.feed(self.decoder.feed(delta.tokens))
        if stopped:
            self.finish_reason = "stop"
        elif delta.finish_reason:
            text += self.stops.flush()
            self.finish_reason = delta.finish_reason
        self.text += text
        return text, stopped and delta.finish_reason is None


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig,
    on_shutdown: Callable[[], None] | None = None,
) -> FastAPI:
    """Make the application.

    Parameters
    ----------
    client : EngineClient
    tokenizer : Tokenizer
    config : ServerConfig
    on_shutdown : callable, optional
        Called once when the application ends.
    """
    metrics = ServerMetrics(client.stats)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if on_shutdown is not None:
            await asyncio.to_thread(on_shutdown)

    app = FastAPI(
        title="pyruntime",
        version=pyruntime.__version__,
        lifespan=lifespan,
        max_body_size=config.max_body_bytes,
    )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        metrics.requests.labels(request.url.path, error.status).inc()
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        metrics.requests.labels(request.url.path, 400).inc()
        return ApiError(400, f"{place}: {first['msg']}".strip(": "), place or None).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        missing = f"there is no {request.url.path}"
        text = missing if error.status_code == 404 else str(error.detail)
        return ApiError(error.status_code, text).response()

    def authenticate(request: Request) -> Tenant:
        tenant = config.keys.tenant(request.headers.get("authorization"))
        if tenant is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        return tenant

    def check_model(name: str) -> None:
        if name not in ("", config.model):
            raise ApiError(404, f"model {name!r} is not served; {config.model!r} is", "model")

    def choices_of(
        body: GenerationRequest, prompts: list[tuple[str, list[int]]], tenant: Tenant, stem: str
    ) -> list[Choice]:
        choices: list[Choice] = []
        for text, tokens in prompts:
            limit = body.max_tokens or max(1, config.max_len - len(tokens))
            for number in range(body.n):
                index = len(choices)
                submit = Submit(
                    f"{stem}-{index}",
                    tokens,
                    body.sampling(number),
                    limit,
                    stop_tokens=body.stop_token_ids,
                    ignore_eos=body.ignore_eos,
                    tenant=tenant.name,
                    priority=min(body.priority, tenant.max_priority),
                    deadline_s=body.deadline_s,
                    program=body.program_id or "",
                    last_turn=body.last_turn,
                    tool=body.tool or "",
                )
                choices.append(
                    Choice(index, submit, tokenizer.detokenizer(), StopStrings(body.stops()), text)
                )
        return choices

    async def answer(
        request: Request,
        body: GenerationRequest,
        prompts: list[tuple[str, list[int]]],
        tenant: Tenant,
        shape: type[Shape],
    ) -> Response:
        stem = f"{shape.stem}-{uuid.uuid4().hex}"
        choices = choices_of(body, prompts, tenant, stem)
        run = Run(client, metrics, choices, request.url.path, tenant)
        formatter = shape(stem, config.model, tokenizer, body)
        if body.stream:
            await run.start()
            return EventStream(run, formatter, body.stream_options)
        await run.start()
        watch = asyncio.create_task(run.abort_when_gone(request.receive))
        try:
            async for _ in run.deltas():
                pass
        finally:
            watch.cancel()
        usage = run.usage()
        return JSONResponse(
            {
                **formatter.head(formatter.whole),
                "choices": [formatter.choice(choice) for choice in choices],
                "usage": usage,
            },
            headers={"x-request-id": stem},
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        tenant = authenticate(request)
        check_model(body.model)
        prompts = []
        for prompt in body.prompts():
            tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            text = ""
            if body.echo:
                text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            prompts.append((text, tokens))
        return await answer(request, body, prompts, tenant, CompletionShape)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        tenant = authenticate(request)
        check_model(body.model)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        try:
            tokens = tokenizer.chat([message.plain() for message in body.messages])
        except (Error, ValueError) as error:
            raise ApiError(400, str(error), "messages") from None
        return await answer(request, body, [("", tokens)], tenant, ChatShape)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authenticate(request)
        entry = {
            "id": config.model,
            "object": "model",
            "created": created,
            "owned_by": "pyruntime",
            "max_model_len": config.max_len,
        }
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> Response:
        failing = client.stats()["failing"]
        return JSONResponse({"status": "failing" if failing else "ok"}, 503 if failing else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return {"model": config.model, **client.stats(), "latency": metrics.percentiles()}

    @app.get("/status/events")
    async def status_events() -> Response:
        async def events() -> AsyncIterator[str]:
            while True:
                yield f"data: {json.dumps(await status())}\n\n"
                await asyncio.sleep(0.5)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files("pyruntime.serve").joinpath("status.html").read_text()

    return app


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
        for choice, stream in zip(self.choices, self._streams, strict=True):
            try:
                first = await anext(stream)
            except ClosedError as error:
                self.abort()
                raise ApiError(503, str(error)) from None
            choice.cached_tokens = first.cached_tokens
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
        """Return token counts as OpenAI does."""
        prompt = sum(
            len(c.submit.tokens) for c in {id(c.submit.tokens): c for c in self.choices}.values()
        )
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in self.choices)},
        }

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


class Shape:
    """How a kind of answer is written."""

    stem = ""
    whole = ""
    part = ""

    def __init__(
        self, request_id: str, model: str, tokenizer: Tokenizer, body: GenerationRequest
    ) -> None:
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._logprobs = body.wanted_logprobs() is not None
        self.request_id = request_id
        # Only the text changes from event to event, so the rest is written once per choice.
        self._frames: dict[int, tuple[str, str]] = {}

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every object of an answer begins with."""
        return {**self._head, "object": kind}

    def choice(self, choice: Choice) -> dict[str, Any]:
        """Return a whole choice."""
        raise NotImplementedError

    def _event(self, choice: Choice, text: str, delta: Delta, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def event(self, choice: Choice, text: str, delta: Delta, first: bool) -> str:
        """Return one event of a stream."""
        plain = not first and not delta.logprobs and choice.finish_reason is None
        if plain and choice.index in self._frames:
            before, after = self._frames[choice.index]
            return f"{before}{json.dumps(text)}{after}"
        mark = "\x00" if plain else text
        event = {**self.head(self.part), "choices": [self._event(choice, mark, delta, first)]}
        written = f"data: {json.dumps(event)}\n\n"
        if plain:
            before, _, after = written.partition('"\\u0000"')
            self._frames[choice.index] = (before, after)
            return f"{before}{json.dumps(text)}{after}"
        return written

    def _token(self, token: int) -> tuple[str, list[int]]:
        text = self._tokenizer.token_text(token)
        return text, list(text.encode())


class CompletionShape(Shape):
    """Objects of ``/v1/completions``."""

    stem = "cmpl"
    whole = part = "text_completion"

    def _logprobs_of(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts = [self._token(entry.token)[0] for entry in entries]
        offsets, at = [], 0
        for text in texts:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._token(token)[0]: value for token, value in entry.top} for entry in entries
            ],
            "text_offset": offsets,
        }

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return {
            "index": choice.index,
            "text": choice.prompt_text + choice.text,
            "logprobs": self._logprobs_of(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _event(self, choice: Choice, text: str, delta: Delta, first: bool) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.prompt_text + text if first else text,
            "logprobs": self._logprobs_of(delta.logprobs or []),
            "finish_reason": choice.finish_reason,
        }


class ChatShape(Shape):
    """Objects of ``/v1/chat/completions``."""

    stem = "chatcmpl"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def _logprobs_of(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, data = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": data}

        return {
            "content": [
                {**entry(e.token, e.logprob), "top_logprobs": [entry(*pair) for pair in e.top]}
                for e in entries
            ]
        }

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs_of(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _event(self, choice: Choice, text: str, delta: Delta, first: bool) -> dict[str, Any]:
        content = {"role": "assistant", "content": text} if first else {"content": text}
        return {
            "index": choice.index,
            "delta": content,
            "logprobs": self._logprobs_of(delta.logprobs or []),
            "finish_reason": choice.finish_reason,
        }


class EventStream(Response):
    """Sends a run as server-sent events, straight to the ASGI server."""

    def __init__(self, run: Run, shape: Shape, options: Any) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-request-id": shape.request_id},
        )
        del self.headers["content-length"]
        self._run = run
        self._shape = shape
        self._usage = options is not None and options.include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        run, shape = self._run, self._shape
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        watch = asyncio.create_task(run.abort_when_gone(receive))
        begun = [False] * len(run.choices)

        async def write(text: str, more: bool = True) -> None:
            body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await send(body)

        try:
            async for choice, text, delta in run.deltas():
                if text or delta.logprobs or choice.finish_reason:
                    first, begun[choice.index] = not begun[choice.index], True
                    await write(shape.event(choice, text, delta, first))
            if self._usage:
                last = {**shape.head(shape.part), "choices": [], "usage": run.usage()}
                await write(f"data: {json.dumps(last)}\n\n")
            await write("data: [DONE]\n\n", more=False)
        except ApiError as error:
            await write(f"data: {json.dumps(error.body())}\n\n", more=False)
        except OSError:  # the client went away while we wrote
            log.debug("client gone")
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
