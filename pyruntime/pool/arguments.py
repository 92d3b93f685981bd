"""Checks of what callers pass, before it crosses the C ABI."""

from __future__ import annotations

from pyruntime.errors import InvalidArgumentError


def choice(name: str, value: str, choices: dict[str, int]) -> int:
    """Translate a named choice; raises `InvalidArgumentError` listing the names."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise InvalidArgumentError(
            f"{name} is {value!r}; it must be one of {', '.join(choices)}"
        ) from None


def count(name: str, value: int, bits: int = 64) -> int:
    """Take an integer in ``0..2**bits - 1``; raises `InvalidArgumentError` naming it."""
    try:
        number = value.__index__()
    except AttributeError:
        raise InvalidArgumentError(f"{name} is {value!r}; it must be an integer") from None
    if not 0 <= number < 1 << bits:
        raise InvalidArgumentError(f"{name} is {number}; it must be in 0..2**{bits} - 1")
    return number
