"""What goes into a block pool and comes out of it, beside plain numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyruntime.errors import InvalidArgumentError

__all__ = ["REASONS", "Admission", "Copy", "Event", "Match", "StepOutcome", "as_tokens"]

INT32 = np.dtype(np.int32)
REASONS = ("capacity", "demoted", "cleared", "planned")


class Copy(NamedTuple):
    """A block to copy in all layers of its group before the step writes."""

    group: int
    source: int
    target: int


class Match(NamedTuple):
    """Leading tokens of a prompt that are in memory, and further ones in lower tiers."""

    tokens: int
    lower_tokens: int


class Event(NamedTuple):
    """What became shared content, or no longer is."""

    seq: int
    kind: str
    """``stored``, ``removed``, ``cleared``, or ``dropped``: those up to here are gone."""
    reason: str
    key: bytes
    """The block's export key, 16 bytes."""


class Admission(NamedTuple):
    """A prompt that a step admits."""

    tokens: npt.ArrayLike
    space: int = 0
    room: int | None = None
    """Tokens to hold blocks for at once; by default the whole prompt."""
    reserve: int = 0
    """Tokens promised."""


class StepOutcome(NamedTuple):
    """What a step did, or would do."""

    fitted: bool
    """Whether everything did."""
    never_fits: bool
    """Whether a sequence would exceed the pool by itself."""
    num_grown: int
    admitted: list[tuple[int, int]]
    """Per admission: handle, and leading tokens that were in memory."""
    left: list[int]
    """Per group: blocks left afterwards, at least; negative for a deficit."""
    need: list[int]
    copies: list[Copy]
    evictions: list[tuple[int, int, int, int]]
    """(group, block, node, generation), where tiers are attached."""


def as_tokens(tokens: npt.ArrayLike) -> Any:
    """Return tokens as contiguous int32, themselves where they are that already."""
    if isinstance(tokens, np.ndarray):
        if tokens.dtype is INT32 and tokens.flags.c_contiguous:
            return tokens
        if tokens.dtype.kind not in "iu":
            raise InvalidArgumentError(f"tokens are {tokens.dtype}; they must be integers")
    elif isinstance(tokens, (bytes, bytearray, memoryview)):
        return np.frombuffer(tokens, np.int32)
    try:
        wide = np.asarray(tokens)
        if wide.size and (
            wide.dtype.kind not in "iu" or wide.min() < -(2**31) or wide.max() >= 2**31
        ):
            raise InvalidArgumentError("tokens must be integers that fit into 32 bits")
        return np.ascontiguousarray(wide, np.int32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"tokens must be integers in one dimension: {error}") from None
