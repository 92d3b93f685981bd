"""cffi, ctypes and numba as consumers of the C ABI: the same pool, the same answers."""

import ctypes

import numpy as np
import pytest

from pyruntime import errors, policy
from pyruntime._ext import _native
from pyruntime._ext._cffi import ffi, lib
from pyruntime.pool import Pool


def test_cffi_drives_a_pool_by_the_header_alone():
    options = ffi.new("pyrt_pool_options*")
    lib.pyrt_pool_options_init(options)
    options.object_bytes, options.capacity = 100, 10
    out = ffi.new("pyrt_pool**")
    assert lib.pyrt_pool_create(options, out) == lib.PYRT_OK
    pool = out[0]
    objects = ffi.new("void*[11]")
    assert lib.pyrt_pool_get_bulk(pool, objects, 11) == lib.PYRT_EFULL
    assert b"11 more" in ffi.string(lib.pyrt_last_error())
    assert lib.pyrt_pool_get_bulk(pool, objects, 10) == lib.PYRT_OK
    assert len({int(ffi.cast("uintptr_t", o)) for o in objects[0:10]}) == 10
    assert lib.pyrt_pool_destroy(pool, 0) == lib.PYRT_ESTATE
    assert lib.pyrt_pool_put_bulk(pool, objects, 10) == lib.PYRT_OK
    assert lib.pyrt_pool_destroy(pool, 0) == lib.PYRT_OK


def test_cffi_sees_the_same_abi_version():
    assert lib.PYRT_ABI_VERSION == _native.ABI_VERSION


def test_numba_calls_the_abi():
    numba = pytest.importorskip("numba")
    get, put = policy.c_function("pyrt_pool_get"), policy.c_function("pyrt_pool_put")

    @numba.njit
    def churn(pool, rounds):
        failures = 0
        for _ in range(rounds):
            failures += put(pool, get(pool)) != 0
        return failures

    with Pool(64, 100) as pool:
        assert churn(pool._core.address, 1000) == 0
        assert pool.stats()["gets"] == 1000


def test_a_numba_callback_reaches_native_code():
    numba = pytest.importorskip("numba")
    levels = np.zeros(1, np.int64)

    @numba.cfunc("void(int32, voidptr, voidptr)")
    def on_log(level, message, user):
        numba.carray(user, 1, np.int64)[0] += level

    address = policy.callback_address(on_log)
    set_callback = policy.c_function("pyrt_set_log_callback")
    with Pool(64, 10, check="state") as pool:
        set_callback(address, levels.ctypes.data)
        try:
            index = pool.acquire_index()
            pool.release_index(index)
            pool.array[0, index, 32:] = 1  # a write after release, which the next get reports
            pool.release_index(pool.acquire_index())
        finally:
            set_callback(None, None)
    assert levels[0] == 40


def test_signatures_follow_the_header():
    function = policy.c_function("pyrt_pool_get_layout")
    assert function.restype is ctypes.c_int32
    assert function.argtypes == (ctypes.c_void_p, ctypes.c_void_p)
    assert policy.c_function("pyrt_pool_ptr_of").argtypes[1] is ctypes.c_uint64


def test_unknown_function_is_a_typed_error():
    with pytest.raises(errors.NotFoundError, match="pyrt_nothing"):
        policy.c_function("pyrt_nothing")


@pytest.mark.parametrize("value", [None, 0, -1, True, "f", print])
def test_values_without_an_address_are_refused(value):
    with pytest.raises(errors.InvalidArgumentError):
        policy.callback_address(value)
