"""Run the CMake build; every compiler flag lives in CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self):
        tree = ROOT if self.inplace else Path(self.build_lib).resolve()
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # The interpreter and ninja may live in a build environment that is gone next time:
        # both are passed on every configure, never taken from the cache.
        configure = [
            "cmake",
            "-S",
            ROOT,
            "-B",
            work,
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={tree}",
        ]
        configure += shlex.split(os.environ.get("PYRUNTIME_CMAKE_ARGS", ""))
        for command in (
            configure,
            ["cmake", "--build", work],
            ["cmake", "--install", work, "--component", "runtime"],
        ):
            subprocess.run(command, check=True)

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension("pyruntime._ext._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
