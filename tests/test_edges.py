"""Imports and includes follow the dependency rules; an edge that is not listed is a defect."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORES = {"pool", "filter", "vector", "kv", "moe", "sched", "ops"}
# room -> rooms of csrc/ it may include; a core may also use the pool, which is infrastructure
NATIVE = {
    "base": {"base", "pyruntime"},
    "simd": {"simd", "base", "pyruntime"},
    "capi": {"capi", "base", "simd", "pyruntime", *CORES},
    **{core: {core, "pool", "base", "simd", "pyruntime"} for core in CORES},
}
# module or package of pyruntime -> what it may import of pyruntime besides itself
FACADES = {"pool", "filter", "kv", "moe", "ops", "vector"}
BASIC = {"errors", "log", "metrics", "config", "_ext", ""}
PYTHON = {
    "errors": set(),
    "_ext": BASIC,
    "": BASIC | {"engine"},  # the package offers `LLM`, imported when it is first used
    "config": set(),
    "policy": BASIC,
    "gpu": BASIC,
    "doctor": {*BASIC, "gpu", "pool"},
    "__main__": {"doctor", "serve"},
    **dict.fromkeys(FACADES, BASIC | {"gpu", "policy", "pool", "ops"}),
    "sched": {*BASIC, *FACADES} - {"_ext"},
    "engine": {*BASIC, *FACADES, "sched", "gpu", "models"},
    "serve": {*BASIC, "engine", "sched", "models", "doctor", "filter", "kv"},
    "models": BASIC,
}


def cuda_violations(files):
    """A room of cuda/ sees itself, cuda/base, device.cuh, and what its core shares."""
    bad = []
    for path, text in files:
        room = path.split("/")[1]
        allowed = {"base", "pyruntime", "cuda/include", "cuda/base", f"cuda/{room}"}
        if room in CORES:
            allowed |= {room, "pool"}
        elif room in ("include", "shim"):
            allowed = {"cuda/shim", f"cuda/{room}"}
        elif room == "tests":
            allowed |= {*CORES, *(f"cuda/{core}" for core in CORES), "cuda/shim"}
        for target in re.findall(r'^#include "([a-z_/]+)/', text, re.MULTILINE):
            target = "/".join(target.split("/")[:2]) if target.startswith("cuda/") else target
            if target not in allowed:
                bad.append(f"{path} includes {target}/")
    return bad


def native_violations(files):
    bad = []
    for path, text in files:
        room = path.split("/")[1]
        if room not in NATIVE:
            continue
        targets = re.findall(r'^#include "([a-z_]+)/', text, re.MULTILINE)
        bad += [f"{path} includes {target}/" for target in targets if target not in NATIVE[room]]
    return bad


def python_violations(files):
    bad = []
    for path, text in files:
        room = Path(path).parts[1].removesuffix(".py")
        room = "" if room == "__init__" else room
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                base = node.module or ""
                names = [f"{base}.{a.name}" if base == "pyruntime" else base for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != "pyruntime":
                    continue
                target = parts[1] if len(parts) > 1 else ""
                if target != room and target not in PYTHON.get(room, set()):
                    bad.append(f"{path} imports pyruntime.{target}")
    return bad


def sources(folder, *suffixes):
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes:
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_native_edges():
    assert native_violations(sources("csrc", ".hpp", ".cpp", ".h")) == []


def test_cuda_edges():
    assert cuda_violations(sources("cuda", ".cuh", ".cu", ".hpp", ".cpp")) == []


def test_python_edges():
    assert python_violations(sources("pyruntime", ".py")) == []


def test_planted_edges_are_found():
    assert native_violations([("csrc/base/a.hpp", '#include "pool/pool.hpp"\n')])
    assert native_violations([("csrc/kv/a.hpp", '#include "moe/store.hpp"\n')])
    assert cuda_violations([("cuda/pool/a.cuh", '#include "capi/error.hpp"\n')])
    assert cuda_violations([("cuda/pool/a.cuh", '#include "cuda/kv/kernels.cuh"\n')])
    assert cuda_violations([("cuda/include/a.cuh", '#include "cuda/base/copy.cuh"\n')])
    assert cuda_violations([("cuda/shim/a.hpp", '#include "pool/pool.hpp"\n')])
    assert python_violations([("pyruntime/errors.py", "from pyruntime.pool import Pool\n")])
    assert python_violations([("pyruntime/sched/a.py", "import pyruntime.engine\n")])
