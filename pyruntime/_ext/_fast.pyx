# cython: language_level=3, binding=False, embedsignature=True, freethreading_compatible=False
"""Hot path of the memory pool: what a call costs is decided here, everything else is elsewhere."""

cimport cython
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.number cimport PyNumber_Index
from libc.stdint cimport intptr_t, uint32_t, uint64_t

from pyruntime._ext.capi cimport (
    PYRT_EFULL, PYRT_OK, pyrt_last_error, pyrt_pool, pyrt_pool_get, pyrt_pool_get_bulk,
    pyrt_pool_get_indices, pyrt_pool_index_of, pyrt_pool_put, pyrt_pool_put_indices, pyrt_pool_ptr_of, pyrt_status,
)

from pyruntime.errors import ClosedError, InvalidArgumentError, StateError, from_status

cdef Py_ssize_t RELEASE_GIL_FROM = 4096  # below, switching threads costs more than the call


cdef int fail(pyrt_status status) except -1:
    raise from_status(status, pyrt_last_error().decode("utf-8", "replace"))


cdef int take_indices(object array, bint writable, Py_buffer* view) except -1:
    try:
        PyObject_GetBuffer(
            array, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0)
        )
    except (TypeError, BufferError, ValueError) as error:
        raise InvalidArgumentError(
            f"indices must be a C-contiguous{' writable' if writable else ''} uint32 array: {error}"
        ) from None
    cdef bint uint32 = view.format is not NULL and view.format[0] == b"I" and view.format[1] == 0
    if not uint32 or view.itemsize != 4:
        dtype = "B" if view.format is NULL else view.format.decode()
        PyBuffer_Release(view)
        raise InvalidArgumentError(f"indices have format {dtype!r}; they must be uint32 ('I')")
    return 0


cdef uint64_t as_index(object value) except? 0:
    try:
        return <uint64_t>PyNumber_Index(value)
    except (TypeError, OverflowError):
        raise InvalidArgumentError(
            f"index is {value!r}; it must be an integer from 0 to 2**64 - 1"
        ) from None


@cython.freelist(64)
@cython.no_gc_clear  # __dealloc__ needs `pool`
@cython.final
cdef class Buf:
    """One object of a pool, with the buffer protocol (writable bytes, contiguous).

    Dropping the last reference, `release()` or leaving the `with` block returns it to its pool; a
    memoryview or array over it keeps it out. Pickling copies the bytes. Made by `Pool.acquire`.
    """

    def __init__(self):
        raise TypeError("a Buf is made by Pool.acquire()")

    cdef int out(self) except -1:
        if self.data is NULL:
            raise StateError("the buffer was released")
        return 0

    @property
    def index(self):
        """Index of the object in its pool (int)."""
        self.out()
        return pyrt_pool_index_of(self.pool.handle, self.data)

    @property
    def ptr(self):
        """Address of the object (int)."""
        self.out()
        return <intptr_t>self.data

    @property
    def nbytes(self):
        """Size of the object in bytes (int)."""
        return self.pool.object_bytes_

    def __len__(self):
        return self.pool.object_bytes_

    def release(self):
        """Return the object to its pool.

        Raises
        ------
        BufferError
            A memoryview or array over the buffer is alive.
        pyruntime.errors.StateError
            It was released already.
        """
        cdef void* data = self.data
        cdef pyrt_status status
        self.out()
        if self.exports != 0:
            raise BufferError(f"{self.exports} views of the buffer are alive; drop them first")
        self.data = NULL
        status = pyrt_pool_put(self.pool.handle, data)
        if status != PYRT_OK:
            self.data = data
            fail(status)
        self.pool.bufs -= 1

    def __enter__(self):
        self.out()
        return self

    def __exit__(self, kind, error, traceback):
        if self.data is not NULL:
            self.release()

    def __getbuffer__(self, Py_buffer* view, int flags):
        self.out()
        PyBuffer_FillInfo(view, self, self.data, self.pool.object_bytes_, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1

    def __dlpack__(self, **options):
        import numpy as np

        return np.frombuffer(self, np.uint8).__dlpack__(**options)

    def __dlpack_device__(self):
        self.out()
        return (1, 0)  # kDLCPU

    def __reduce__(self):
        return bytearray, (bytes(self),)

    def __repr__(self):
        if self.data is NULL:
            return "<Buf: released>"
        return f"<Buf: object {self.index}, {self.pool.object_bytes_} bytes>"

    def __dealloc__(self):
        if self.data is not NULL:
            # A refusal (a forked child that excludes the pool) leaves nothing to return to.
            pyrt_pool_put(self.pool.handle, self.data)
            self.pool.bufs -= 1


cdef inline Buf wrap(PoolHandle pool, void* data):
    cdef Buf buf = Buf.__new__(Buf)
    buf.pool = pool
    buf.data = data
    pool.bufs += 1
    return buf


cdef class PoolHandle:
    """The hot calls of `pyruntime.pool.Pool`, which derives from it and documents them."""

    def __cinit__(self, *args, **kwargs):
        self.handle = NULL

    def _open(self, owner):
        if self.handle is not NULL:
            raise StateError("the pool is open already")
        self.owner = owner
        self.object_bytes_ = owner.layout()["object_bytes"]
        self.handle = <pyrt_pool*><intptr_t>owner.address

    def _close(self, bint force):
        if self.handle is NULL:
            return
        if self.calls_in_flight:
            raise StateError(f"{self.calls_in_flight} calls on the pool are in flight")
        if self.exports:
            raise BufferError(f"{self.exports} views of the pool are alive; drop them first")
        self.owner.destroy(force)
        self.handle = NULL

    cdef int usable(self) except -1:
        if self.handle is NULL:
            raise ClosedError("the pool is closed")
        return 0

    cdef void* get_or_raise(self) except NULL:
        # The bulk call says why; another thread may have released an object meanwhile.
        cdef void* data
        cdef pyrt_status status = pyrt_pool_get_bulk(self.handle, &data, 1)
        if status != PYRT_OK:
            fail(status)
        return data

    @property
    def num_bufs(self):
        """Buffers that are out (int)."""
        return self.bufs

    def acquire(self):
        """Take one object out as a `Buf`; see `Pool`."""
        cdef void* data
        self.usable()
        data = pyrt_pool_get(self.handle)
        if data is NULL:
            data = self.get_or_raise()
        return wrap(self, data)

    def try_acquire(self):
        """Take one object out as a `Buf`, or return None when the pool is exhausted."""
        cdef void* data
        self.usable()
        data = pyrt_pool_get(self.handle)
        return None if data is NULL else wrap(self, data)

    def acquire_index(self):
        """Take one object out and return its index; the caller owes `release_index`."""
        cdef void* data
        self.usable()
        data = pyrt_pool_get(self.handle)
        if data is NULL:
            data = self.get_or_raise()
        return pyrt_pool_index_of(self.handle, data)

    def release_index(self, index):
        """Return the object `index`."""
        cdef void* data
        self.usable()
        data = pyrt_pool_ptr_of(self.handle, as_index(index))
        if data is NULL:
            raise InvalidArgumentError(f"index is {index}; the pool has made no such object")
        cdef pyrt_status status = pyrt_pool_put(self.handle, data)
        if status != PYRT_OK:
            fail(status)

    def acquire_into(self, indices):
        """Take ``len(indices)`` objects out, all or none, and write their indices."""
        if self._acquire_into(indices) != PYRT_OK:
            fail(PYRT_EFULL)

    def try_acquire_into(self, indices):
        """Like `acquire_into`, but return False when fewer are to be had."""
        return self._acquire_into(indices) == PYRT_OK

    cdef pyrt_status _acquire_into(self, indices) except? 1:
        cdef Py_buffer view
        cdef pyrt_status status
        self.usable()
        take_indices(indices, True, &view)
        cdef size_t n = view.len // 4
        if <Py_ssize_t>n < RELEASE_GIL_FROM:
            status = pyrt_pool_get_indices(self.handle, <uint32_t*>view.buf, n)
        else:
            self.calls_in_flight += 1
            with nogil:
                status = pyrt_pool_get_indices(self.handle, <uint32_t*>view.buf, n)
            self.calls_in_flight -= 1
        PyBuffer_Release(&view)
        if status != PYRT_OK and status != PYRT_EFULL:
            fail(status)
        return status

    def release_from(self, indices):
        """Return the objects `indices`, all or none."""
        cdef Py_buffer view
        cdef pyrt_status status
        self.usable()
        take_indices(indices, False, &view)
        cdef size_t n = view.len // 4
        if <Py_ssize_t>n < RELEASE_GIL_FROM:
            status = pyrt_pool_put_indices(self.handle, <const uint32_t*>view.buf, n)
        else:
            self.calls_in_flight += 1
            with nogil:
                status = pyrt_pool_put_indices(self.handle, <const uint32_t*>view.buf, n)
            self.calls_in_flight -= 1
        PyBuffer_Release(&view)
        if status != PYRT_OK:
            fail(status)

    def __getbuffer__(self, Py_buffer* view, int flags):
        # The committed part of the region, for `Pool.array`; close() waits for it to be dropped.
        self.usable()
        layout = self.owner.layout()
        PyBuffer_FillInfo(
            view, self, <void*><intptr_t>layout["base"], layout["committed_bytes"], 0, flags
        )
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1

    def __reduce__(self):
        raise TypeError("a pool is memory of this process and cannot be pickled")
