"""Where C and C++ users find headers, library, CMake package and pkg-config file.

``python -m pyruntime.config --cflags --libs`` prints what a compiler needs; ``--cmakedir`` and
``--pkgconfigdir`` print what ``find_package(pyruntime)`` and ``PKG_CONFIG_PATH`` need.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

__all__ = ["cmake_dir", "include_dir", "library_dir", "pkgconfig_dir"]

_ROOT = Path(__file__).resolve().parent


def include_dir() -> Path:
    """Return the directory to compile with (``#include <pyruntime/pool.h>``)."""
    return _ROOT / "include"


def library_dir() -> Path:
    """Return the directory of ``libpyruntime.so``."""
    return _ROOT / "lib"


def cmake_dir() -> Path:
    """Return the directory for ``pyruntime_DIR``."""
    return library_dir() / "cmake" / "pyruntime"


def pkgconfig_dir() -> Path:
    """Return the directory for ``PKG_CONFIG_PATH``."""
    return library_dir() / "pkgconfig"


def main(arguments: list[str] | None = None) -> None:
    """Print what was asked for, on one line."""
    libs = [f"-L{library_dir()}", f"-Wl,-rpath,{library_dir()}", "-lpyruntime"]
    answers = {
        "cflags": ("compiler flags", [f"-I{include_dir()}"]),
        "libs": ("linker flags", libs),
        "cmakedir": ("directory of the CMake package", [str(cmake_dir())]),
        "pkgconfigdir": ("directory of the pkg-config file", [str(pkgconfig_dir())]),
    }
    parser = argparse.ArgumentParser(prog="python -m pyruntime.config")
    for name, (text, _) in answers.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"print the {text}")
    given = parser.parse_args(arguments)
    wanted = [words for name, (_, words) in answers.items() if getattr(given, name)]
    if not wanted:
        parser.error("say what to print")
    print(" ".join(shlex.quote(word) for words in wanted for word in words))


if __name__ == "__main__":
    main()
