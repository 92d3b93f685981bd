# The C ABI for Cython users: `from pyruntime._ext.capi cimport pyrt_pool_get`.
# Include and link flags: `python -m pyruntime.config`.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "pyruntime/abi.h" nogil:
    ctypedef int32_t pyrt_status
    const char* pyrt_last_error()
    pyrt_status PYRT_OK
    pyrt_status PYRT_EFULL

cdef extern from "pyruntime/pool.h" nogil:
    ctypedef struct pyrt_pool:
        pass
    void* pyrt_pool_get(pyrt_pool* pool)
    pyrt_status pyrt_pool_put(pyrt_pool* pool, void* object)
    pyrt_status pyrt_pool_get_bulk(pyrt_pool* pool, void** out, size_t n)
    pyrt_status pyrt_pool_put_bulk(pyrt_pool* pool, void** objects, size_t n)
    pyrt_status pyrt_pool_get_indices(pyrt_pool* pool, uint32_t* out, size_t n)
    pyrt_status pyrt_pool_put_indices(pyrt_pool* pool, const uint32_t* indices, size_t n)
    void* pyrt_pool_ptr_of(const pyrt_pool* pool, uint64_t index)
    int64_t pyrt_pool_index_of(const pyrt_pool* pool, const void* object)
