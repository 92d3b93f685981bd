"""CUDA arrays and streams for the native calls; the only module that imports cupy.

Nothing here needs cupy to be installed until a DLPack array or cupy itself is asked for: an array
is anything with ``__cuda_array_interface__`` (cupy, numba, torch) or ``__dlpack__`` on a CUDA
device, and a stream is anything that names a ``cudaStream_t``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pyruntime._ext import _native
from pyruntime.errors import (
    DeviceUnavailableError,
    Error,
    InvalidArgumentError,
)

__all__ = [
    "DeviceArray",
    "Registration",
    "available",
    "cupy",
    "describe",
    "info",
    "stream_handle",
    "synchronize",
    "upload",
    "wait_for",
]

# DLPack device types a CUDA device can reach: its memory, pinned host memory, managed memory.
_DLPACK_CUDA = {2, 3, 13}


def available() -> bool:
    """Whether device code can run here: built with CUDA, a driver, and a device."""
    try:
        _native.gpu_info()
    except DeviceUnavailableError:
        return False
    return True


def info() -> dict[str, int]:
    """Give ``num_devices``, ``driver_version`` and ``runtime_version`` (1000 * major + 10 * minor).

    Raises
    ------
    pyruntime.errors.DeviceUnavailableError
        Built without CUDA, no driver, or no device; the message says which.
    """
    return _native.gpu_info()


def cupy() -> Any:
    """Import cupy.

    Raises
    ------
    pyruntime.errors.DeviceUnavailableError
        It is not installed.
    """
    try:
        import cupy as module
    except ImportError as error:
        raise DeviceUnavailableError(
            f'cupy cannot be imported ({error}): pip install "pyruntime[cuda]"'
        ) from error
    return module


@dataclass(frozen=True)
class DeviceArray:
    """What a native call needs to know of an array in device memory.

    Attributes
    ----------
    address : int
        Of the first element.
    shape : tuple of int
        Extents.
    strides : tuple of int
        In bytes.
    dtype : numpy.dtype
        Element type.
    stream : int or None
        The stream its last writer used, if it must be waited for.
    owner : object
        Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: object

    @property
    def contiguous(self) -> bool:
        """True when the elements lie in C order without gaps."""
        return self.strides == _c_strides(self.shape, self.dtype.itemsize)


def describe(
    array: Any,
    name: str,
    *,
    dtype: Any = None,
    ndim: int | None = None,
    writable: bool = False,
    contiguous: bool = True,
    host: bool = False,
) -> DeviceArray:
    """Look at an array in device memory, without copying it.

    Parameters
    ----------
    array : object
        With ``__cuda_array_interface__``, or ``__dlpack__`` on a CUDA device (through cupy).
    name : str
        For messages.
    dtype : dtype_like or tuple of dtype_like, optional
        The element types allowed. Default: any.
    ndim : int, optional
        The number of dimensions required. Default: at least one.
    writable : bool, optional
        Refuse read-only arrays.
    contiguous : bool, optional
        Require C order without gaps; else only that elements of the last dimension are adjacent.
    host : bool, optional
        Also take numpy arrays in host memory that devices reach (`Registration`, cupy's pinned
        memory).

    Returns
    -------
    DeviceArray

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It is no such array; the message says what it is.
    """
    interface = _interface(array, name, host)
    if interface.get("mask") is not None:
        raise InvalidArgumentError(f"{name} is a masked array; it must be a plain one")
    address, read_only = interface["data"]
    kind = np.dtype(interface["typestr"])
    shape = tuple(int(extent) for extent in interface["shape"])
    strides = interface.get("strides")
    found = DeviceArray(
        int(address or 0),
        shape,
        _c_strides(shape, kind.itemsize) if strides is None else tuple(strides),
        kind,
        interface.get("stream"),
        array,
    )
    allowed = None if dtype is None else [np.dtype(d) for d in _as_tuple(dtype)]
    if (allowed is not None and kind not in allowed) or (ndim or max(len(shape), 1)) != len(shape):
        wanted = "an array" if allowed is None else " or ".join(str(d) for d in allowed)
        count = "at least one" if ndim is None else str(ndim)
        raise InvalidArgumentError(
            f"{name} is {kind}{shape}; it must be {wanted} with {count} dimension"
            f"{'s' if ndim != 1 else ''}"
        )
    if writable and read_only:
        raise InvalidArgumentError(f"{name} is read-only")
    if math.prod(shape) > 0:
        adjacent = found.contiguous if contiguous else found.strides[-1] == kind.itemsize
        if not adjacent or any(stride < 0 for stride in found.strides):
            raise InvalidArgumentError(
                f"{name} has strides {found.strides}; it must be "
                f"{'C-contiguous' if contiguous else 'contiguous in its last dimension'}"
            )
        if found.address % kind.itemsize:
            raise InvalidArgumentError(
                f"{name} is not aligned to elements of {kind.itemsize} bytes"
            )
    return found


def upload(array: npt.NDArray[Any], stream: int) -> Any:
    """Copy a small host array to the device, ordered on a stream.

    Parameters
    ----------
    array : ndarray
        Any shape and type.
    stream : int
        A handle, see `stream_handle`.

    Returns
    -------
    cupy.ndarray
        Its memory is given out again only in the stream's order, so it may be dropped as soon as
        the work that reads it is queued there.
    """
    cp = cupy()
    with cp.cuda.ExternalStream(stream):
        return cp.asarray(array)


def stream_handle(stream: Any = None) -> int:
    """Give the ``cudaStream_t`` a stream object stands for.

    Parameters
    ----------
    stream : None, int or object
        None: the default stream. An integer: the handle itself. Else an object with
        ``__cuda_stream__``, ``ptr`` (cupy), ``cuda_stream`` (torch) or ``handle`` (numba).

    Returns
    -------
    int
    """
    if stream is None:
        return 0
    if hasattr(stream, "__index__"):
        handle = stream.__index__()
    elif hasattr(stream, "__cuda_stream__"):
        handle = stream.__cuda_stream__()[1]
    else:
        for attribute in ("ptr", "cuda_stream", "handle"):
            if hasattr(stream, attribute):
                handle = getattr(stream, attribute)
                break
        else:
            raise InvalidArgumentError(f"stream is {stream!r}; it must name a CUDA stream")
    handle = int(getattr(handle, "value", handle) or 0)
    if not 0 <= handle < 1 << 64:
        raise InvalidArgumentError(f"stream is {handle}; it must be in 0..2**64 - 1")
    return handle


def wait_for(arrays: Sequence[DeviceArray], stream: int) -> None:
    """Wait until arrays whose last writer used another stream may be used on `stream`.

    The host waits: only producers that name their stream (``__cuda_array_interface__`` version 3)
    cost anything, and only when it is another one.
    """
    default = {0, 1}  # two names of the legacy default stream
    for array in arrays:
        theirs = array.stream
        same = theirs == stream or (theirs in default and stream in default)
        if theirs is not None and not same:
            _native.gpu_synchronize(theirs)


def synchronize(stream: Any = None) -> None:
    """Wait until all work on a stream is done.

    Raises
    ------
    pyruntime.errors.DeviceError
        Something on the stream failed.
    """
    _native.gpu_synchronize(stream_handle(stream))


class Registration:
    """Host memory a device may read and write, locked in place until closed.

    Parameters
    ----------
    address : int
        First byte.
    num_bytes : int
        At least 1.
    owner : object, optional
        Kept alive as long as the registration is.

    Raises
    ------
    pyruntime.errors.DeviceUnavailableError
        There is no device; the message says why.
    pyruntime.errors.DeviceError
        The driver refuses, for instance because the memory is registered already.
    """

    _open = False

    def __init__(self, address: int, num_bytes: int, owner: object = None) -> None:
        _native.gpu_register(address, num_bytes)
        self.address = address
        self.num_bytes = num_bytes
        self._owner = owner
        self._open = True

    def close(self) -> None:
        """Unlock the memory; waits for nothing, so copies must be done. Twice does nothing."""
        if self._open:
            self._open = False
            _native.gpu_unregister(self.address)

    def __del__(self) -> None:
        # The driver may be gone when the interpreter ends, and the registration with it.
        with contextlib.suppress(Error):
            self.close()

    def __enter__(self) -> Registration:
        """Return the registration itself."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close."""
        self.close()


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    step = itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _interface(array: Any, name: str, host: bool) -> dict[str, Any]:
    """Get the array's ``__cuda_array_interface__``, by whichever way it offers one."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return cast(dict[str, Any], interface)
    if host and isinstance(array, np.ndarray):
        last = array.ctypes.data + array.itemsize - 1
        last += sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
        if array.size == 0 or all(_native.gpu_reachable(a) for a in (array.ctypes.data, last)):
            return {**array.__array_interface__, "strides": array.strides}
        raise InvalidArgumentError(
            f"{name} is in host memory that devices do not reach; register it "
            "(pyruntime.gpu.Registration) or take it from cupyx.empty_pinned"
        )
    device = getattr(array, "__dlpack_device__", None)
    if device is None or device()[0] not in _DLPACK_CUDA:
        where = "in host memory" if device is not None else "no array"
        raise InvalidArgumentError(
            f"{name} is {type(array).__name__}, {where}; it must be in device memory, with "
            "__cuda_array_interface__ or __dlpack__"
        )
    return cast(dict[str, Any], cupy().from_dlpack(array).__cuda_array_interface__)
