"""Build the kernels of cuda/ for the host: a library to name in PYRUNTIME_CUDA_LIBRARY.

Its one device is the shim, whose memory is the host's: everything above the kernels (loader, C ABI,
bindings, facades) runs as with a GPU. Array in host memory pass for device arrays through
`OnDevice`.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


def build(directory):
    """Compile every .cu with the shim; returns the library's path."""
    library = directory / "libpyruntime_cuda_shim.so"
    sources = [*sorted(ROOT.glob("cuda/*/*.cu")), ROOT / "cuda/shim/cuda_host.cpp"]
    includes = [f"-I{ROOT / part}" for part in ("", "csrc", "csrc/include")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    command = [COMPILER, *flags, *includes, "-x", "c++", *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class OnDevice:
    """A numpy array that says it lies in device memory."""

    def __init__(self, array, stream=None, read_only=False):
        self.array = np.asarray(array)
        self.__cuda_array_interface__ = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, read_only),
            "strides": self.array.strides,
            "version": 3,
            "stream": stream,
        }
