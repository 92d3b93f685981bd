"""Device functions for numba.cuda: in numba's simulator beside the filter on the CPU, compiled for
a GPU without one, and on a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pyruntime import gpu
from pyruntime.filter import CuckooFilter, DeviceFilter

numba = pytest.importorskip("numba")

KERNELS = """
import numpy as np
from numba import cuda
from pyruntime.filter.cuda_jit import contains_u64, copy_back, delete_u64, insert_u64, view_of

@cuda.jit
def lookup(view, keys, out):
    i = cuda.grid(1)
    if i < keys.size:
        out[i] = contains_u64(view, keys[i])

@cuda.jit
def insert(view, keys, out):
    i = cuda.grid(1)
    if i < keys.size:
        out[i] = insert_u64(view, keys[i])

@cuda.jit
def delete(view, keys, out):
    i = cuda.grid(1)
    if i < keys.size:
        out[i] = delete_u64(view, keys[i])

def run(kernel, view, keys):
    out = cuda.to_device(np.zeros(len(keys), np.bool_))
    kernel[(len(keys) + 63) // 64, 64](view, cuda.to_device(keys), out)
    return out.copy_to_host()
"""

SCRIPT = (
    KERNELS
    + """
import itertools, warnings
from pyruntime import errors
from pyruntime.filter import CuckooFilter

warnings.filterwarnings("ignore", message="overflow")  # of numpy's scalars: it is meant
for bits, slots in itertools.product((8, 16), (8, 16)):
    for capacity, seed in ((40, 0), (3000, 2**64 - 3), (140_000, 0x9E3779B97F4A7C15)):
        filter = CuckooFilter(capacity, bits=bits, slots=slots, seed=seed)
        filter.insert(np.arange(capacity))
        asked = np.random.default_rng(capacity).integers(-capacity, 2 * capacity, 256)
        asked[:4] = 0, -1, 2**63 - 1, -(2**63)
        for keys in (asked, asked.view(np.uint64)):
            np.testing.assert_array_equal(run(lookup, view_of(filter), keys), filter.contains(keys))
    assert filter.stats()["num_segments"] >= 3

    # What they store and take is what the CPU finds.
    filter = CuckooFilter(200, bits=bits, slots=slots, seed=5)
    view, keys = view_of(filter), np.arange(-90, 90)
    assert run(insert, view, keys).all() and run(lookup, view, keys).all()
    copy_back(view, filter)
    assert filter.contains(keys).all() and len(filter) == 180
    filter.verify()
    # 16 or 32 copies of one key are as many as its buckets hold.
    filter = CuckooFilter(200, bits=bits, slots=slots, seed=5)
    view, copies = view_of(filter), np.full(40, 7)
    assert run(insert, view, copies).sum() == 2 * slots
    assert run(delete, view, copies).sum() == 2 * slots
    assert not run(lookup, view, copies).any() and not any(view.words.copy_to_host())
    assert int(view.epochs.copy_to_host().sum()) >= 2 * slots
    # The last ones find no room without a relocation, which is no reason to lose one.
    filter = CuckooFilter(100, bits=bits, slots=slots, seed=6)
    view, keys = view_of(filter), np.arange(filter.stats()["num_slots"])
    stored = run(insert, view, keys)
    assert 0.7 < stored.mean() < 1
    assert run(lookup, view, keys[stored]).all()
    copy_back(view, filter)
    assert len(filter) == stored.sum() and filter.contains(keys[stored]).all()
    assert run(delete, view, keys[stored]).all() and not any(view.words.copy_to_host())

def refused(kind, call, *arguments):
    try:
        call(*arguments)
    except kind:
        return True
    return False

assert refused(errors.InvalidArgumentError, copy_back, view, CuckooFilter(100, seed=1))
assert refused(errors.InvalidArgumentError, view_of, "filter")
filter = CuckooFilter(10)
filter.insert(["a"])
assert refused(errors.InvalidArgumentError, view_of, filter)
filter = CuckooFilter(10)
filter.grow()
assert refused(errors.UnsupportedError, view_of, filter)
"""
)


def test_the_simulator_agrees_with_the_cpu():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_compiled_arithmetic_is_that_of_the_simulator():
    cuda_jit = pytest.importorskip("pyruntime.filter.cuda_jit")
    locate = numba.njit(cuda_jit._locate)
    zero_lanes = numba.njit(cuda_jit._zero_lanes)
    random = np.random.default_rng(1)
    for bits, slots in ((8, 8), (16, 8), (8, 16), (16, 16)):
        counts = (np.uint64(n) for n in (7, 2**64 - 5, 4098, 3, bits, slots))
        view = cuda_jit.TableView(np.zeros(1, np.uint64), np.zeros(1, np.uint32), *counts)
        with np.errstate(over="ignore"):
            for word in random.integers(0, 2**64, 100, dtype=np.uint64):
                assert locate(view, word) == cuda_jit._locate(view, word)
                assert locate(view, np.int64(word >> np.uint64(1))) == cuda_jit._locate(
                    view, word >> np.uint64(1)
                )
                assert zero_lanes(view, word) == cuda_jit._zero_lanes(view, word)


def test_they_compile_for_a_gpu_without_one(monkeypatch):
    from numba import cuda, types
    from numba.cuda import dispatcher

    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("numba is its simulator here")
    cuda_jit = pytest.importorskip("pyruntime.filter.cuda_jit")
    if os.path.isdir("/usr/local/cuda"):
        monkeypatch.setenv("CUDA_HOME", os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    device = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)
    one = np.uint64(1)
    view = cuda_jit.TableView(np.zeros(1, np.uint64), np.zeros(1, np.uint32), *[one] * 6)
    for function in (cuda_jit.contains_u64, cuda_jit.insert_u64, cuda_jit.delete_u64):

        def kernel(view, keys, out):
            i = cuda.grid(1)
            if i < keys.size:
                out[i] = function(view, keys[i])  # noqa: B023

        signature = types.void(numba.typeof(view), types.int64[::1], types.boolean[::1])
        try:
            ptx, _ = cuda.compile_ptx(kernel, signature, device=False, cc=(9, 0))
        except Exception as error:
            if "nvvm" in str(error).lower() or "libdevice" in str(error).lower():
                pytest.skip(f"no libNVVM: {error}")
            raise
        assert ".f64" not in ptx  # what an uint64 beside an int64 becomes
        assert "ld.global.nc" not in ptx and "ld.global.u64" in ptx
        assert ("atom.global.cas.b64" in ptx) == (function is not cuda_jit.contains_u64)


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA")
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_device_agrees_with_the_cpu(bits, slots):
    kernels = {}
    exec(KERNELS, kernels)
    run, lookup, view_of = kernels["run"], kernels["lookup"], kernels["view_of"]
    n = 200_000
    keys = np.random.default_rng(1).integers(0, 2**63, 2 * n)
    filter = CuckooFilter(n, bits=bits, slots=slots, seed=2)
    filter.insert(keys[: n // 2])
    view = view_of(filter)
    np.testing.assert_array_equal(run(lookup, view, keys), filter.contains(keys))
    stored = run(kernels["insert"], view, keys[n // 2 : n])
    kernels["copy_back"](view, filter)
    assert len(filter) == n // 2 + stored.sum() and stored.mean() > 0.9
    assert filter.contains(keys[n // 2 : n][stored]).all()
    filter.verify()
    assert run(kernels["delete"], view, keys[: n // 2]).all()
    kernels["copy_back"](view, filter)
    assert len(filter) == stored.sum() and filter.contains(keys[n // 2 : n][stored]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA")
def test_a_device_filter_is_shared():
    pytest.importorskip("cupy")
    kernels = {}
    exec(KERNELS, kernels)
    filter = CuckooFilter(1000, seed=3)
    device = DeviceFilter(filter)
    view, keys = kernels["view_of"](device), np.arange(500)
    assert kernels["run"](kernels["insert"], view, keys).all()
    assert device.to_host().contains(keys).all()
