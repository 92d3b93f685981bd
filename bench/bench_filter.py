"""The cuckoo filter beside Python filters, and beside native ones through a small library.

Python peers are used where they are installed (``pip install rbloom pyprobables``). A native peer
is a shared library named by PYRUNTIME_FILTER_PEER, one or several separated by colons, with

    const char* peer_name(void);
    void* peer_create(uint64_t capacity);
    void peer_destroy(void*);
    uint64_t peer_insert(void*, const uint64_t* keys, uint64_t n);     returns how many were stored
    uint64_t peer_contains(void*, const uint64_t* keys, uint64_t n);   returns how many were found
    uint64_t peer_remove(void*, const uint64_t* keys, uint64_t n);     may be missing

Its memory should be on huge pages, as ours is. All run in this process, in turns, one thread, on
the same random keys; rates are 10^6 keys per second of the thread's CPU time, ratios are medians of
those of pairs. Beside them stand the lines of 64 bytes that this machine reads at random from a
table of the same size: a lookup of an absent key needs two.
"""

import ctypes
import os
import pathlib
import time

import numba
import numpy as np
import pytest

import pyruntime
from bench.support import middle, size
from pyruntime.filter import CuckooFilter

PEERS = [path for path in os.environ.get("PYRUNTIME_FILTER_PEER", "").split(":") if path]
OPERATIONS = ("insert", "contains_present", "contains_absent", "delete")


@pytest.fixture(autouse=True)
def one_thread():
    threads = pyruntime._ext._native.threads_size()
    pyruntime.set_num_threads(1)
    yield
    pyruntime.set_num_threads(threads)


class Ours:
    name = "pyruntime"

    def __init__(self, capacity, slots=8):
        self.filter = CuckooFilter(capacity, seed=1, slots=slots)
        self.filter.clear()  # its pages are touched, as those of the peers are when they are made

    def insert(self, keys):
        return self.filter.insert(keys)

    def contains(self, keys):
        return int(self.filter.contains(keys).sum())

    def delete(self, keys):
        return self.filter.delete(keys)


class Native:
    def __init__(self, path, capacity):
        self._library = library = ctypes.CDLL(path)
        library.peer_name.restype = ctypes.c_char_p
        library.peer_create.restype = ctypes.c_void_p
        library.peer_create.argtypes = [ctypes.c_uint64]
        library.peer_destroy.argtypes = [ctypes.c_void_p]
        for name in ("insert", "contains", "remove"):
            call = getattr(library, f"peer_{name}", None)
            if call is not None:
                call.restype = ctypes.c_uint64
                call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
            else:
                self.delete = None
        self.name = library.peer_name().decode()
        self._peer = library.peer_create(capacity)

    def insert(self, keys):
        return self._library.peer_insert(self._peer, keys.ctypes.data, len(keys))

    def contains(self, keys):
        return self._library.peer_contains(self._peer, keys.ctypes.data, len(keys))

    def delete(self, keys):
        return self._library.peer_remove(self._peer, keys.ctypes.data, len(keys))

    def __del__(self):
        self._library.peer_destroy(self._peer)


class Rbloom:
    name = "rbloom"

    def __init__(self, capacity):
        rbloom = pytest.importorskip("rbloom")
        self.filter = rbloom.Bloom(capacity, 0.0003)

    def insert(self, keys):
        self.filter.update(keys.tolist())
        return len(keys)

    def contains(self, keys):
        here = self.filter
        return sum(key in here for key in keys.tolist())


class Pyprobables:
    name = "pyprobables"

    def __init__(self, capacity):
        probables = pytest.importorskip("probables")
        self.filter = probables.CuckooFilter(capacity=capacity // 3, bucket_size=4)

    def insert(self, keys):
        for key in keys.tolist():
            self.filter.add(str(key))
        return len(keys)

    def contains(self, keys):
        return sum(self.filter.check(str(key)) for key in keys.tolist())

    def delete(self, keys):
        return sum(self.filter.remove(str(key)) for key in keys.tolist())


def timed(call, keys):
    begin = time.thread_time()
    result = call(keys)
    return len(keys) / (time.thread_time() - begin) / 1e6, result


@numba.njit
def read_lines(lines, order):
    """Return the sum of a word of each line in `order`; no load waits for another."""
    total = np.uint64(0)
    for i in order:
        total += lines[i, 0]
    return total


def random_lines(num_bytes, n):
    """Return the rate at which this machine reads lines of a table at random."""
    lines = np.ones((max(num_bytes // 64, 1), 8), np.uint64)
    order = np.random.default_rng(2).integers(0, len(lines), n, dtype=np.uint32)
    read_lines(lines[:1], order[:1] * 0)
    return [timed(lambda ids: read_lines(lines, ids), order)[0] for _ in range(3)]


def measure(make, keys, absent):
    """Return the rates of a filter that is filled to its capacity, and its false positives."""
    each = make()
    rates = {}
    rates["insert"], stored = timed(each.insert, keys)
    assert stored >= 0.999 * len(keys)
    rates["contains_present"], found = timed(each.contains, keys)
    assert found >= stored
    rates["contains_absent"], wrong = timed(each.contains, absent)
    if getattr(each, "delete", None):
        rates["delete"], _ = timed(each.delete, keys)
    return rates, wrong / len(absent)


def beside(benchmark, keys, absent, ours, theirs, rounds):
    names, all_rates = ["ours", "theirs"], ([], [])
    false = [0.0, 0.0]
    lines = []

    def run():
        lines.extend(random_lines(len(keys) * 17 // 8, len(keys)))
        for i, make in enumerate((ours, theirs)):
            rates, false[i] = measure(make, keys, absent)
            all_rates[i].append(rates)

    benchmark.pedantic(run, rounds=rounds, iterations=1)
    for operation in OPERATIONS:
        if operation not in all_rates[1][0]:
            continue
        both = [[rates[operation] for rates in side] for side in all_rates]
        benchmark.extra_info[operation] = {
            **{name: round(middle(side), 3) for name, side in zip(names, both, strict=True)},
            "ratio": round(middle([a / b for a, b in zip(*both, strict=True)]), 2),
        }
    benchmark.extra_info["random_lines"] = round(middle(lines), 3)
    benchmark.extra_info["false_positives"] = dict(zip(names, false, strict=True))


def keys_of(n):
    keys = np.random.default_rng(0).integers(0, 2**63, 2 * n, dtype=np.uint64)
    return keys[:n], keys[n:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PEERS or [None], ids=lambda p: p and pathlib.Path(p).stem)
@pytest.mark.parametrize("n", [1_000_000, 8_000_000, 63_800_000])
def test_beside_native(benchmark, n, path):
    n, rounds = size(benchmark, (n, 5 if n < 10_000_000 else 3), (20_000, 1))
    keys, absent = keys_of(n)
    if path is None:
        pytest.skip("PYRUNTIME_FILTER_PEER names no library")
    benchmark.extra_info["peer"] = Native(path, 1000).name
    beside(benchmark, keys, absent, lambda: Ours(n), lambda: Native(path, n), rounds)


@pytest.mark.parametrize(("peer", "n"), [(Rbloom, 1_000_000), (Pyprobables, 50_000)])
def test_beside_python(benchmark, peer, n):
    n, rounds = size(benchmark, (n, 3), (2000, 1))
    keys, absent = keys_of(n)
    beside(benchmark, keys, absent, lambda: Ours(n), lambda: peer(n), rounds)


@pytest.mark.parametrize("n", [1_000_000, 8_000_000, 63_800_000])
def test_two_threads(benchmark, n):
    """Wall time of two threads beside one's, in turns."""
    n, rounds = size(benchmark, (n, 5 if n < 10_000_000 else 3), (200_000, 1))
    keys, absent = keys_of(n)
    ours = Ours(n)
    calls = {
        "insert": lambda: ours.insert(keys),
        "contains_present": lambda: ours.contains(keys),
        "contains_absent": lambda: ours.contains(absent),
        "delete": lambda: ours.delete(keys),
    }
    rates = {operation: ([], []) for operation in OPERATIONS}

    def run():
        for threads in (1, 2):
            pyruntime.set_num_threads(threads)
            for operation, call in calls.items():
                begin = time.perf_counter()
                call()
                rates[operation][threads - 1].append(n / (time.perf_counter() - begin) / 1e6)

    benchmark.pedantic(run, rounds=rounds, iterations=1)
    for operation, (one, two) in rates.items():
        benchmark.extra_info[operation] = {
            "one": round(middle(one), 3),
            "two": round(middle(two), 3),
            "ratio": round(middle([b / a for a, b in zip(one, two, strict=True)]), 2),
        }


@pytest.mark.parametrize("operation", ["insert", "contains", "delete"])
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("n", [1_000_000, 8_000_000])
def test_ours(benchmark, operation, slots, n):
    n = size(benchmark, n, 5000)
    keys, _ = keys_of(n)
    filled = Ours(n, slots)
    if operation != "insert":
        filled.insert(keys)

    def setup():
        if operation == "insert":
            filled.filter.clear()
        elif operation == "delete":
            filled.filter.clear()
            filled.insert(keys)

    call = getattr(filled, operation)
    rounds = size(benchmark, 5, 1)
    benchmark.pedantic(lambda: call(keys), setup=setup, rounds=rounds, iterations=1)
    benchmark.extra_info["keys"] = n
