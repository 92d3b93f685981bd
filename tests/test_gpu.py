"""What needs no device: typed refusals, and everything above the kernels on the host shim."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyruntime import errors, gpu
from pyruntime.pool import Pool

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "shim"))
import library as shim  # noqa: E402


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def shim_library(tmp_path_factory):
    if shim.COMPILER is None:
        pytest.skip("no C++ compiler")
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("checks", sorted((HERE / "shim").glob("check_*.py")), ids=lambda p: p.stem)
def test_on_the_shim(shim_library, checks):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env={
            **os.environ,
            "PYRUNTIME_CUDA_LIBRARY": str(shim_library),
            "PYTHONPATH": str(HERE / "shim"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


REFUSED = """
import numpy as np
from pyruntime import errors, gpu
from pyruntime.pool import Pool
assert not gpu.available()
with Pool(64, 10) as pool:
    for call in (gpu.info, gpu.synchronize, pool.pin):
        try:
            call()
        except errors.DeviceUnavailableError as error:
            print(error)
        else:
            raise AssertionError(call)
"""


def test_built_without_cuda():
    said = python(REFUSED, PYRUNTIME_CUDA_LIBRARY="/nowhere/libpyruntime_cuda.so").splitlines()
    assert len(said) == 3
    assert all(line.startswith("built without CUDA: ") for line in said)


def test_a_library_that_is_none_of_ours(tmp_path):
    if shim.COMPILER is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "other.cpp", tmp_path / "other.so"
    code = (
        "import sys\nfrom pyruntime import errors, gpu\n"
        "try:\n    gpu.info()\nexcept errors.VersionError as error:\n    print(error)\n"
    )
    for text, expected in (
        ("", "another build"),
        ('extern "C" int pyrt_cuda_abi_version() { return 999; }', "ABI 999"),
    ):
        source.write_text(text)
        command = [shim.COMPILER, "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        assert expected in python(code, PYRUNTIME_CUDA_LIBRARY=str(library))


FAKE = """
extern "C" {
int pyrt_cuda_abi_version() { return ABI; }
int pyrt_cuda_device_count(int* count) { *count = COUNT; return ERROR; }
int pyrt_cuda_versions(int* driver, int* runtime) { *driver = DRIVER; *runtime = 13000; return 0; }
const char* pyrt_cuda_error_name(int) { return "cudaErrorName"; }
const char* pyrt_cuda_error_text(int) { return "a text"; }
int pyrt_cuda_synchronize(void*) { return 700; }
}
"""


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"ERROR": 35, "DRIVER": 0}, "DeviceUnavailableError", "no CUDA driver (libcuda"),
        (
            {"ERROR": 35, "DRIVER": 12020},
            "DeviceUnavailableError",
            "it supports CUDA 12.2, not 13.0",
        ),
        ({"ERROR": 100}, "DeviceUnavailableError", "no device: the CUDA driver sees none"),
        ({"ERROR": 0}, "DeviceUnavailableError", "no device: the CUDA driver sees none"),
        (
            {"ERROR": 999},
            "DeviceUnavailableError",
            "no device: the CUDA driver gives cudaErrorName",
        ),
        ({"COUNT": 1}, "DeviceError", "pyrt_cuda_synchronize: cudaErrorName (700), a text"),
    ],
    ids=["no driver", "old driver", "no device", "zero devices", "broken driver", "failing call"],
)
def test_which_of_the_three_it_is(tmp_path, values, kind, message):
    if shim.COMPILER is None:
        pytest.skip("no C++ compiler")
    from pyruntime._ext import _native

    values = {"ABI": _native.ABI_VERSION, "COUNT": 0, "ERROR": 0, "DRIVER": 13000, **values}
    source, library = tmp_path / "fake.cpp", tmp_path / "fake.so"
    source.write_text(FAKE)
    defines = [f"-D{name}={value}" for name, value in values.items()]
    command = [shim.COMPILER, "-shared", "-fPIC", *defines, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    code = (
        "from pyruntime import errors, gpu\n"
        "for _ in range(2):\n"
        "    try:\n        gpu.synchronize()\n"
        "    except errors.Error as error:\n        print(type(error).__name__, error)\n"
    )
    said = python(code, PYRUNTIME_CUDA_LIBRARY=str(library)).splitlines()
    assert len(said) == 2
    assert all(line.startswith(kind) and message in line for line in said), said


def test_cupy_is_imported_by_nobody_else():
    code = "import sys, pyruntime.pool, pyruntime.gpu; print('cupy' in sys.modules)"
    assert python(code).strip() == "False"


def test_guarded_pools_are_not_pinned():
    with Pool(64, 10, check="guard") as pool, pytest.raises(errors.UnsupportedError):
        pool.pin()


def test_doctor_says_why(shim_library):
    code = (
        "import json, pyruntime.doctor as d; r = d.examine();"
        "print(json.dumps([r['cuda'], r['falls_back_to']]))"
    )
    cuda, notes = json.loads(python(code, PYRUNTIME_CUDA_LIBRARY="/nowhere/x.so"))
    assert "absent" in cuda["library"]
    assert not cuda["usable"]
    assert any("built without CUDA" in note for note in notes)
    cuda, notes = json.loads(python(code, PYRUNTIME_CUDA_LIBRARY=str(shim_library)))
    assert cuda["usable"]
    assert cuda["library"] == str(shim_library)
    assert not any("CUDA" in note for note in notes)


@pytest.mark.skipif(gpu.available(), reason="there is a device here")
def test_this_machine_says_what_it_lacks():
    with pytest.raises(
        errors.DeviceUnavailableError, match=r"built without|no CUDA driver|no device"
    ):
        gpu.info()


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return STATUS; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Fake GPU", size); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : device;
  return 0;
}
"""


@pytest.mark.parametrize("status", [0, 100])
def test_doctor_lists_driver_and_devices(tmp_path, status):
    if shim.COMPILER is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = [shim.COMPILER, "-x", "c", f"-DSTATUS={status}", "-shared", "-fPIC"]
    command += [str(tmp_path / "driver.c"), "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, check=True)
    code = "import json, pyruntime.doctor as d; print(json.dumps(d.examine()['cuda']))"
    cuda = json.loads(python(code, LD_LIBRARY_PATH=str(tmp_path)))
    if status:
        assert "cuInit failed with code 100" in cuda["driver"]
        assert cuda["devices"] == []
    else:
        assert cuda["driver"] == "CUDA 13.1"
        assert cuda["devices"] == ["Fake GPU (sm_90)", "Fake GPU (sm_91)"]
