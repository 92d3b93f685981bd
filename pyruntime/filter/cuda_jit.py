"""Device functions of a filter for ``numba.cuda`` kernels: the same table and answers as elsewhere.

`view_of` gives what a kernel takes; `contains_u64`, `insert_u64` and `delete_u64` are called
inside it, by any number of threads. They do in numba what ``csrc/filter/layout.hpp`` and
``core.hpp`` do for the library's own kernels, except that nothing is ever relocated: an insert
that would have to make room says no. So a key that is in is found whatever else these functions do
at the same time. Kernels of `DeviceFilter.insert` do relocate: order them by their stream.

This module needs numba (``pip install "pyruntime[jit]"``).

Examples
--------
::

    from numba import cuda
    from pyruntime.filter.cuda_jit import contains_u64, view_of

    @cuda.jit
    def lookup(view, keys, out):
        i = cuda.grid(1)
        if i < keys.size:
            out[i] = contains_u64(view, keys[i])

    lookup[(n + 255) // 256, 256](view_of(filter), keys, out)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from pyruntime.errors import InvalidArgumentError
from pyruntime.filter.cuckoo import CuckooFilter
from pyruntime.filter.device import DeviceFilter

try:
    cuda: Any = import_module("numba.cuda")
except ImportError as error:
    raise ImportError(
        f'numba cannot be imported ({error}): pip install "pyruntime[jit]"'
    ) from error

__all__ = ["TableView", "contains_u64", "copy_back", "delete_u64", "insert_u64", "view_of"]


class TableView(NamedTuple):
    """A table on a device, as kernels take it; made by `view_of`.

    Scalars are numpy's uint64, because numba makes a float of an uint64 and a Python integer.
    """

    words: Any
    epochs: Any
    num_segments: np.uint64
    seed: np.uint64
    buckets: np.uint64
    threshold: np.uint64
    bits: np.uint64
    slots: np.uint64


def view_of(source: CuckooFilter | DeviceFilter, *, stream: Any = 0) -> TableView:
    """Make the argument of a kernel that looks keys up.

    Parameters
    ----------
    source : CuckooFilter or DeviceFilter
        The first is copied to the device; of the second the memory is shared, and must live.
    stream : optional
        numba's, for the copy.

    Returns
    -------
    TableView

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It is no such filter, or holds strings.
    pyruntime.errors.UnsupportedError
        The filter has grown: on a device it has one generation.
    """
    if isinstance(source, DeviceFilter):
        layout = source.layout()
        words, epochs = (cuda.as_cuda_array(array, sync=False) for array in source.arrays())
    elif isinstance(source, CuckooFilter):
        if source.kind == "string":
            raise InvalidArgumentError("the filter holds strings; on a device keys are integers")
        core = source.core.device()
        layout = core.layout()
        host = np.empty(core.sizes()[0] // 8, np.uint64)
        source.core.read_words(host.view(np.uint8))
        words = cuda.to_device(host, stream=stream)
        epochs = cuda.to_device(np.zeros(layout["num_segments"], np.uint32), stream=stream)
    else:
        raise InvalidArgumentError(
            f"source is {source!r}; it must be a CuckooFilter or a DeviceFilter"
        )
    fields = ("num_segments", "seed", "buckets", "threshold", "bits", "slots")
    return TableView(words, epochs, *(np.uint64(layout[field]) for field in fields))


def copy_back(view: TableView, target: CuckooFilter) -> None:
    """Replace what is in a filter on the host by what is in a view of it.

    Parameters
    ----------
    view : TableView
        All kernels that write to it have been waited for.
    target : CuckooFilter
        Made with the same capacity, bits, slots and seed.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It was made with others.
    """
    info = target.core.info()
    for field in ("num_segments", "seed", "buckets", "bits", "slots"):
        if info[field] != getattr(view, field):
            raise InvalidArgumentError(
                f"the filter's {field} is {info[field]}, the view's {getattr(view, field)}"
            )
    target.core.write_words(np.asarray(view.words.copy_to_host()).view(np.uint8))


# The constants of csrc/filter/layout.hpp and csrc/base/hash.hpp. All of one type: numba turns an
# operation of an uint64 and an int64 into one of floats.
_0, _1, _16, _24, _32, _64 = (np.uint64(n) for n in (0, 1, 16, 24, 32, 64))
_LOW_16, _LOW_24, _LOW_32 = (np.uint64((1 << n) - 1) for n in (16, 24, 32))
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SCATTER = np.uint64(0x9E3779B1)
_ONES_8, _ONES_16 = np.uint64(0x0101010101010101), np.uint64(0x0001000100010001)
_LOWS_8, _LOWS_16 = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x7FFF7FFF7FFF7FFF)


def _locate(view, key):  # type: ignore[no-untyped-def]
    """Give segment, index of the first word of either bucket, and fingerprint of a key."""
    h = np.uint64(key) ^ view.seed
    h ^= h >> _32
    h *= _MIX
    h ^= h >> _32
    h *= _MIX
    h ^= h >> _32
    segment = ((h >> _32) * view.num_segments + ((h & _LOW_32) * view.num_segments >> _32)) >> _32
    values = (_1 << view.bits) - _1
    fingerprint = _1 + ((h & _LOW_16) * values >> _16)
    first = ((h >> _16) & _LOW_24) * view.buckets >> _24
    pair_sum = ((fingerprint * _SCATTER & _LOW_32) * view.buckets >> _32) | _1
    second = pair_sum - first if pair_sum >= first else pair_sum + view.buckets - first
    num_words = view.bits * view.slots // _64
    start = segment * view.buckets
    return segment, (start + first) * num_words, (start + second) * num_words, fingerprint


def _zero_lanes(view, word):  # type: ignore[no-untyped-def]
    """Give the highest bit of every lane that is zero."""
    lows = _LOWS_16 if view.bits == _16 else _LOWS_8
    return ~(((word & lows) + lows) | word | lows)


def _pattern(view, fingerprint):  # type: ignore[no-untyped-def]
    return (_ONES_16 if view.bits == _16 else _ONES_8) * fingerprint


_locate_on_device = cuda.jit(_locate, device=True)
_zero_lanes_on_device = cuda.jit(_zero_lanes, device=True)
_pattern_on_device = cuda.jit(_pattern, device=True)


@cuda.jit(device=True)
def contains_u64(view, key):  # type: ignore[no-untyped-def]
    """Say whether a key may be in; False is certain.

    Parameters
    ----------
    view : TableView
    key : integer
        It counts modulo 2**64.

    Returns
    -------
    bool
    """
    _, first, second, fingerprint = _locate_on_device(view, key)
    pattern = _pattern_on_device(view, fingerprint)
    found = _0
    for i in range(view.bits * view.slots // _64):
        word = np.uint64(i)
        found |= _zero_lanes_on_device(view, view.words[first + word] ^ pattern)
        found |= _zero_lanes_on_device(view, view.words[second + word] ^ pattern)
    return found != _0


@cuda.jit(device=True)
def _free_slots(view, start):  # type: ignore[no-untyped-def]
    free = _0
    for i in range(view.bits * view.slots // _64):
        zeros = _zero_lanes_on_device(view, view.words[start + np.uint64(i)])
        free += np.uint64(cuda.popc(zeros))
    return free


@cuda.jit(device=True)
def _shift_of(view, lanes):  # type: ignore[no-untyped-def]
    """Bits below the lowest lane that a mask of highest bits names."""
    lowest = lanes & (~lanes + _1)
    return np.uint64(cuda.popc(lowest - _1)) - (view.bits - _1)


@cuda.jit(device=True)
def _place(view, start, fingerprint):  # type: ignore[no-untyped-def]
    for i in range(view.bits * view.slots // _64):
        at = start + np.uint64(i)
        word = np.uint64(view.words[at])
        free = _zero_lanes_on_device(view, word)
        while free != _0:
            filled = word | (fingerprint << _shift_of(view, free))
            seen = np.uint64(cuda.atomic.cas(view.words, at, word, filled))
            if seen == word:
                return True
            word = seen
            free = _zero_lanes_on_device(view, word)
    return False


@cuda.jit(device=True)
def _take(view, segment, start, fingerprint):  # type: ignore[no-untyped-def]
    pattern = _pattern_on_device(view, fingerprint)
    lane = (_1 << view.bits) - _1
    for i in range(view.bits * view.slots // _64):
        at = start + np.uint64(i)
        word = np.uint64(view.words[at])
        equal = _zero_lanes_on_device(view, word ^ pattern)
        while equal != _0:
            # Lookups of the library's kernels read it again before they say "absent".
            cuda.atomic.add(view.epochs, segment, np.uint32(1))
            cuda.threadfence()
            emptied = word & ~(lane << _shift_of(view, equal))
            seen = np.uint64(cuda.atomic.cas(view.words, at, word, emptied))
            if seen == word:
                return True
            word = seen
            equal = _zero_lanes_on_device(view, word ^ pattern)
    return False


@cuda.jit(device=True)
def insert_u64(view, key):  # type: ignore[no-untyped-def]
    """Store a key where there is room without relocating another.

    Parameters are those of `contains_u64`.

    Returns
    -------
    bool
        False if there is no such room: nothing has changed, and `CuckooFilter.insert` of a copy, or
        a kernel of `DeviceFilter`, may still find some.
    """
    _, first, second, fingerprint = _locate_on_device(view, key)
    free = _free_slots(view, first)
    if free < view.threshold and _free_slots(view, second) > free:
        return _place(view, second, fingerprint) or _place(view, first, fingerprint)
    return _place(view, first, fingerprint) or _place(view, second, fingerprint)


@cuda.jit(device=True)
def delete_u64(view, key):  # type: ignore[no-untyped-def]
    """Take one copy of a key out; only for keys that are in (see `CuckooFilter.delete`).

    Parameters are those of `contains_u64`.

    Returns
    -------
    bool
        False if there is none.
    """
    segment, first, second, fingerprint = _locate_on_device(view, key)
    return _take(view, segment, first, fingerprint) or _take(view, segment, second, fingerprint)
