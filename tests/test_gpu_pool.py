"""The pool's copies on a GPU, with cupy arrays; skipped where there is none."""

import numpy as np
import pytest

from pyruntime import errors, gpu
from pyruntime.pool import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA"),
]


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def filled(pool, n):
    indices = np.empty(n, np.uint32)
    pool.acquire_into(indices)
    data = np.random.default_rng(n).integers(0, 256, (n, pool.object_bytes), np.uint8)
    pool.write(indices, data)
    return indices, data


@pytest.mark.parametrize("object_bytes", [16, 100, 333, 2048, 40_000])
def test_round_trip(cp, object_bytes):
    with Pool(object_bytes, 3000) as pool:
        indices, data = filled(pool, 2000)
        pool.pin()
        stream = cp.cuda.Stream(non_blocking=True)
        order = np.random.default_rng(1).permutation(2000)
        with stream:
            where = cp.asarray(indices[order])
            out = cp.zeros((2000, object_bytes), cp.uint8)
            pool.read_async(where, out, stream=stream)
            host = cp.asnumpy(out, stream=stream)
        stream.synchronize()
        assert (host == data[order]).all()
        with stream:
            pool.write_async(where, out[::-1].copy(), stream=stream)
        gpu.synchronize(stream)
        assert (pool.read(indices[order]) == host[::-1]).all()
        pool.release_from(indices)


def test_dlpack_and_torch(cp):
    torch = pytest.importorskip("torch")
    with Pool(256, 100) as pool:
        indices, data = filled(pool, 50)
        pool.pin()
        out = torch.zeros((50, 256), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        pool.read_async(cp.asarray(indices), out, stream=torch.cuda.current_stream())
        torch.cuda.synchronize()
        assert (out.cpu().numpy() == data).all()

        class OnlyDlpack:
            def __dlpack__(self, **kwargs):
                return out.__dlpack__(**kwargs)

            def __dlpack_device__(self):
                return out.__dlpack_device__()

        out.zero_()
        torch.cuda.synchronize()
        pool.read_async(cp.asarray(indices), OnlyDlpack())
        gpu.synchronize()
        assert (out.cpu().numpy() == data).all()
        pool.release_from(indices)


def test_bad_indices_are_left_alone(cp):
    with Pool(64, 10) as pool:
        indices, data = filled(pool, 2)
        pool.pin()
        out = cp.full((3, 64), 9, cp.uint8)
        where = cp.asarray(np.array([indices[0], 2**32 - 1, indices[1]], np.uint32))
        cp.cuda.Device().synchronize()
        pool.read_async(where, out)
        gpu.synchronize()
        assert (cp.asnumpy(out)[[0, 2]] == data).all()
        assert (cp.asnumpy(out)[1] == 9).all()
        pool.release_from(indices)


def test_memory_is_registered_once():
    memory = np.zeros(1 << 20, np.uint8)
    registered = gpu.Registration(memory.ctypes.data, memory.nbytes)
    with registered, pytest.raises(errors.DeviceError, match="AlreadyRegistered"):
        gpu.Registration(memory.ctypes.data, memory.nbytes)
    with gpu.Registration(memory.ctypes.data, memory.nbytes):
        pass
