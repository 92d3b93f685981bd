"""The pool on a device that is the shim; run by test_gpu.py in a process of its own."""

import gc

import numpy as np
import pytest
from library import OnDevice

from pyruntime import errors, gpu
from pyruntime.pool import Pool


def filled(pool, n, seed=0):
    rng = np.random.default_rng(seed)
    indices = np.empty(n, np.uint32)
    pool.acquire_into(indices)
    data = rng.integers(0, 256, (n, pool.object_bytes), np.uint8)
    pool.write(indices, data)
    return indices, data


def test_a_device_is_there():
    assert gpu.available()
    assert gpu.info()["num_devices"] == 1


@pytest.mark.parametrize("object_bytes", [16, 100, 2048, 40_000])
def test_read_and_write_are_those_of_the_host(object_bytes):
    with Pool(object_bytes, 300) as pool:
        indices, data = filled(pool, 64)
        pool.pin()
        pool.pin()
        out = np.zeros((64, object_bytes), np.uint8)
        order = np.random.default_rng(1).permutation(64)
        pool.read_async(OnDevice(indices[order]), OnDevice(out), stream=0)
        gpu.synchronize()
        assert (out == data[order]).all()
        pool.write_async(OnDevice(indices), OnDevice(out[::-1].copy()))
        gpu.synchronize()
        assert (pool.read(indices) == out[::-1]).all()
        pool.release_from(indices)


def test_rows_may_have_gaps_and_bad_indices_are_left_alone():
    with Pool(64, 100) as pool:
        indices, data = filled(pool, 3)
        pool.pin()
        rows = np.full((3, 80), 7, np.uint8)
        wanted = indices.copy()
        wanted[1] = 2**32 - 1
        pool.read_async(OnDevice(wanted), OnDevice(rows[:, :64]))
        gpu.synchronize()
        assert (rows[[0, 2], :64] == data[[0, 2]]).all()
        assert (rows[1] == 7).all()
        assert (rows[:, 64:] == 7).all()
        pool.release_from(indices)


def test_the_pool_must_be_pinned():
    with Pool(64, 10) as pool:
        one = OnDevice(np.zeros(1, np.uint32)), OnDevice(np.zeros((1, 64), np.uint8))
        for call in (pool.read_async, pool.write_async):
            with pytest.raises(errors.StateError, match="pin"):
                call(*one)
        pool.pin()
        with pytest.raises(errors.StateError, match="unpin"):
            pool.trim()
        pool.unpin()
        pool.unpin()
        with pytest.raises(errors.StateError, match="pin"):
            pool.read_async(*one)
        pool.trim()


def test_a_grown_pool_is_pinned_again():
    with Pool(4096, 10, max_capacity=10_000) as pool:
        pool.pin()
        indices, data = filled(pool, 2000)
        out = np.full((2000, 4096), 3, np.uint8)
        pool.read_async(OnDevice(indices), OnDevice(out))
        assert (out == 3).all(axis=1).sum() > 0, "objects that came later are not pinned"
        pool.pin()
        pool.read_async(OnDevice(indices), OnDevice(out))
        assert (out == data).all()
        pool.release_from(indices)


def test_a_pool_that_cannot_close_stays_pinned():
    pool = Pool(64, 10)
    index = pool.acquire_index()
    pool.pin()
    with pytest.raises(errors.StateError):
        pool.close()
    pool.read_async(OnDevice(np.zeros(1, np.uint32)), OnDevice(np.zeros((1, 64), np.uint8)))
    pool.release_index(index)
    pool.close()
    with pytest.raises(errors.ClosedError):
        pool.pin()


def test_dropping_a_pinned_pool_unpins_it():
    pool = Pool(64, 10)
    pool.pin()
    del pool
    gc.collect()


INDICES = np.zeros(4, np.uint32)
ROWS = np.zeros((4, 64), np.uint8)


@pytest.mark.parametrize(
    ("indices", "out", "match"),
    [
        (INDICES, OnDevice(ROWS), "host memory"),
        ([0, 1], OnDevice(ROWS), "no array"),
        (OnDevice(INDICES), ROWS, "host memory"),
        (OnDevice(INDICES.astype(np.int64)), OnDevice(ROWS), "uint32"),
        (OnDevice(INDICES.reshape(2, 2)), OnDevice(ROWS), "1 dimension"),
        (OnDevice(np.zeros(8, np.uint32)[::2]), OnDevice(ROWS), "contiguous"),
        (OnDevice(INDICES), OnDevice(ROWS.astype(np.int8)), "uint8"),
        (OnDevice(INDICES), OnDevice(ROWS[:3]), "shape"),
        (OnDevice(INDICES), OnDevice(np.zeros((4, 65), np.uint8)), "shape"),
        (OnDevice(INDICES), OnDevice(np.zeros((4, 128), np.uint8)[:, ::2]), "strides"),
        (OnDevice(INDICES), OnDevice(ROWS[::-1]), "strides"),
        (OnDevice(INDICES), OnDevice(ROWS, read_only=True), "read-only"),
        (OnDevice(np.zeros(20, np.uint8)[1:17].view(np.uint32)), OnDevice(ROWS), "aligned"),
    ],
)
def test_arrays_of_the_wrong_kind(indices, out, match):
    with Pool(64, 10) as pool:
        pool.pin()
        with pytest.raises(errors.InvalidArgumentError, match=match):
            pool.read_async(indices, out)


def test_streams():
    class Named:
        ptr = 7

    class Protocol:
        def __cuda_stream__(self):
            return (0, 9)

    assert gpu.stream_handle() == 0
    assert gpu.stream_handle(5) == 5
    assert gpu.stream_handle(Named()) == 7
    assert gpu.stream_handle(Protocol()) == 9
    for bad in ("0", -1, 1 << 64, object()):
        with pytest.raises(errors.InvalidArgumentError):
            gpu.stream_handle(bad)
    with Pool(64, 10) as pool:
        pool.pin()
        pool.read_async(OnDevice(INDICES, stream=1), OnDevice(ROWS, stream=2), stream=3)


def test_registrations_close_once():
    memory = np.zeros(4096, np.uint8)
    with gpu.Registration(memory.ctypes.data, memory.nbytes) as registration:
        registration.close()
    for address, num_bytes in ((0, 10), (memory.ctypes.data, 0)):
        with pytest.raises(errors.InvalidArgumentError):
            gpu.Registration(address, num_bytes)
