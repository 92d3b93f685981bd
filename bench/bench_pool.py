"""The memory pool beside DPDK's mempool, general allocators and hand-written pools.

The native comparison is a C++ program (``native/pool_pairs.cpp``), compiled on first use: every
round runs every contender once, so a ratio compares neighbours in time. Peers that are not
installed are left out, and the figures say so. README.md in this folder says how to install each.

Python's costs are measured in this process, ours and the peer's in turns.
"""

import ctypes.util
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from bench.support import middle, size
from pyruntime import config
from pyruntime.pool import Pool

HERE = Path(__file__).parent
CXX = shutil.which("c++") or shutil.which("g++")
FUNCTIONS = {
    "mimalloc": "mi_malloc:mi_free",
    "jemalloc": "malloc:free",
    "tcmalloc_minimal": "tc_malloc:tc_free",
}


def allocators():
    """Return ``NAME=LIBRARY:malloc:free`` of the allocators that are installed."""
    found = []
    for name, functions in FUNCTIONS.items():
        path = os.environ.get(f"PYRUNTIME_{name.upper()}") or ctypes.util.find_library(name)
        if path:
            found.append(f"{name} {Path(path).resolve().name}={path}:{functions}")
    return found


def dpdk_flags():
    """Return compiler flags for DPDK from pkg-config, none where it is not installed."""
    if shutil.which("pkg-config") is None:
        return []

    def ask(*arguments):
        done = subprocess.run(
            ["pkg-config", *arguments, "libdpdk"], capture_output=True, text=True, check=False
        )
        return done.stdout.split() if done.returncode == 0 else []

    folder = ask("--variable=libdir")
    if not folder:
        return []
    find = f"-Wl,--disable-new-dtags,-rpath,{folder[0]}"
    return ["-DPAIR_DPDK", *ask("--cflags"), *ask("--libs"), find]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compile the native runner."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("pool") / "pool_pairs"
    library = config.library_dir()
    source = str(HERE / "native" / "pool_pairs.cpp")
    command = [CXX, "-O3", "-march=native", "-std=c++20", "-pthread", source, "-o", str(out)]
    command += [f"-I{config.include_dir()}", f"-L{library}", f"-Wl,-rpath,{library}", "-lpyruntime"]
    done = subprocess.run([*command, "-ldl", *dpdk_flags()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def compare(ns):
    """Return median nanoseconds by contender, and the three quartiles of its ratios to ours."""
    told = {name: {"ns": round(statistics.median(values), 3)} for name, values in ns.items()}
    for base, key in (("pyruntime", "ratio"), ("pyruntime inlined", "ratio_to_inlined")):
        for name, theirs in ns.items():
            if base not in ns or name.startswith("pyruntime"):
                continue
            ratios = [b / a for a, b in zip(ns[base], theirs, strict=True)]
            told[name][key] = [round(q, 2) for q in statistics.quantiles(ratios, n=4)]
    return told


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pages", ["thp", "4k"])
def test_native(benchmark, program, pages):
    rounds, scale, large = size(benchmark, (41, 4, 1), (2, 200, 0))
    command = [str(program), str(rounds), str(scale), pages, str(large), *allocators()]
    # jemalloc's thread-local block is one that dlopen must find room for.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=65536"}

    def run():
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    answer = benchmark.pedantic(run, rounds=1, iterations=1)
    info = benchmark.extra_info
    info["dpdk"] = answer["dpdk"] or "not installed"
    info["peers"] = [word.split("=")[0] for word in allocators()]
    info["acquire_ns"] = answer["acquire_ns"]
    info["huge_coverage"] = round(answer["huge_bytes"] / answer["committed_bytes"], 3)
    for workload, ns in answer["ns"].items():
        info[workload] = compare(ns)


def paired(benchmark, ours, peers, per_call=1):
    """Record nanoseconds per object of `ours` and each of `peers`, rounds in turns."""
    rounds, calls = size(benchmark, (31, 20_000), (1, 50))
    everyone = {"pyruntime": ours, **peers, "empty loop": lambda: None}
    taken = {name: [] for name in everyone}
    for _ in range(rounds):
        for name, call in everyone.items():
            start = time.thread_time_ns()
            for _ in range(calls):
                call()
            taken[name].append((time.thread_time_ns() - start) / calls)
    benchmark.pedantic(ours, rounds=size(benchmark, 1000, 1))
    loop = middle(taken.pop("empty loop"))
    mine = taken["pyruntime"]
    for name, values in taken.items():
        ratio = middle([(b - loop) / max(a - loop, 1) for a, b in zip(mine, values, strict=True)])
        benchmark.extra_info[name] = {
            "ns": round((middle(values) - loop) / per_call, 2),
            "ratio": round(ratio, 2),
        }


def test_python_single(benchmark):
    """A handle from the pool, against a free list of bytearrays."""
    with Pool(2048, 4096) as pool:
        get, put = pool.acquire_index, pool.release_index
        free = [bytearray(2048) for _ in range(64)]
        pop, push = free.pop, free.append

        def ours():
            put(get())

        def free_list():
            push(pop())

        paired(benchmark, ours, {"list free-list": free_list})


def test_python_buffer(benchmark):
    """A buffer acquired and dropped, against a new bytearray and a new array."""
    with Pool(2048, 4096) as pool:
        acquire = pool.acquire

        def ours():
            acquire()

        def new_bytearray():
            bytearray(2048)

        def new_array():
            np.empty(2048, np.uint8)

        paired(benchmark, ours, {"bytearray(2048)": new_bytearray, "np.empty(2048)": new_array})


def test_python_bulk(benchmark):
    """32 handles into an array and back, against a free list and new bytearrays."""
    with Pool(2048, 4096) as pool:
        indices = np.empty(32, np.uint32)
        take, give = pool.acquire_into, pool.release_from
        free = [bytearray(2048) for _ in range(64)]

        def ours():
            take(indices)
            give(indices)

        def free_list():
            held = [free.pop() for _ in range(32)]
            free.extend(held)

        def bytearrays():
            [bytearray(2048) for _ in range(32)]

        paired(benchmark, ours, {"list free-list": free_list, "bytearrays": bytearrays}, 32)


@pytest.mark.timeout(600)
def test_huge_pages(benchmark):
    """A random touch of every object's first word, on huge pages and on 4 KiB ones.

    On hugetlb pages too where the system has them free (`sysctl vm.nr_hugepages=600`).
    """
    count = size(benchmark, 1 << 19, 1024)
    order = np.random.default_rng(0).permutation(count)
    pools = {
        pages: Pool(2048, count, pages=pages, prefault="sync", align=2048)
        for pages in ("thp", "4k", "hugetlb")
    }
    if pools["hugetlb"].stats()["fallbacks"]:
        pools.pop("hugetlb").close()
    words = {pages: pool.array.view(np.uint64) for pages, pool in pools.items()}  # [unit, slot, :]
    places = (*np.divmod(order, words["4k"].shape[1]), 0)
    taken = {pages: [] for pages in pools}
    for _ in range(size(benchmark, 11, 1)):
        for pages, view in words.items():
            start = time.thread_time_ns()
            view[places].sum()
            taken[pages].append((time.thread_time_ns() - start) / count)
    benchmark.pedantic(lambda: words["thp"][places].sum(), rounds=size(benchmark, 5, 1))
    pairs = zip(taken["thp"], taken["4k"], strict=True)
    if "hugetlb" in taken:
        hugetlb = zip(taken["thp"], taken["hugetlb"], strict=True)
        benchmark.extra_info["hugetlb_ratio"] = round(middle([b / a for a, b in hugetlb]), 3)
    stats = pools["thp"].stats()
    benchmark.extra_info.update(
        {
            "thp_ns": round(middle(taken["thp"]), 2),
            "4k_ns": round(middle(taken["4k"]), 2),
            "ratio": round(middle([b / a for a, b in pairs]), 2),
            "huge_coverage": round(stats["huge_bytes"] / stats["committed_bytes"], 3),
        }
    )
    del view
    words.clear()
    for pool in pools.values():
        pool.close()
