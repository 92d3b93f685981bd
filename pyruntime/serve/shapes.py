"""How answers are written: completion and chat objects, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response

from pyruntime.engine.messages import Delta, TokenLogprobs
from pyruntime.engine.text import Tokenizer
from pyruntime.serve.run import ApiError, Choice, Receive, Run
from pyruntime.serve.schema import GenerationRequest

__all__ = ["DIRECT_SEND", "ChatShape", "CompletionShape", "EventStream", "Shape"]

#: Key of a request's scope: the ASGI server's `send`, which events go to. What lies between it and
#: a response has looked at the response's start, and would only cost time at every event.
DIRECT_SEND = "pyruntime.send"

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


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
        direct: Send = scope[DIRECT_SEND]
        watch = asyncio.create_task(run.abort_when_gone(receive))
        begun = [False] * len(run.choices)

        def write(text: str, more: bool = True) -> Awaitable[None]:
            return direct({"type": "http.response.body", "body": text.encode(), "more_body": more})

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
