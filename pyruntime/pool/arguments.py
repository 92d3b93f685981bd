"""Checks of what callers pass, before it crosses the C ABI; and how ``with`` blocks end."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pyruntime.errors import InvalidArgumentError, StateError

_log = logging.getLogger(__name__)

PAGES = {"auto": 0, "thp": 1, "hugetlb": 2, "4k": 3}


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


def typed(
    memory: npt.NDArray[np.uint8], dtype: npt.DTypeLike = np.uint8, shape: Any = None
) -> npt.NDArray[Any]:
    """View the first bytes of an object as an array; `InvalidArgumentError` if it is too small."""
    kind = np.dtype(dtype)
    fits = memory.size // kind.itemsize if kind.itemsize else 0
    dims = (fits,) if shape is None else shape if isinstance(shape, tuple) else (shape,)
    if kind.hasobject or any(d < 0 for d in dims) or (used := int(np.prod(dims))) > fits:
        raise InvalidArgumentError(f"{kind} {dims} does not fit an object of {memory.size} bytes")
    bytes_used: npt.NDArray[Any] = memory[: used * kind.itemsize]
    return bytes_used.view(kind).reshape(dims)


def client(
    name: str, priority: int, reclaim: Callable[[int], int] | None
) -> tuple[str, int, Callable[[int], int] | None]:
    """Check what a client of a budget is made of; a bound `reclaim` is held weakly."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgumentError(f"name is {name!r}; it must be a non-empty string")
    if not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
        raise InvalidArgumentError(f"priority is {priority!r}; it must be in -2**31..2**31 - 1")
    if reclaim is not None and not callable(reclaim):
        raise InvalidArgumentError(f"reclaim is {reclaim!r}; it must be callable or None")
    return name, priority, _weakly(reclaim)


def _weakly(reclaim: Callable[[int], int] | None) -> Callable[[int], int] | None:
    """Keep a bound method from keeping its object, which keeps the client, alive in a cycle."""
    if not inspect.ismethod(reclaim):
        return reclaim
    method = weakref.WeakMethod(reclaim)

    def call(num_bytes: int) -> int:
        alive = method()
        return 0 if alive is None else alive(num_bytes)

    return call


def leave(close: Callable[[], None], what: object, error: object) -> None:
    """End a ``with`` block: close, unless `error` is on its way and objects are still out."""
    try:
        close()
    except (StateError, BufferError):
        if error is None:
            raise
        _log.warning("%s stays open: objects are out while %r propagates", what, error)
