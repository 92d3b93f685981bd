"""The cuckoo filter through Python: a multiset model, kinds of keys, files, and what is refused."""

import pickle
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyruntime import errors
from pyruntime.filter import ABSENT, DUP_LIMIT, EXISTS, FULL, OK, CuckooFilter


class FilterModel(RuleBasedStateMachine):
    """A filter beside an exact multiset."""

    keys = st.lists(st.integers(0, 400), max_size=30)

    def __init__(self):
        super().__init__()
        self.filter = CuckooFilter(100, bits=8, seed=5)
        self.model = Counter()

    @rule(keys=keys, unique=st.booleans())
    def insert(self, keys, unique):
        stored = self.filter.insert(keys, unique=unique)
        assert stored == (self.filter.status == OK).sum()
        for key, status in zip(keys, self.filter.status, strict=True):
            assert status in ((OK, EXISTS, FULL) if unique else (OK, FULL, DUP_LIMIT))
            if status == OK:
                self.model[key] += 1

    @rule(data=st.data())
    def delete(self, data):
        present = sorted(self.model.elements())
        if present:
            chosen = data.draw(st.lists(st.sampled_from(present), max_size=10, unique=True))
            assert self.filter.delete(chosen, must_exist=True) == len(chosen)
            self.model -= Counter(chosen)

    @rule()
    def grow(self):
        if self.filter.num_generations < 5:
            self.filter.grow()

    @rule()
    def compact(self):
        before, nbytes = self.filter.num_generations, self.filter.nbytes
        dropped = self.filter.compact()
        assert self.filter.num_generations == before - dropped >= 1
        assert (self.filter.nbytes < nbytes) == (dropped > 0)

    @rule()
    def save_and_load(self):
        again = pickle.loads(pickle.dumps(self.filter))
        assert again.to_bytes() == self.filter.to_bytes()
        self.filter = again

    @rule()
    def clear(self):
        self.filter.clear()
        self.model.clear()

    @invariant()
    def nothing_is_missing(self):
        keys = list(self.model)
        assert self.filter.contains(keys).all()
        assert (self.filter.count(keys) >= [self.model[key] for key in keys]).all()
        assert len(self.filter) == self.model.total()
        self.filter.verify()


TestFilterModel = FilterModel.TestCase
TestFilterModel.settings = settings(
    max_examples=40, stateful_step_count=30, derandomize=True, deadline=None
)


def test_many_keys_of_every_integer_type():
    filter = CuckooFilter(200_000, seed=1)
    keys = np.arange(200_000, dtype=np.int64) - 100_000
    assert filter.insert(keys) == 200_000
    assert filter.contains(keys).all()
    assert filter.contains(keys.astype(np.int32)).all()
    assert filter.contains(keys[::2]).all() and -7 in filter and 5 in filter
    assert filter.contains(keys.view(np.uint64)).all()
    fresh = np.arange(10**7, 10**7 + 10**6)
    assert filter.contains(fresh).mean() < 2 * filter.expected_fpr < 1e-3
    assert 16 < 8 * filter.nbytes / 200_000 < 22
    assert filter.delete(keys) == 200_000 and len(filter) == 0
    assert not any(filter.to_bytes()[128:])


def test_strings_and_bytes():
    filter = CuckooFilter(1000, seed=2)
    words = [f"word {i} ü" for i in range(500)]
    assert filter.insert(words) == 500
    assert filter.contains(words).all()
    assert filter.contains([word.encode() for word in words]).all()
    assert filter.contains(np.array(words)).all()
    assert "word 3 ü" in filter and "word 3" not in filter
    with pytest.raises(errors.InvalidArgumentError, match="string keys"):
        filter.insert([1, 2])
    with pytest.raises(errors.InvalidArgumentError, match="integer keys"):
        filter.contains(np.arange(3))
    assert pickle.loads(pickle.dumps(filter)).contains(words).all()
    with pytest.raises(errors.InvalidArgumentError):
        pickle.loads(pickle.dumps(filter)).contains([1])
    filter.clear()
    assert filter.insert([1, 2]) == 2


def test_growing_takes_all_keys_and_keeps_them():
    filter = CuckooFilter(1000, seed=8, on_full="grow")
    keys = np.random.default_rng(1).permutation(1 << 17).astype(np.int64)
    assert filter.insert(keys[:100_000]) == 100_000 and not filter.status.any()
    assert filter.num_generations == 7 and filter.capacity >= 100_000
    assert filter.insert(keys[:100_000], unique=True) == 0
    assert (filter.status == EXISTS).all()
    # Copies of one key reach a limit, which is no reason to grow.
    copies = filter.insert([7] * 1000)
    assert 16 * 6 < copies <= 16 * 7 and filter.num_generations == 7
    assert filter.status.tolist() == [OK] * copies + [DUP_LIMIT] * (1000 - copies)
    filter.delete([7] * copies, must_exist=True)
    again = pickle.loads(pickle.dumps(filter))
    assert again.on_full == "grow" and again.num_generations == 7 and len(again) == 100_000
    for one in (filter, again):
        one.delete(keys[:60_000], must_exist=True)
        assert one.contains(keys[60_000:100_000]).all() and len(one) == 40_000
        assert one.contains(keys[100_000:]).mean() < 2 * one.expected_fpr < 1e-2
        one.verify()
    filter.clear()
    assert filter.num_generations == 1 and filter.capacity == 1000


def test_compacting_gives_generations_back():
    filter = CuckooFilter(1000, seed=8, on_full="grow")
    keys = np.arange(50_000)
    filter.insert(keys)
    grown = filter.num_generations
    assert filter.compact() == 0 and filter.num_generations == grown == 6
    filter.delete(keys[5000:])
    assert filter.compact() == 3 and filter.num_generations == 3
    assert filter.contains(keys[:5000]).all() and len(filter) == 5000 <= filter.capacity
    again = pickle.loads(pickle.dumps(filter))
    for one in (filter, again):
        one.insert(keys[40_000:])
        assert one.contains(keys[:5000]).all() and one.contains(keys[40_000:]).all()
        one.delete(keys[100:5000], must_exist=True)
        one.delete(keys[40_000:], must_exist=True)
        one.compact()
        assert one.num_generations == 1 and one.capacity == 1000
        assert one.contains(keys[:100]).all() and len(one) == 100
        one.verify()


def test_threads_that_find_it_full_together_grow_it_once():
    filter = CuckooFilter(2000, seed=9, on_full="grow")
    keys = np.arange(8 * 4000).reshape(8, -1)
    stored = []
    threads = [
        threading.Thread(
            target=lambda row: stored.extend(filter.insert(some) for some in row.reshape(40, -1)),
            args=(row,),
        )
        for row in keys
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(stored) == keys.size == len(filter) and filter.contains(keys.ravel()).all()
    assert filter.num_generations <= 6
    filter.verify()


def test_what_became_of_each_key():
    filter = CuckooFilter(100, seed=3)
    assert filter.insert([7] * 20) == 16
    assert filter.status.tolist() == [OK] * 16 + [DUP_LIMIT] * 4
    assert filter.insert([7, 8], unique=True) == 1
    assert filter.status.tolist() == [EXISTS, OK]
    assert filter.delete([8, 9]) == 1
    assert filter.status.tolist() == [OK, ABSENT]
    with pytest.raises(errors.NotFoundError, match="1 of 1"):
        filter.delete([9], must_exist=True)
    strict = CuckooFilter(10, seed=4, on_full="raise")
    with pytest.raises(errors.CapacityError, match="no room"):
        strict.insert(np.arange(1000))
    kept = np.flatnonzero(strict.status == OK)
    assert strict.contains(kept).all() and len(strict) == len(kept) >= 10


@pytest.mark.parametrize(
    "keys",
    [np.arange(3.0), np.ones(3, bool), [True], [1, "a"], [1.5], "abc", np.zeros((2, 2), np.int64)],
)
def test_keys_that_are_none(keys):
    filter = CuckooFilter(10)
    for call in (filter.insert, filter.contains, filter.delete, filter.count):
        with pytest.raises(errors.InvalidArgumentError):
            call(keys)
    assert len(filter) == 0


def test_arguments_out_of_range():
    for wrong in (
        {"capacity": 0},
        {"capacity": -1},
        {"capacity": 1 << 40},
        {"capacity": "10"},
        {"capacity": 10, "bits": 12},
        {"capacity": 10, "slots": 4},
        {"capacity": 10, "seed": -1},
        {"capacity": 10, "on_full": "ignore"},
    ):
        with pytest.raises(errors.InvalidArgumentError):
            CuckooFilter(**wrong)


@pytest.mark.parametrize("capacity", [5000, 700])
def test_files(tmp_path, capacity):
    filter = CuckooFilter(capacity, seed=6, on_full="grow")
    filter.insert(np.arange(4000))
    path = tmp_path / "a.filter"
    filter.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.filter"]
    again = CuckooFilter.load(path)
    assert again.contains(np.arange(4000)).all() and again.stats()["seed"] == 6
    whole = path.read_bytes()
    for size in (0, 1, 127, 128, 129, len(whole) - 1):
        with pytest.raises(errors.CorruptDataError):
            CuckooFilter.from_bytes(whole[:size])
    for place in (0, 9, 20, 50, 115, 125, 500, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        with pytest.raises((errors.CorruptDataError, errors.VersionError)):
            CuckooFilter.from_bytes(damaged)
    with pytest.raises(FileNotFoundError):
        CuckooFilter.load(tmp_path / "none")


@pytest.mark.parametrize("capacity", [5000, 700])
def test_mapped_files(tmp_path, capacity):
    filter = CuckooFilter(capacity, seed=6, on_full="grow")
    filter.insert(np.arange(4000))
    path = tmp_path / "a ü.filter"
    filter.save(path)
    asked = np.arange(100_000)
    for verify in (True, False):
        mapped = CuckooFilter.mmap(path, verify=verify)
        np.testing.assert_array_equal(mapped.contains(asked), filter.contains(asked))
        np.testing.assert_array_equal(mapped.count(asked), filter.count(asked))
        assert len(mapped) == 4000 and mapped.kind == "integer" and 5 in mapped
        assert mapped.to_bytes() == filter.to_bytes()
        assert filter.expected_fpr <= mapped.expected_fpr * (1 + 1e-9) < 0.002
        mapped.verify()
        for write in (
            lambda: mapped.insert([1]),  # noqa: B023
            lambda: mapped.insert(asked[:3], unique=True),  # noqa: B023
            lambda: mapped.delete([1]),  # noqa: B023
            mapped.clear,
            mapped.grow,
            mapped.compact,
        ):
            with pytest.raises(errors.StateError, match="mapped"):
                write()
        assert len(mapped) == 4000
        pickle.loads(pickle.dumps(mapped)).delete([1], must_exist=True)
    # The file may go; the mapping stays.
    CuckooFilter(10).save(path)
    path.unlink()
    assert mapped.contains(asked[:4000]).all()
    whole = filter.to_bytes()
    for size in (0, 1, 127, 128, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.CorruptDataError):
            CuckooFilter.mmap(path, verify=False)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(errors.CorruptDataError, match="damaged"):
        CuckooFilter.mmap(path)
    CuckooFilter.mmap(path, verify=False)
    with pytest.raises(FileNotFoundError):
        CuckooFilter.mmap(tmp_path / "none")


def test_threads_share_a_filter():
    filter = CuckooFilter(100_000, seed=7)
    fixed = np.arange(50_000)
    filter.insert(fixed)
    missing = []

    def write(i):
        keys = np.arange(10_000) + 10**6 * (i + 1)
        for _ in range(5):
            assert filter.insert(keys) == len(keys)
            assert filter.delete(keys) == len(keys)

    def read():
        missing.extend((~filter.contains(fixed)).sum() for _ in range(20))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(missing) == 0 and len(filter) == 50_000
    filter.verify()
