"""Requests of the OpenAI API, with pyruntime's extensions, as pydantic models.

Unknown fields are ignored, as clients expect; fields that would change the answer and are not
implemented are refused by name.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyruntime.engine.sampling import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest"]

MAX_CHOICES = 8
# Fields that are not implemented, and the values of them that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
}


class StreamOptions(BaseModel):
    """How a stream reports."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions share.

    The second group of fields are extensions of pyruntime.
    """

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    user: str | None = None

    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    priority: int = 0
    """Higher goes first; capped by the API key."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds after which the request ends with finish reason "deadline"."""
    program_id: str | None = Field(None, max_length=200)
    """The agent program this request is a turn of."""
    last_turn: bool = True
    """Whether the program needs the conversation's cache no more."""
    tool: str | None = Field(None, max_length=200)
    """The tool the program is likely to call after this turn."""

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> GenerationRequest:
        extra = self.model_extra or {}
        for name, harmless in UNSUPPORTED.items():
            if name in extra and extra[name] not in harmless:
                raise ValueError(f"{name} is not supported")
        stops = self.stops()
        if len(stops) > 16 or any(not 0 < len(text) <= 1000 for text in stops):
            raise ValueError("stop must be at most 16 strings of 1..1000 characters")
        return self

    def stops(self) -> list[str]:
        """Return the stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def wanted_logprobs(self) -> int | None:
        """Return how many most likely tokens to report, None for no log-probabilities."""
        raise NotImplementedError

    def sampling(self, choice: int) -> SamplingParams:
        """Return the sampling parameters of one of the `n` choices."""
        seed = secrets.randbits(63) if self.seed is None else self.seed + choice
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed % 2**64,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            logprobs=self.wanted_logprobs(),
        )


class CompletionRequest(GenerationRequest):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        if not 1 <= len(self.prompts()) <= 128:
            raise ValueError("prompt must be 1..128 prompts")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported")
        return self


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message for a chat template, its content as one string."""
        content = self.content or ""
        if isinstance(content, list):
            parts = []
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"content of type {part.get('type')!r} is not supported")
                parts.append(part["text"])
            content = "".join(parts)
        return {**self.model_dump(exclude_none=True), "content": content}


class ChatRequest(GenerationRequest):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def wanted_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None
