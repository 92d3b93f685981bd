# Hot-path classes for Cython users: `from pyruntime._ext._fast cimport PoolHandle`; a function
# that takes a `PoolHandle` may pass `pool.handle` to the functions of `capi.pxd`.
from pyruntime._ext.capi cimport pyrt_pool, pyrt_status

cdef class PoolHandle:
    cdef pyrt_pool* handle
    cdef object owner
    cdef Py_ssize_t object_bytes_
    cdef Py_ssize_t bufs
    cdef Py_ssize_t exports
    cdef Py_ssize_t calls_in_flight
    cdef object __weakref__
    cdef int usable(self) except -1
    cdef void* get_or_raise(self) except NULL
    cdef pyrt_status _acquire_into(self, indices) except? 1

cdef class Buf:
    cdef PoolHandle pool
    cdef void* data
    cdef Py_ssize_t exports
    cdef int out(self) except -1
