"""The memory pool: lock-free fixed-size objects on huge pages, as buffers, indices and arrays.

The core, its threads and its failure behaviour are described in ``pyruntime/pool.h``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pyruntime import gpu
from pyruntime._ext import _native
from pyruntime._ext._fast import Buf, PoolHandle
from pyruntime.errors import (
    ClosedError,
    InvalidArgumentError,
    StateError,
    UnsupportedError,
)
from pyruntime.pool.arguments import PAGES, choice, count, leave, typed

__all__ = ["Buf", "Pool"]

_PREFAULT = {"none": 0, "sync": 1, "background": 2}
_CHECK = {"range": 0, "state": 1, "guard": 2}
_FORK = {"cow": 0, "exclude": 1}


class Pool(PoolHandle):
    """A pool of fixed-size objects that any thread may take out and return.

    An object taken out is a `Buf` (the buffer protocol; dropping it returns it) or a plain index,
    which the caller returns itself. Objects are not zeroed.

    Parameters
    ----------
    object_bytes : int
        Size of an object (1..2**30).
    capacity : int
        Objects the pool holds from the start (1..2**40).
    max_capacity : int, optional
        Objects it may grow to, on demand. Default: `capacity`.
    align : int, optional
        Power of two up to 2 MiB. Default 0: natural alignment, and coloured so that objects of a
        power-of-two size do not share cache sets (see `stride`).
    pages : {"auto", "thp", "hugetlb", "4k"}, optional
        What the memory should be made of; each falls back to the next and reports it in `stats`.
    prefault : {"none", "sync", "background"}, optional
        When pages are faulted in and huge pages are asked for; never inside `acquire`.
    node : int, optional
        Preferred NUMA node (0..63). Default: where the first touch happens.
    check : {"range", "state", "guard"}, optional
        What a release verifies: foreign and misaligned objects; also double release and writes
        after release; also inaccessible pages behind and in released objects.
    fork : {"cow", "exclude"}, optional
        A forked child gets its own copy, or no memory (its calls raise `StateError`; touching an
        array made before the fork is a segmentation fault there).
    cache_objects : int, optional
        Objects one thread may keep (2..512). Default 0: at most a quarter of the pool if there is
        one thread per core.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        An option is outside its range; the message names it.
    pyruntime.errors.OutOfMemoryError
        The system gives no memory.

    Notes
    -----
    Thread-safe, lock-free. Single calls and bulk calls below 4096 objects keep the GIL: they are
    shorter than a thread switch. An empty Python call costs more than a list's ``pop``, so one
    thread that recycles ``bytearray`` objects through a list is not slower than `acquire`; the pool
    wins by bulk calls, huge pages, zero copies and by sharing with native code.

    References
    ----------
    J. Bonwick, J. Adams, "Magazines and Vmem", USENIX ATC 2001, section 3.

    Examples
    --------
    >>> with Pool(2048, capacity=1000) as pool:
    ...     with pool.acquire() as buf:
    ...         memoryview(buf)[:5] = b"hello"
    ...     indices = np.empty(32, np.uint32)
    ...     pool.acquire_into(indices)
    ...     pool.write(indices, np.zeros((32, 2048), np.uint8))
    ...     pool.release_from(indices)
    """

    _pinned: gpu.Registration | None = None

    def __init__(
        self,
        object_bytes: int,
        capacity: int,
        *,
        max_capacity: int | None = None,
        align: int = 0,
        pages: Literal["auto", "thp", "hugetlb", "4k"] = "auto",
        prefault: Literal["none", "sync", "background"] = "none",
        node: int | None = None,
        check: Literal["range", "state", "guard"] = "range",
        fork: Literal["cow", "exclude"] = "cow",
        cache_objects: int = 0,
    ) -> None:
        self._core = _native.Pool(
            count("object_bytes", object_bytes),
            count("capacity", capacity),
            count("max_capacity", 0 if max_capacity is None else max_capacity),
            count("align", align),
            count("cache_objects", cache_objects, bits=32),
            choice("pages", pages, PAGES),
            choice("prefault", prefault, _PREFAULT),
            choice("check", check, _CHECK),
            choice("fork", fork, _FORK),
            -1 if node is None else count("node", node, bits=31),
        )
        self._guarded = check == "guard"
        self._open(self._core)
        layout = self._core.layout()
        self._per_unit, self._unit_bytes = layout["per_unit"], layout["unit_bytes"]
        self._object_bytes, self._stride = layout["object_bytes"], layout["stride"]

    @property
    def object_bytes(self) -> int:
        """Size of an object in bytes."""
        return self._object_bytes

    @property
    def stride(self) -> int:
        """Distance of neighbouring objects in bytes."""
        return self._stride

    @property
    def closed(self) -> bool:
        """True once `close` succeeded."""
        return self._core.address == 0

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All committed objects, ``(num_units, objects_per_unit, object_bytes)`` uint8, no copy.

        Object ``i`` is ``array[divmod(i, array.shape[1])]``. The array keeps the pool from closing.

        Raises
        ------
        pyruntime.errors.UnsupportedError
            With ``check="guard"`` released objects are inaccessible.
        """
        self._require_array_access()
        memory = np.frombuffer(memoryview(self), np.uint8)
        shape = (memory.size // self._unit_bytes, self._per_unit, self._object_bytes)
        return np.lib.stride_tricks.as_strided(memory, shape, (self._unit_bytes, self._stride, 1))

    def read(
        self, indices: npt.ArrayLike, out: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Copy objects into a packed array.

        Parameters
        ----------
        indices : array_like of int, shape (n,)
            Which objects.
        out : ndarray of uint8, shape (n, object_bytes), optional
            Where to. Default: a new array.

        Returns
        -------
        ndarray of uint8, shape (n, object_bytes)
        """
        array = self.array
        unit, slot = self._locate(indices, array)
        if out is None:
            return array[unit, slot]
        if out.shape != (len(unit), self._object_bytes) or out.dtype != np.uint8:
            raise InvalidArgumentError(
                f"out is {out.dtype}{out.shape}; it must be uint8{(len(unit), self._object_bytes)}"
            )
        out[...] = array[unit, slot]
        return out

    def write(self, indices: npt.ArrayLike, data: npt.NDArray[np.uint8]) -> None:
        """Copy a packed ``(n, object_bytes)`` uint8 array into objects, the inverse of `read`."""
        array = self.array
        unit, slot = self._locate(indices, array)
        if data.shape != (len(unit), self._object_bytes) or data.dtype != np.uint8:
            raise InvalidArgumentError(
                f"data is {data.dtype}{data.shape}; "
                f"it must be uint8{(len(unit), self._object_bytes)}"
            )
        array[unit, slot] = data

    def view(
        self, item: Buf | int, dtype: npt.DTypeLike = np.uint8, shape: Any = None
    ) -> npt.NDArray[Any]:
        """Give an object as an ndarray without copying (with ``__dlpack__``).

        Parameters
        ----------
        item : Buf or int
            A buffer, which the view keeps taken out; or an index, whose release stays with you.
        dtype : dtype_like, optional
            Element type; its size must divide the bytes used. Default uint8.
        shape : int or tuple of int, optional
            Default: as many elements as fit, one-dimensional.

        Returns
        -------
        ndarray
            Writable; a view keeps the pool from closing.
        """
        if isinstance(item, Buf):
            return typed(np.frombuffer(memoryview(item), np.uint8), dtype, shape)
        array = self.array
        unit, slot = self._locate([item], array)
        return typed(array[unit[0], slot[0]], dtype, shape)

    def pin(self) -> None:
        """Lock the committed memory in place and let CUDA devices read and write it.

        Faults the memory in. What the pool grows by later is not pinned: pin again. Pinned memory
        is not trimmed, and `close` unpins it.

        Raises
        ------
        pyruntime.errors.DeviceUnavailableError
            There is no device; the message says why.
        pyruntime.errors.DeviceError
            The driver refuses.
        """
        self._require_array_access()
        layout = self._core.layout()
        if self._pinned is not None and self._pinned.num_bytes == layout["committed_bytes"]:
            return
        self.unpin()
        self._pinned = gpu.Registration(layout["base"], layout["committed_bytes"], self._core)

    def unpin(self) -> None:
        """Undo `pin`; copies on devices must be done. Unpinning twice does nothing."""
        if self._pinned is not None:
            pinned, self._pinned = self._pinned, None
            pinned.close()

    def read_async(self, indices: Any, out: Any, *, stream: Any = None) -> None:
        """Copy objects into the rows of a device array, on a stream.

        Parameters
        ----------
        indices : device array of uint32, shape (n,)
            Which objects. A row whose index is outside the pinned memory is left alone: the device
            has no way to raise.
        out : device array of uint8, shape (n, object_bytes)
            Where to; rows may have gaps between them. Fastest where `object_bytes`, the pool's
            `stride` and the rows' are multiples of 16.
        stream : optional
            What `pyruntime.gpu.stream_handle` takes. Default: the default stream.

        Raises
        ------
        pyruntime.errors.StateError
            The pool is not pinned.
        pyruntime.errors.InvalidArgumentError
            An array has the wrong type, shape or strides, or is not in device memory.
        pyruntime.errors.DeviceError
            The launch failed.

        Notes
        -----
        Returns at once. The pool must stay pinned, the arrays alive and the objects unchanged until
        the stream has done it (`pyruntime.gpu.synchronize`). Objects in pinned host memory are read
        over the bus.
        """
        self._copy_async(True, indices, out, stream)

    def write_async(self, indices: Any, data: Any, *, stream: Any = None) -> None:
        """Copy the rows of a device array into objects, the inverse of `read_async`.

        An index that comes twice leaves a mixture of its rows.
        """
        self._copy_async(False, indices, data, stream)

    def _copy_async(self, gather: bool, indices: Any, rows: Any, stream: Any) -> None:
        self._live()
        if self._pinned is None:
            raise StateError("the pool is not pinned; call pin() first")
        where = gpu.describe(indices, "indices", dtype=np.uint32, ndim=1)
        packed = gpu.describe(
            rows,
            "out" if gather else "data",
            dtype=np.uint8,
            ndim=2,
            writable=gather,
            contiguous=False,
        )
        if packed.shape != (where.shape[0], self._object_bytes):
            raise InvalidArgumentError(
                f"{'out' if gather else 'data'} has shape {packed.shape}; it must be "
                f"{(where.shape[0], self._object_bytes)}"
            )
        handle = gpu.stream_handle(stream)
        gpu.wait_for((where, packed), handle)
        pinned_units = self._pinned.num_bytes // self._unit_bytes
        _native.gpu_pool_copy(
            gather,
            self._core.layout(),
            pinned_units * self._per_unit,
            where.address,
            where.shape[0],
            packed.address,
            max(packed.strides[0], self._object_bytes),
            handle,
        )

    def stats(self) -> dict[str, int]:
        """Cumulative counters and gauges; their meaning is that of ``pyrt_pool_statistics``.

        Among them ``capacity``, ``in_use``, ``cached``, ``depot`` (objects), ``gets``, ``puts``,
        ``failures``, ``grows``, ``trims``, ``fallbacks``, ``committed_bytes``, ``huge_bytes``.
        Costs about a millisecond: huge pages are counted by reading smaps.
        """
        return self._live().statistics()

    def coverage(self) -> float:
        """Share of the committed memory that is on huge pages now, 0..1."""
        stats = self.stats()
        return stats["huge_bytes"] / stats["committed_bytes"]

    def prefault(self) -> None:
        """Fault in all committed memory now, on huge pages where they are to be had.

        Raises
        ------
        pyruntime.errors.OutOfMemoryError
            A memory limit stopped it; what was faulted in stays.
        """
        self._live().prefault()

    def trim(self) -> int:
        """Give units without objects in use back to the system; returns the bytes released.

        Drains every thread's cache, so it is for quiet moments.

        Raises
        ------
        pyruntime.errors.StateError
            The pool is pinned: devices may be using the memory.
        """
        if self._pinned is not None:
            raise StateError("the pool is pinned; unpin it before trimming")
        return self._live().trim()

    def flush_thread(self) -> None:
        """Return the calling thread's cached objects to the depot."""
        self._live().flush_thread()

    def verify(self) -> None:
        """Walk every free object of a pool at rest.

        Raises
        ------
        pyruntime.errors.CorruptDataError
            An object is free twice or out of range, or the counts do not add up.
        """
        self._live().verify()

    def close(self, *, force: bool = False) -> None:
        """Unmap the memory; closing twice does nothing.

        Parameters
        ----------
        force : bool, optional
            Close although indices were not returned. Buffers and views always prevent it.

        Raises
        ------
        pyruntime.errors.StateError
            Objects are out, or a call is in flight. The pool stays open.
        BufferError
            Arrays over the pool are alive.
        """
        if force and self.num_bufs:
            raise StateError(
                f"{self.num_bufs} buffers of the pool are alive; release them before closing"
            )
        pinned = self._pinned is not None
        self.unpin()  # before the memory is gone
        try:
            self._close(force)
        except BaseException:
            if pinned:
                self.pin()
            raise

    def __enter__(self) -> Pool:
        """Return the pool itself."""
        self._live()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close, unless an exception is on its way and objects are still out."""
        leave(self.close, self, error)

    def __repr__(self) -> str:
        """Say what the pool is, without walking it."""
        state = ", closed" if self.closed else ""
        return f"<Pool of {self._object_bytes}-byte objects, stride {self._stride}{state}>"

    def _live(self) -> _native.Pool:
        if self.closed:
            raise ClosedError("the pool is closed")
        return self._core

    def _require_array_access(self) -> None:
        self._live()
        if self._guarded:
            raise UnsupportedError(
                "arrays over the pool are not available with check='guard': released objects are "
                "inaccessible; use acquire()"
            )

    def _locate(
        self, indices: npt.ArrayLike, array: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "ui"):
            raise InvalidArgumentError(
                f"indices are {wanted.dtype}{wanted.shape}; they must be a 1-D array of integers"
            )
        made = array.shape[0] * array.shape[1]
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < made):
            raise InvalidArgumentError(f"indices must be in 0..{made - 1}")
        unit, slot = np.divmod(wanted.astype(np.intp), self._per_unit)
        return unit, slot
