"""Copies of KV blocks on a device that is the shim; run by test_gpu.py in a process of its own."""

import numpy as np
import pytest
from library import OnDevice

from pyruntime import errors, gpu
from pyruntime.kv import device

LAYERS, BLOCKS, PACKED, BLOCK = 3, 20, 8, (16, 2, 4)  # a block of 16 slots, 2 heads of 4 floats


@pytest.fixture(autouse=True)
def no_cupy(monkeypatch):
    monkeypatch.setattr(gpu, "upload", lambda array, stream: OnDevice(array))


def arrays(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    cache = rng.integers(0, 100, (LAYERS, 2, BLOCKS, *BLOCK)).astype(dtype)
    buffer = rng.integers(0, 100, (PACKED, LAYERS, 2, *BLOCK)).astype(dtype)
    return cache, buffer


RUNS = [(3, 0, 4), (17, 4, 1), (0, 6, 2), (5, 5, 0)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_gather_and_scatter(dtype):
    cache, buffer = arrays(dtype)
    expected = buffer.copy()
    for start, to, count in RUNS:
        expected[to : to + count] = cache[:, :, start : start + count].transpose(2, 0, 1, 3, 4, 5)
    device.gather(OnDevice(cache), OnDevice(buffer), RUNS, stream=3)
    assert (buffer == expected).all()
    target = np.zeros_like(cache)
    device.scatter(OnDevice(buffer), OnDevice(target), [(to, start, n) for start, to, n in RUNS])
    kept = np.zeros(BLOCKS, bool)
    for start, _, count in RUNS:
        kept[start : start + count] = True
    assert (target[:, :, kept] == cache[:, :, kept]).all()
    assert (target[:, :, ~kept] == 0).all()


def test_pinned_host_memory_and_strides():
    cache, buffer = arrays()
    device.gather(OnDevice(cache), buffer, [(1, 2, 3)])
    assert (buffer[2:5] == cache[:, :, 1:4].transpose(2, 0, 1, 3, 4, 5)).all()
    # The same cache kept block by block: another view, the same result.
    by_block = np.ascontiguousarray(cache.transpose(2, 0, 1, 3, 4, 5))
    other = np.zeros_like(buffer)
    device.gather(OnDevice(by_block.transpose(1, 2, 0, 3, 4, 5)), other, [(1, 2, 3)])
    assert (other[2:5] == buffer[2:5]).all()


def test_copy_within():
    cache, _ = arrays()
    expected = cache.copy()
    expected[:, :, 10:13] = cache[:, :, 2:5]
    device.copy_within(OnDevice(cache), [(2, 10, 3)])
    assert (cache == expected).all()


def test_runs_that_are_on_the_device_already():
    cache, buffer = arrays()
    expected = buffer.copy()
    expected[0:2] = cache[:, :, 4:6].transpose(2, 0, 1, 3, 4, 5)
    runs = device.runs_of([(4, 0, 2), (2**32 - 5, 3, 4)])  # the second is outside: left alone
    device.gather(OnDevice(cache), OnDevice(buffer), OnDevice(runs))
    assert (buffer == expected).all()
    with pytest.raises(errors.InvalidArgumentError, match="shape"):
        device.gather(OnDevice(cache), OnDevice(buffer), OnDevice(runs[:, :3].copy()))


def test_no_runs():
    cache, buffer = arrays()
    before = buffer.copy()
    device.gather(OnDevice(cache), OnDevice(buffer), [])
    device.gather(OnDevice(cache), OnDevice(buffer), np.empty((0, 3), np.int64))
    device.gather(OnDevice(cache), OnDevice(buffer), [(3, 3, 0)])
    device.gather(OnDevice(cache), OnDevice(buffer), OnDevice(device.runs_of([])))
    assert (buffer == before).all()
    made = device.runs_of([(5, 6, 2), (1, 1, 0), (9, 2, 3)])
    assert made.tolist() == [[0, 5, 6, 2], [2, 9, 2, 3]]


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 0)],
        [1, 2, 3],
        [(0.0, 1.0, 2.0)],
        [(-1, 0, 1)],
        [(0, 0, 1 << 32)],
        [(0, 0, 9)],  # past the buffer
        [(18, 0, 3)],  # past the cache
        [(20, 0, 1)],
        [(0, 8, 1)],
        [(0, 0, 2**31), (0, 0, 2**31)],
        "abc",
    ],
    ids=str,
)
def test_bad_runs(runs):
    cache, buffer = arrays()
    before = buffer.copy()
    with pytest.raises(errors.InvalidArgumentError, match="runs"):
        device.gather(OnDevice(cache), OnDevice(buffer), runs)
    assert (buffer == before).all()


def test_arrays_that_do_not_fit():
    cache, buffer = arrays()
    for wrong in (
        buffer[:, :2],
        buffer[:, :, :1],
        buffer[..., :2].copy(),
        buffer.astype(np.float64),
        buffer[:0],
        buffer[0],
        np.zeros((PACKED, LAYERS, 2), np.float32),
        buffer[..., ::2],
        buffer[..., :2],
    ):
        with pytest.raises(errors.InvalidArgumentError):
            device.gather(OnDevice(cache), OnDevice(wrong), RUNS[:1])
    with pytest.raises(errors.InvalidArgumentError, match="read-only"):
        device.gather(OnDevice(cache), OnDevice(buffer, read_only=True), RUNS[:1])
    with pytest.raises(errors.InvalidArgumentError, match="host memory"):
        device.gather(cache, OnDevice(buffer), RUNS[:1])
