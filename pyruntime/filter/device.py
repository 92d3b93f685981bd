"""A cuckoo filter's table on a CUDA device: the same words and answers as on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime import config, gpu
from pyruntime.errors import InvalidArgumentError
from pyruntime.filter.cuckoo import CuckooFilter

__all__ = ["DeviceFilter", "raw_kernel_options"]

# View of csrc/filter/layout.hpp.
_VIEW = np.dtype(
    [
        *((name, np.uint64) for name in ("words", "epochs", "counters", "num_segments", "seed")),
        ("buckets", np.uint32),
        ("threshold", np.uint32),
        ("older", np.uint64),
    ]
)


def raw_kernel_options() -> tuple[str, ...]:
    """Give the options that kernels need to include the filter's device functions.

    Returns
    -------
    tuple of str
        For ``cupy.RawKernel``, ``cupy.RawModule``, NVRTC and nvcc (C++17 or later; without cupy
        libcu++'s headers, ``cuda/atomic``, must be found as well).

    Notes
    -----
    The header says what there is: ``pyruntime::filter::contains_u64<bits, slots>(view, key)``,
    ``insert_u64`` (where there is room without relocating another key) and ``delete_u64``.

    Examples
    --------
    ::

        lookup = cupy.RawKernel(
            r'''
            #include "cuda/filter/device_functions.cuh"
            using namespace pyruntime;
            extern "C" __global__ void lookup(filter::View view, const uint64_t* keys, size_t n,
                                              bool* out) {
              const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
              if (i < n) out[i] = filter::contains_u64<16, 8>(view, keys[i]);
            }
            ''',
            "lookup",
            options=raw_kernel_options(),
        )
        lookup((blocks,), (256,), (device_filter.raw_view(), keys, numpy.uint64(n), out))
    """
    return (f"-I{config.include_dir() / 'pyruntime' / 'device'}",)


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

    def raw_view(self) -> NDArray[Any]:
        """Give the ``filter::View`` that a raw kernel takes by value; this filter must outlive it.

        Only functions of this filter's `bits` and `slots` may be called with it.

        Returns
        -------
        ndarray, shape (1,)
            56 bytes, of a structured dtype with the fields of the C structure.
        """
        layout = {**self._core.layout(), "older": 0}
        return np.array([tuple(layout[name] for name in _VIEW.names or ())], _VIEW)

    def arrays(self) -> tuple[Any, Any]:
        """Give words and epochs as they are on the device.

        Returns
        -------
        tuple of cupy.ndarray
            uint64 [words] and uint32 [segments], over this filter's own memory.
        """
        return self._words.view(self._cupy.uint64), self._epochs.view(self._cupy.uint32)

    def _keys(self, keys: Any, stream: Any) -> tuple[int, int, int]:
        handle = gpu.stream_handle(stream)
        array = gpu.describe(keys, "keys", ndim=1)
        if array.dtype not in (np.dtype(np.uint64), np.dtype(np.int64)):
            raise InvalidArgumentError(f"keys are {array.dtype}; they must be uint64 or int64")
        gpu.wait_for([array], handle)
        return array.address, array.shape[0], handle
