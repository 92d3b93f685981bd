"""Keys of a filter, and arrays for its results, as callers have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pyruntime._ext import _native
from pyruntime.errors import InvalidArgumentError

__all__ = ["INTEGERS", "STRINGS", "Keys", "read_keys", "result_array"]

Keys = NDArray[np.uint64]
INTEGERS, STRINGS = 1, 2
"""Kinds of keys, as files have them; 0 is unknown."""


def read_keys(core: _native.Filter, keys: Any) -> tuple[int, Keys]:
    """Return the kind of some keys, 0 if there are none, and them as 64 bits each.

    No Python object is made of a key in a numpy array (of integers, ``S`` or ``U``), or in anything
    with ``__arrow_c_array__`` or ``__arrow_c_stream__``: integers, strings and binaries, large and
    views of them as well; no nulls.
    """
    try:
        if isinstance(keys, np.ndarray):
            return _read_array(core, keys)
        if hasattr(keys, "__arrow_c_array__"):
            return core.hash_arrow(*keys.__arrow_c_array__())
        if hasattr(keys, "__arrow_c_stream__"):
            kind, chunks = core.hash_arrow_stream(keys.__arrow_c_stream__())
            if len(chunks) == 1:
                return kind, chunks[0]
            return kind, np.concatenate([np.empty(0, np.uint64), *chunks])
        if isinstance(keys, str | bytes):
            raise InvalidArgumentError("keys must be a sequence; give [key] for one")
        return _read_items(core, list(keys))
    except (ValueError, TypeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(str(error)) from error


def _read_array(core: _native.Filter, keys: NDArray[Any]) -> tuple[int, Keys]:
    dtype = keys.dtype
    kind = dtype.kind
    if kind not in "iuSUOT":
        raise InvalidArgumentError(f"keys are {dtype}; they must be integers, strings or bytes")
    if keys.ndim != 1:
        raise InvalidArgumentError(f"keys have {keys.ndim} axes; they must have one")
    if kind in "iu":
        if dtype.itemsize != 8 or not dtype.isnative:
            keys = keys.astype(np.int64 if kind == "i" else np.uint64)
        return INTEGERS, np.ascontiguousarray(keys).view(np.uint64)
    if kind in "OT":
        return _read_items(core, keys.tolist())
    if not len(keys):
        return 0, np.empty(0, np.uint64)
    native = keys.astype(dtype.newbyteorder("="), copy=False)
    return STRINGS, core.hash_fixed(np.ascontiguousarray(native))


def _read_items(core: _native.Filter, items: list[Any]) -> tuple[int, Keys]:
    if not items:
        return 0, np.empty(0, np.uint64)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return INTEGERS, np.array([item & 0xFFFFFFFFFFFFFFFF for item in items], np.uint64)
    if not all(isinstance(item, str | bytes) for item in items):
        raise InvalidArgumentError("keys must be all integers, or all strings or bytes")
    raw = [item.encode() if isinstance(item, str) else item for item in items]
    offsets = np.zeros(len(raw) + 1, np.int64)
    np.cumsum([len(item) for item in raw], out=offsets[1:])
    return STRINGS, core.hash_strings(b"".join(raw), offsets)


def result_array(out: Any, size: int, dtype: DTypeLike, keys: Keys) -> NDArray[Any]:
    """Return `out`, when results can be written to it, or a new array where it is None."""
    wanted = np.dtype(dtype)
    if out is None:
        return np.empty(size, wanted)
    fits = isinstance(out, np.ndarray) and out.dtype == wanted and out.shape == (size,)
    if not fits or not out.flags.c_contiguous or not out.flags.writeable:
        raise InvalidArgumentError(
            f"out must be a writable contiguous array of {size} {wanted.name}"
        )
    if np.may_share_memory(out, keys):
        raise InvalidArgumentError("out must not share memory with keys")
    answer: NDArray[Any] = out
    return answer
