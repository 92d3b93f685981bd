"""A cuckoo filter's table on a CUDA device: the same words and answers as on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyruntime import gpu
from pyruntime.errors import InvalidArgumentError
from pyruntime.filter.cuckoo import CuckooFilter

__all__ = ["DeviceFilter"]


class DeviceFilter:
    """A copy of a `CuckooFilter` of integer keys in device memory, made with cupy.

    Parameters
    ----------
    source : CuckooFilter
        Gives geometry, seed and content; it is not changed.
    stream : optional
        What `pyruntime.gpu.stream_handle` takes. Default: the default stream.

    Raises
    ------
    pyruntime.errors.DeviceUnavailableError
        There is no device, or no cupy.
    pyruntime.errors.InvalidArgumentError
        The filter holds strings.
    pyruntime.errors.UnsupportedError
        The filter has grown: on a device it has one generation.

    Notes
    -----
    Calls return at once: their arrays must stay alive until the stream has done them. Calls on one
    filter must be ordered: one stream, or events of the caller's. Keys are device arrays of uint64
    or int64, one axis, contiguous; results are cupy arrays.
    """

    def __init__(self, source: CuckooFilter, *, stream: Any = None) -> None:
        if source.kind == "string":
            raise InvalidArgumentError("the filter holds strings; on a device keys are integers")
        self._source = source
        self._core = source.core.device()
        self._cupy = gpu.cupy()
        words, epochs, counters = self._core.sizes()
        host = np.empty(words, np.uint8)
        source.core.read_words(host)
        handle = gpu.stream_handle(stream)
        with self._cupy.cuda.ExternalStream(handle):
            self._words = self._cupy.asarray(host)
            self._epochs = self._cupy.zeros(epochs, self._cupy.uint8)
            self._counters = self._cupy.zeros(counters, self._cupy.uint8)
        self._core.place(self._words.data.ptr, self._epochs.data.ptr, self._counters.data.ptr)

    def insert(self, keys: Any, *, stream: Any = None) -> Any:
        """Store keys; return a cupy uint8 array of statuses (`OK`, `FULL`, `DUP_LIMIT`)."""
        address, n, handle = self._keys(keys, stream)
        with self._cupy.cuda.ExternalStream(handle):
            status = self._cupy.empty(n, self._cupy.uint8)
            scratch = self._cupy.empty(n + 1, self._cupy.uint64)
        self._core.insert(address, n, status.data.ptr, scratch.data.ptr, handle)
        return status

    def contains(self, keys: Any, *, stream: Any = None) -> Any:
        """Say for each key whether it may be in: a cupy bool array."""
        address, n, handle = self._keys(keys, stream)
        with self._cupy.cuda.ExternalStream(handle):
            out = self._cupy.empty(n, self._cupy.bool_)
        self._core.contains(address, n, out.data.ptr, handle)
        return out

    def delete(self, keys: Any, *, stream: Any = None) -> Any:
        """Take one copy of each key out; return a cupy uint8 array of `OK` or `ABSENT`."""
        address, n, handle = self._keys(keys, stream)
        with self._cupy.cuda.ExternalStream(handle):
            status = self._cupy.empty(n, self._cupy.uint8)
        self._core.remove(address, n, status.data.ptr, handle)
        return status

    def to_host(self, *, stream: Any = None) -> CuckooFilter:
        """Return a `CuckooFilter` with this content, after waiting for the stream."""
        gpu.synchronize(stream)
        made = CuckooFilter.from_bytes(self._source.to_bytes())
        made.core.write_words(self._cupy.asnumpy(self._words))
        return made

    def layout(self) -> dict[str, int]:
        """Give shape, seed, and addresses on the device: fields of ``pyrt_filter_device``."""
        return self._core.layout()

    def arrays(self) -> tuple[Any, Any]:
        """Give words (uint64) and epochs (uint32) as cupy arrays over this filter's own memory."""
        return self._words.view(self._cupy.uint64), self._epochs.view(self._cupy.uint32)

    def _keys(self, keys: Any, stream: Any) -> tuple[int, int, int]:
        handle = gpu.stream_handle(stream)
        array = gpu.describe(keys, "keys", ndim=1)
        if array.dtype not in (np.dtype(np.uint64), np.dtype(np.int64)):
            raise InvalidArgumentError(f"keys are {array.dtype}; they must be uint64 or int64")
        gpu.wait_for([array], handle)
        return array.address, array.shape[0], handle
