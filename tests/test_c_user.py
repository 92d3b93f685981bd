"""C users: headers, the three ways to link, and the symbols the library exports."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyruntime import config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "c_user"
HEADERS = sorted((config.include_dir() / "pyruntime").glob("*.h"))
CC = shutil.which("cc") or shutil.which("gcc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler")


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_cc
def test_with_flags(tmp_path):
    flags = run(sys.executable, "-m", "pyruntime.config", "--cflags", "--libs").split()
    run(CC, "-std=c11", "-Wall", "-Werror", EXAMPLE / "main.c", "-o", tmp_path / "user", *flags)
    assert run(tmp_path / "user").startswith("pyruntime 0.")


@needs_cc
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="pkg-config is not installed")
def test_with_pkg_config(tmp_path):
    path = run(sys.executable, "-m", "pyruntime.config", "--pkgconfigdir")
    flags = run("pkg-config", "--cflags", "--libs", "pyruntime", PKG_CONFIG_PATH=path).split()
    run(CC, EXAMPLE / "main.c", "-o", tmp_path / "user", *flags)
    assert run(tmp_path / "user", LD_LIBRARY_PATH=config.library_dir()).startswith("pyruntime")


@needs_cc
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_with_find_package(tmp_path):
    path = run(sys.executable, "-m", "pyruntime.config", "--cmakedir")
    run("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-Dpyruntime_DIR={path}")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "c_user").startswith("pyruntime")


def test_config_says_what_it_needs():
    done = subprocess.run([sys.executable, "-m", "pyruntime.config"], capture_output=True)
    assert done.returncode == 2


@needs_cc
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
@pytest.mark.parametrize("language", ["c", "c++"])
def test_headers_stand_alone_and_are_strict(tmp_path, header, language):
    if language == "c" and header.suffix == ".hpp":
        pytest.skip("a C++ header")
    source = tmp_path / f"one.{'c' if language == 'c' else 'cpp'}"
    source.write_text(f"#include <pyruntime/{header.name}>\n")
    standard = "-std=c11" if language == "c" else "-std=c++20"
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", standard]
    run(CC, *flags, f"-I{config.include_dir()}", source)


def declared():
    names = set()
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        names |= set(re.findall(r"PYRT_API[^;{]*?\b(pyrt_\w+)\(", text))
    return names


@pytest.mark.skipif(not shutil.which("nm"), reason="binutils are not installed")
def test_exported_symbols_are_the_declared_ones():
    library = config.library_dir() / "libpyruntime.so"
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    exported = {line.split()[-1] for line in lines}
    assert {name for name in exported if name.startswith("pyrt_")} == declared()
    # Nothing of ours leaks under another name; weak template instances of libstdc++ may.
    strong = {line.split()[-1] for line in lines if line.split()[-2] in "TDBR"}
    assert strong == declared()


def test_symbols_are_pinned():
    """A symbol that vanishes breaks users: the list grows only, and only on purpose."""
    pinned = (ROOT / "tests" / "data" / "symbols.txt").read_text().split()
    assert sorted(declared()) == pinned
