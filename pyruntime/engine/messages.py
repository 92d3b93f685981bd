"""Plain messages between an engine client and an engine: all fields serialise as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyruntime.engine.sampling import SamplingParams

__all__ = ["Delta", "Submit", "TokenLogprobs"]


@dataclass(slots=True)
class Submit:
    """A request to generate tokens.

    Times are seconds from submission; `tenant` is whom the request is accounted to.
    """

    id: str
    tokens: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 16
    stop_tokens: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    program: str = ""
    last_turn: bool = True
    tool: str = ""


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probability of a token and of the most likely ones at its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Delta:
    """What a step brought one request; the first one, without tokens, says it was accepted."""

    id: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """"stop", "length", "deadline", "abort" or "error"; None while it goes on."""
    error: str = ""
    error_kind: str = ""
    """"invalid" (the request's fault), "full" (try later), "lost" (the engine died) or
    "internal"."""
    cached_tokens: int = 0
    """With the first token: prompt tokens that were in memory already."""
    degraded_tokens: int = 0
    """Tokens of the request so far, prompt included, that experts computed at a lower width than
    asked because planes are damaged."""
