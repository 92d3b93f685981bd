"""Copies of KV blocks on a GPU, with cupy arrays; skipped where there is none."""

import numpy as np
import pytest

from pyruntime import errors, gpu
from pyruntime.kv import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA"),
]

LAYERS, BLOCKS, PACKED, BLOCK = 4, 300, 120, (16, 8, 64)


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def some_runs(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(BLOCKS // 5)[:20] * 5
    counts = rng.integers(1, 6, 20)
    starts = np.cumsum(counts) - counts
    return np.stack([blocks, starts, counts], axis=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
@pytest.mark.parametrize("pinned", [False, True], ids=["device", "pinned host"])
def test_round_trip(cp, dtype, pinned):
    rng = np.random.default_rng(1)
    host = rng.integers(-100, 100, (LAYERS, 2, BLOCKS, *BLOCK)).astype(dtype)
    shape = (PACKED, LAYERS, 2, *BLOCK)
    stream = cp.cuda.Stream(non_blocking=True)
    if pinned:
        cupyx = pytest.importorskip("cupyx")
        buffer = cupyx.zeros_pinned(shape, dtype)
    with stream:
        cache = cp.asarray(host)
        if not pinned:
            buffer = cp.zeros(shape, dtype)
    runs = some_runs(2)
    device.gather(cache, buffer, runs, stream=stream)
    gpu.synchronize(stream)
    got = buffer if pinned else cp.asnumpy(buffer)
    for start, to, count in runs:
        want = host[:, :, start : start + count].transpose(2, 0, 1, 3, 4, 5)
        assert (got[to : to + count] == want).all()
    with stream:
        other = cp.zeros_like(cache)
    device.scatter(buffer, other, runs[:, [1, 0, 2]], stream=stream)
    gpu.synchronize(stream)
    back = cp.asnumpy(other)
    for start, _, count in runs:
        assert (back[:, :, start : start + count] == host[:, :, start : start + count]).all()


def test_copy_within_and_runs_on_the_device(cp):
    host = np.random.default_rng(3).random((LAYERS, 2, BLOCKS, *BLOCK), np.float32)
    cache = cp.asarray(host)
    device.copy_within(cache, cp.asarray(device.runs_of([(0, 200, 3), (7, 100, 1)])))
    gpu.synchronize()
    got = cp.asnumpy(cache)
    assert (got[:, :, 200:203] == host[:, :, 0:3]).all()
    assert (got[:, :, 100] == host[:, :, 7]).all()
    assert (got[:, :, :100] == host[:, :, :100]).all()


def test_pageable_host_memory_is_refused(cp):
    cache = cp.zeros((LAYERS, 2, BLOCKS, *BLOCK), cp.float16)
    buffer = np.zeros((PACKED, LAYERS, 2, *BLOCK), np.float16)
    with pytest.raises(errors.InvalidArgumentError, match="register"):
        device.gather(cache, buffer, [(0, 0, 1)])
    with gpu.Registration(buffer.ctypes.data, buffer.nbytes, buffer):
        device.gather(cache, buffer, [(0, 0, 1)])
        gpu.synchronize()
