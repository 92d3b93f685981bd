"""Copies of KV blocks on a CUDA device: between a paged cache and a packed buffer, in one kernel.

A cache is one array ``(layers, parts, blocks, ...)``, parts being K and V; a packed buffer is
``(blocks, layers, parts, ...)``, so that a block is one piece of it and may move on to a lower tier
as such. The trailing dimensions are those of one block of one layer and must be contiguous; the
others may have any strides. Buffers may lie in device memory or in host memory that devices reach.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pyruntime import gpu
from pyruntime._ext import _native
from pyruntime.errors import InvalidArgumentError

__all__ = ["copy_within", "gather", "runs_of", "scatter"]


def gather(cache: Any, buffer: Any, runs: Any, *, stream: Any = None) -> None:
    """Copy blocks of a paged cache into a packed buffer, on a stream.

    Parameters
    ----------
    cache : device array, shape (layers, parts, num_blocks, ...)
        The paged cache, of any dtype.
    buffer : device array or pinned ndarray, shape (num_packed, layers, parts, ...)
        Of the same dtype and trailing shape.
    runs : array_like of int, shape (n, 3)
        ``(first cache block, first buffer block, number of blocks)``: from, to, count. Or a device
        array as `runs_of` makes them, which is used as it is.
    stream : optional
        What `pyruntime.gpu.stream_handle` takes. Default: the default stream.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        Shapes or dtypes do not fit together, a run leaves the arrays, or the device does not reach
        an array.
    pyruntime.errors.DeviceUnavailableError
        There is no device, or no cupy to take the runs there.
    pyruntime.errors.DeviceError
        The launch failed.

    Notes
    -----
    Returns at once: arrays must stay alive and the blocks unused until the stream has done it. The
    buffer's blocks must be distinct. Runs in host memory are checked; those on the device cannot
    be, and the kernel leaves alone what is outside.
    """
    paged, packed = _pair(cache, buffer, writes_cache=False)
    _copy(paged, packed, runs, stream)


def scatter(buffer: Any, cache: Any, runs: Any, *, stream: Any = None) -> None:
    """Copy blocks of a packed buffer into a paged cache, the inverse of `gather`.

    Parameters are those of `gather`; runs are ``(first buffer block, first cache block, count)``.
    """
    paged, packed = _pair(cache, buffer, writes_cache=True)
    _copy(packed, paged, runs, stream)


def copy_within(cache: Any, runs: Any, *, stream: Any = None) -> None:
    """Copy blocks to other blocks of the same cache, as copy-on-write and compaction need it.

    Parameters
    ----------
    cache : device array, shape (layers, parts, num_blocks, ...)
        The paged cache.
    runs : array_like of int, shape (n, 3)
        ``(first source block, first target block, number of blocks)``. No target may be a source.
    stream : optional
        As for `gather`.
    """
    paged = _Side(gpu.describe(cache, "cache", writable=True, contiguous=False), "cache", (2, 0, 1))
    _copy(paged, paged, runs, stream)


def runs_of(triples: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Make the array the kernel reads.

    Parameters
    ----------
    triples : array_like of int, shape (n, 3)
        ``(from, to, count)``; counts of 0 are dropped.

    Returns
    -------
    ndarray of uint32, shape (n, 4)
        ``(start, from, to, count)`` with the sum of the counts before each run.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It is no such array, or a number is outside 0..2**32 - 1.
    """
    given = np.asarray(triples)
    if given.size == 0:
        return np.empty((0, 4), np.uint32)
    if given.ndim != 2 or given.shape[1] != 3 or given.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"runs are {given.dtype}{given.shape}; they must be (n, 3) integers"
        )
    if given.min() < 0 or given.max() >= 1 << 32 or int(given[:, 2].sum()) >= 1 << 32:
        raise InvalidArgumentError("runs must hold numbers in 0..2**32 - 1, counts in sum too")
    kept = given[given[:, 2] > 0].astype(np.uint32)
    runs = np.empty((len(kept), 4), np.uint32)
    runs[:, 1:] = kept
    runs[:, 0] = np.cumsum(kept[:, 2], dtype=np.uint32) - kept[:, 2]
    return runs


class _Side:
    """One side of a copy: an array and which of its axes are blocks, layers and parts."""

    def __init__(self, array: gpu.DeviceArray, name: str, axes: tuple[int, int, int]) -> None:
        if len(array.shape) < 4 or 0 in array.shape:
            raise InvalidArgumentError(
                f"{name} has shape {array.shape}; it must have blocks, layers and parts, then the "
                "dimensions of a block, none of them 0"
            )
        tail = gpu.DeviceArray(0, array.shape[3:], array.strides[3:], array.dtype, None, None)
        if not tail.contiguous:
            raise InvalidArgumentError(
                f"{name} has strides {array.strides}; the dimensions of a block must be contiguous"
            )
        self.array = array
        self.name = name
        self.num_blocks, self.layers, self.parts = (array.shape[axis] for axis in axes)
        self.block_shape = array.shape[3:]
        self.block_bytes = math.prod(self.block_shape) * array.dtype.itemsize
        block, layer, part = (array.strides[axis] for axis in axes)
        self.layout = (array.address, block, layer, part, self.num_blocks)


def _pair(cache: Any, buffer: Any, *, writes_cache: bool) -> tuple[_Side, _Side]:
    paged = _Side(
        gpu.describe(cache, "cache", writable=writes_cache, contiguous=False), "cache", (2, 0, 1)
    )
    packed = _Side(
        gpu.describe(buffer, "buffer", writable=not writes_cache, contiguous=False, host=True),
        "buffer",
        (0, 1, 2),
    )
    for what, one, other in (
        ("layers", paged.layers, packed.layers),
        ("parts", paged.parts, packed.parts),
        ("block shape", paged.block_shape, packed.block_shape),
        ("dtype", paged.array.dtype, packed.array.dtype),
    ):
        if one != other:
            raise InvalidArgumentError(f"{what}: cache has {one}, buffer {other}; they must agree")
    return paged, packed


def _copy(source: _Side, target: _Side, runs: Any, stream: Any) -> None:
    handle = gpu.stream_handle(stream)
    waited = [source.array, target.array]
    if hasattr(runs, "__cuda_array_interface__"):
        on_device = gpu.describe(runs, "runs", dtype=np.uint32, ndim=2)
        if on_device.shape[1] != 4:
            raise InvalidArgumentError(f"runs have shape {on_device.shape}; it must be (n, 4)")
        if on_device.shape[0] == 0:
            return
        waited.append(on_device)
        # How many blocks they name is known there only: as many as there may be.
        num_blocks = min(source.num_blocks, target.num_blocks)
        owner = None
    else:
        made = runs_of(runs)
        for side, column in ((source, 1), (target, 2)):
            ends = made[:, column].astype(np.uint64) + made[:, 3]
            if made.size and int(ends.max()) > side.num_blocks:
                raise InvalidArgumentError(
                    f"runs reach block {int(ends.max()) - 1} of {side.name}, which has "
                    f"{side.num_blocks}"
                )
        num_blocks = int(made[:, 3].sum())
        if num_blocks == 0:
            return
        owner = gpu.upload(made, handle)
        on_device = gpu.describe(owner, "runs", dtype=np.uint32, ndim=2)
    gpu.wait_for(waited, handle)
    _native.gpu_kv_copy(
        source.layout,
        target.layout,
        source.layers,
        source.parts,
        source.block_bytes,
        on_device.address,
        on_device.shape[0],
        num_blocks,
        handle,
    )
    del owner  # after the launch: see gpu.upload
