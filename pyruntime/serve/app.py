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
import gc
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
from pyruntime.engine.messages import Submit
from pyruntime.engine.text import StopStrings, Tokenizer
from pyruntime.errors import Error
from pyruntime.serve.keys import ApiKeys, Tenant
from pyruntime.serve.metrics import ServerMetrics
from pyruntime.serve.run import ApiError, Choice, Run
from pyruntime.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from pyruntime.serve.shapes import DIRECT_SEND, ChatShape, CompletionShape, EventStream, Shape

__all__ = ["ServerConfig", "create_app"]


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    `max_len` is the model's context in tokens; `max_body_bytes` bounds a request's body.
    """

    model: str
    max_len: int
    keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 4 << 20


class _Application(FastAPI):
    """Remembers the ASGI server's own `send` for `EventStream`."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        scope[DIRECT_SEND] = send
        await super().__call__(scope, receive, send)


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
        gc.collect()
        gc.freeze()  # what is here now lives as long as the server: no use in looking again
        yield
        if on_shutdown is not None:
            await asyncio.to_thread(on_shutdown)

    app = _Application(
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
