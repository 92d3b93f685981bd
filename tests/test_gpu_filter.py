"""The cuckoo filter on a GPU, with cupy arrays; skipped where there is none."""

import ctypes
import ctypes.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pyruntime import errors, gpu
from pyruntime.filter import OK, CuckooFilter, DeviceFilter, raw_kernel_options

RAW_KERNEL = """
#include "cuda/filter/device_functions.cuh"
using namespace pyruntime;
extern "C" __global__ void lookup(filter::View view, const uint64_t* keys, size_t n, bool* out) {
  const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) out[i] = filter::contains_u64<BITS, SLOTS>(view, keys[i]);
}
extern "C" __global__ void replace(filter::View view, const uint64_t* keys, size_t n, bool* out) {
  const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = filter::delete_u64<BITS, SLOTS>(view, keys[i]) &&
           filter::insert_u64<BITS, SLOTS>(view, ~keys[i]);
}
static_assert(offsetof(filter::View, buckets) == 40 && offsetof(filter::View, older) == 48);
"""
TOOLKIT = Path("/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKIT / "bin")


def raw_kernel(bits, slots):
    return RAW_KERNEL.replace("BITS", str(bits)).replace("SLOTS", str(slots))


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA")
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("bits", [8, 16])
def test_device_and_host_agree(cp, bits, slots):
    n = 500_000
    keys = np.random.default_rng(1).integers(0, 2**63, 2 * n, dtype=np.uint64)
    host = CuckooFilter(n, bits=bits, slots=slots, seed=2)
    host.insert(keys[: n // 2])
    device = DeviceFilter(host)
    status = device.insert(cp.asarray(keys[n // 2 : n]))
    assert int((status == OK).sum()) == n - n // 2
    answers = cp.asnumpy(device.contains(cp.asarray(keys)))
    assert answers[:n].all()
    back = device.to_host()
    np.testing.assert_array_equal(back.contains(keys), answers)
    assert len(back) == n
    back.verify()
    assert not cp.asnumpy(device.delete(cp.asarray(keys[:n]))).any()
    assert len(device.to_host()) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA")
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("bits", [8, 16])
def test_raw_kernels_agree_with_the_cpu(cp, bits, slots):
    n = 100_000
    keys = np.random.default_rng(1).integers(0, 2**63, 2 * n, dtype=np.uint64)
    host = CuckooFilter(n, bits=bits, slots=slots, seed=2)
    host.insert(keys[: n // 2])
    device = DeviceFilter(host)
    module = cp.RawModule(code=raw_kernel(bits, slots), options=raw_kernel_options())

    def run(name, some):
        out = cp.empty(len(some), cp.bool_)
        grid = ((len(some) + 255) // 256,)
        arguments = (device.raw_view(), cp.asarray(some), np.uint64(len(some)), out)
        module.get_function(name)(grid, (256,), arguments)
        return cp.asnumpy(out)

    np.testing.assert_array_equal(run("lookup", keys), host.contains(keys))
    replaced = run("replace", keys[: n // 2])
    assert replaced.mean() > 0.95
    assert run("lookup", ~keys[: n // 2][replaced]).all()
    assert len(device.to_host()) == replaced.sum()


@pytest.mark.parametrize(("bits", "slots"), [(16, 8), (8, 16)])
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_raw_kernels_compile_with_nvcc(tmp_path, bits, slots):
    source = tmp_path / "kernel.cu"
    source.write_text("#include <cstddef>\n" + raw_kernel(bits, slots))
    options = ["-std=c++17", "-arch=compute_90", *raw_kernel_options()]
    done = subprocess.run(
        [NVCC, *options, "-ptx", source, "-o", tmp_path / "kernel.ptx"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert "ld.acquire.gpu" in ptx and "ld.global.nc.v" not in ptx and ".f64" not in ptx


def load_nvrtc():
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", ctypes.util.find_library("nvrtc")):
        for place in ("", f"{TOOLKIT}/lib64/"):
            try:
                return ctypes.CDLL(f"{place}{name}")
            except OSError:
                pass
    return None


@pytest.mark.parametrize(("bits", "slots"), [(16, 8), (8, 16)])
def test_raw_kernels_compile_with_nvrtc(bits, slots):
    nvrtc = load_nvrtc()
    if nvrtc is None or not (TOOLKIT / "include/cccl").is_dir():
        pytest.skip("no NVRTC, or no toolkit with libcu++")
    source = raw_kernel(bits, slots).replace("offsetof", "__builtin_offsetof")
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
    )
    assert made == 0
    # cupy gives the last one, its own copy, by itself.
    include = f"-I{TOOLKIT}/include/cccl"
    options = ["--gpu-architecture=compute_90", *raw_kernel_options(), include]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    result = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, log.value.decode()
    assert "warning" not in log.value.decode()


def test_raw_views_are_laid_out_as_the_header_has_it():
    from pyruntime.filter.device import _VIEW

    assert _VIEW.itemsize == 56
    assert {name: _VIEW.fields[name][1] for name in _VIEW.names} == {
        "words": 0,
        "epochs": 8,
        "counters": 16,
        "num_segments": 24,
        "seed": 32,
        "buckets": 40,
        "threshold": 44,
        "older": 48,
    }
    layout = CuckooFilter(1000, bits=8, slots=16, seed=5).core.device().layout()
    assert set(_VIEW.names) - set(layout) == {"older"}
    assert (layout["bits"], layout["slots"], layout["seed"], layout["threshold"]) == (8, 16, 5, 4)


def test_without_a_device_it_says_so():
    if gpu.available():
        pytest.skip("there is one")
    with pytest.raises(errors.DeviceUnavailableError):
        DeviceFilter(CuckooFilter(100))


def test_strings_stay_on_the_cpu():
    filter = CuckooFilter(100)
    filter.insert(["a"])
    with pytest.raises(errors.InvalidArgumentError, match="strings"):
        DeviceFilter(filter)


def test_grown_filters_stay_on_the_cpu():
    filter = CuckooFilter(100)
    filter.grow()
    with pytest.raises(errors.UnsupportedError, match="2 generations"):
        DeviceFilter(filter)


def test_words_go_out_and_in():
    filter = CuckooFilter(1000, seed=3)
    filter.insert(np.arange(900))
    words = np.empty(filter.core.device().sizes()[0], np.uint8)
    filter.core.read_words(words)
    assert words.tobytes() == filter.to_bytes()[128:]
    other = CuckooFilter(1000, seed=3)
    other.core.write_words(words)
    assert len(other) == 900 and other.contains(np.arange(900)).all()
    with pytest.raises(errors.InvalidArgumentError):
        other.core.write_words(words[:8])
