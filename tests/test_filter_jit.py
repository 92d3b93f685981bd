"""A filter from compiled code: one key at a time through the C ABI, without the interpreter."""

import threading
import time

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.filter import ABSENT, DUP_LIMIT, FULL, OK, CuckooFilter, jit


def test_one_key_is_as_many():
    filter = CuckooFilter(1000, seed=1)
    for key in (0, 5, 2**64 - 1):
        assert jit.contains1(filter.address, key) == 0
        assert jit.insert1(filter.address, key) == OK
        assert jit.contains1(filter.address, key) == 1
    assert filter.contains(np.array([0, 5, -1])).all() and len(filter) == 3
    assert jit.remove1(filter.address, 5) == OK
    assert jit.remove1(filter.address, 5) == ABSENT
    assert 5 not in filter and len(filter) == 2


def test_what_has_no_room():
    filter = CuckooFilter(10, seed=1)
    results = [jit.insert1(filter.address, 7) for _ in range(17)]
    assert results == [OK] * 16 + [DUP_LIMIT]
    results = [jit.insert1(filter.address, key) for key in range(1000)]
    assert {OK, FULL} <= set(results) <= {OK, FULL, DUP_LIMIT}
    assert len(filter) == 16 + results.count(OK)


def test_failures_are_negative_statuses(tmp_path):
    def raised(status):
        return type(errors.from_status(status, ""))

    for call in (jit.contains1, jit.insert1, jit.remove1):
        assert raised(call(0, 1)) is errors.InvalidArgumentError
    filter = CuckooFilter(10, seed=1)
    filter.insert([3])
    filter.save(tmp_path / "f")
    mapped = CuckooFilter.mmap(tmp_path / "f")
    assert jit.contains1(mapped.address, 3) == 1
    assert raised(jit.insert1(mapped.address, 3)) is errors.StateError
    assert raised(jit.remove1(mapped.address, 3)) is errors.StateError


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_numba_asks_as_python_does(grown, dtype):
    numba = pytest.importorskip("numba")
    contains1, insert1, remove1 = jit.contains1, jit.insert1, jit.remove1

    @numba.njit(nogil=True)
    def run(address, keys, out):
        for i in range(keys.size):
            out[i] = contains1(address, keys[i])

    @numba.njit(nogil=True)
    def replace(address, old, new):
        failures = 0
        for i in range(old.size):
            failures += remove1(address, old[i]) != 0
            failures += insert1(address, new[i]) != 0
        return failures

    filter = CuckooFilter(50_000, seed=2)
    keys = np.arange(-20_000, 20_000).astype(dtype)
    filter.insert(keys)
    if grown:
        filter.grow()
        filter.insert(keys + dtype(40_000))
    asked = np.arange(-200_000, 200_000).astype(dtype)
    out = np.empty(len(asked), np.bool_)
    run(filter.address, asked, out)
    np.testing.assert_array_equal(out, filter.contains(asked))
    assert replace(filter.address, keys, keys + dtype(10**6)) == 0
    assert filter.contains(keys + dtype(10**6)).all()
    filter.verify()


def test_the_interpreter_runs_meanwhile():
    numba = pytest.importorskip("numba")
    contains1 = jit.contains1

    @numba.njit(nogil=True)
    def ask_until(address, key, stop):
        asked = 0
        while stop[0] == 0:
            asked += contains1(address, key)
        return asked

    filter = CuckooFilter(100, seed=3)
    filter.insert([1])
    stop = np.zeros(1, np.int64)
    ask_until(filter.address, 1, np.ones(1, np.int64))
    asked = []
    thread = threading.Thread(target=lambda: asked.append(ask_until(filter.address, 1, stop)))
    thread.start()
    time.sleep(0.05)  # with the interpreter held, this would not come back
    stop[0] = 1
    thread.join()
    assert asked[0] > 0
