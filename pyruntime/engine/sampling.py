"""How a request's tokens are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyruntime import ops
from pyruntime.errors import InvalidArgumentError

__all__ = ["SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Parameters
    ----------
    temperature : float, default 0
        0 is greedy; at most 100.
    top_k : int, default 0
        Keep the k most likely tokens; 0 keeps all.
    top_p : float, default 1
        Keep the smallest set of most likely tokens with this probability, 0 < top_p <= 1.
    min_p : float, default 0
        Drop tokens less likely than this fraction of the most likely one, 0..1.
    seed : int, default 0
        With the position of a token, determines its random number. 0 <= seed < 2**64.
    repetition_penalty : float, default 1
        Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0.
    presence_penalty, frequency_penalty : float, default 0
        Subtracted from the logits of tokens in the output, once and per occurrence; -2..2.
    logit_bias : dict of int to float
        Added to logits; -100..100.
    logprobs : int, optional
        Report log-probabilities, and those of this many most likely tokens (0..20).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far matter."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def check(self, vocab_size: int) -> None:
        """Raise `InvalidArgumentError` naming the first parameter that is out of range."""
        ranges: tuple[tuple[str, float, float], ...] = (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", math.nextafter(0, 1), 1.0),
            ("min_p", 0.0, 1.0),
            ("seed", 0, 2**64 - 1),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        )
        for name, low, high in ranges:
            _between(name, getattr(self, name), low, high)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, ops.MAX_LOGPROBS)
        for token, value in self.logit_bias.items():
            _between("a token of logit_bias", token, 0, vocab_size - 1)
            _between("a value of logit_bias", value, -100.0, 100.0)

    def row(self) -> tuple[Any, ...]:
        """Return the fields of `pyruntime.ops.SAMPLING`, with position 0."""
        return (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.top_k,
            -1 if self.logprobs is None else self.logprobs,
            np.uint64(self.seed),
            0,
        )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidArgumentError(f"{name} is {value}; it must be in {low:g}..{high:g}")
