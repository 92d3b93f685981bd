"""The cuckoo filter beside Python filters, and beside native ones through a small library.

Python peers are used where they are installed (``pip install rbloom pyprobables``). A native peer
is a shared library named by PYRUNTIME_FILTER_PEER, one or several separated by colons, with

    const char* peer_name(void);
    void* peer_create(uint64_t capacity);
    void peer_destroy(void*);
    uint64_t peer_insert(void*, const uint64_t* keys, uint64_t n);     returns how many were stored
    uint64_t peer_contains(void*, const uint64_t* keys, uint64_t n);   returns how many were found
    uint64_t peer_remove(void*, const uint64_t* keys, uint64_t n);

All run in this process, in turns, one thread, on the same random keys; rates are 10^6 keys per
second of the thread's CPU time, ratios are of medians of pairs.
"""

import ctypes
import os
import pathlib
import time

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
        for call in (library.peer_insert, library.peer_contains, library.peer_remove):
            call.restype = ctypes.c_uint64
            call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
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


def measure(make, keys, absent):
    """Return the rates of a filter that is filled to its capacity, and its false positives."""
    each = make()
    rates = {}
    rates["insert"], stored = timed(each.insert, keys)
    assert stored >= 0.999 * len(keys)
    rates["contains_present"], found = timed(each.contains, keys)
    assert found >= stored
    rates["contains_absent"], wrong = timed(each.contains, absent)
    if hasattr(each, "delete"):
        rates["delete"], _ = timed(each.delete, keys)
    return rates, wrong / len(absent)


def beside(benchmark, keys, absent, ours, theirs, rounds):
    names, all_rates = ["ours", "theirs"], ([], [])
    false = [0.0, 0.0]

    def run():
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
    benchmark.extra_info["false_positives"] = dict(zip(names, false, strict=True))


def keys_of(n):
    keys = np.random.default_rng(0).integers(0, 2**63, 2 * n, dtype=np.uint64)
    return keys[:n], keys[n:]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PEERS or [None], ids=lambda p: p and pathlib.Path(p).stem)
@pytest.mark.parametrize("n", [1_000_000, 8_000_000, 63_800_000])
def test_beside_native(benchmark, n, path):
    n, rounds = size(benchmark, (n, 5 if n < 10_000_000 else 2), (20_000, 1))
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
