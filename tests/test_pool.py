"""The pool from Python: against a model, its failures, and that views keep objects alive."""

import gc
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyruntime import errors
from pyruntime.pool import Buf, Pool

CAPACITY = 40


class PoolModel(RuleBasedStateMachine):
    """Single, bulk and buffer calls against a set of indices."""

    def __init__(self):
        super().__init__()
        self.pool = Pool(96, CAPACITY, check="state")
        self.held = {}  # index -> byte written over the whole object
        self.bufs = []
        self.stamp = 0

    @property
    def out(self):
        return len(self.held) + len(self.bufs)

    def sign(self, index):
        assert index not in self.held
        self.stamp = self.stamp % 255 + 1
        self.pool.view(index)[:] = self.stamp
        self.held[index] = self.stamp

    def check_and_forget(self, index):
        assert (self.pool.view(index) == self.held.pop(index)).all()

    @rule()
    def acquire(self):
        buf = self.pool.try_acquire()
        assert (buf is None) == (self.out == CAPACITY)
        if buf is not None:
            assert buf.index not in self.held
            self.bufs.append(buf)

    @rule()
    def acquire_index(self):
        if self.out == CAPACITY:
            with pytest.raises(errors.CapacityError):
                self.pool.acquire_index()
        else:
            self.sign(self.pool.acquire_index())

    @rule(n=st.integers(0, CAPACITY + 5))
    def acquire_into(self, n):
        indices = np.zeros(n, np.uint32)
        fits = self.out + n <= CAPACITY
        assert self.pool.try_acquire_into(indices) == fits
        if fits:
            assert len(set(indices.tolist())) == n
            for index in indices.tolist():
                self.sign(index)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_index(self, data):
        index = data.draw(st.sampled_from(sorted(self.held)))
        self.check_and_forget(index)
        self.pool.release_index(index)
        with pytest.raises(errors.StateError, match="twice"):
            self.pool.release_index(index)

    @rule(data=st.data())
    def release_from(self, data):
        some = data.draw(st.permutations(sorted(self.held)))
        some = some[: data.draw(st.integers(0, len(some)))]
        for index in some:
            self.check_and_forget(index)
        self.pool.release_from(np.array(some, np.uint32))

    @precondition(lambda self: self.bufs)
    @rule(data=st.data())
    def drop_buf(self, data):
        del self.bufs[data.draw(st.integers(0, len(self.bufs) - 1))]

    @rule(index=st.integers(CAPACITY, 2**40))
    def release_foreign(self, index):
        with pytest.raises(errors.InvalidArgumentError):
            self.pool.release_index(index)

    @rule()
    def trim(self):
        self.pool.trim()

    @invariant()
    def counts_agree(self):
        assert self.pool.stats()["in_use"] == self.out
        assert self.pool.num_bufs == len(self.bufs)

    def teardown(self):
        self.pool.verify()
        self.bufs.clear()
        self.pool.release_from(np.array(sorted(self.held), np.uint32))
        self.pool.close()


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_exhaustion_is_typed_and_recoverable():
    with Pool(64, 3) as pool:
        bufs = [pool.acquire() for _ in range(3)]
        assert pool.try_acquire() is None
        with pytest.raises(errors.CapacityError):
            pool.acquire()
        del bufs[0]
        assert pool.acquire().nbytes == 64
        bufs.clear()


def test_bulk_is_all_or_nothing():
    with Pool(64, 100) as pool:
        indices = np.full(101, 7, np.uint32)
        with pytest.raises(errors.CapacityError):
            pool.acquire_into(indices)
        assert (indices == 7).all()
        assert pool.stats()["in_use"] == 0


def test_growth_on_demand():
    with Pool(1000, 10, max_capacity=20_000) as pool:
        indices = np.empty(20_000, np.uint32)
        pool.acquire_into(indices)
        assert len(np.unique(indices)) == 20_000
        assert pool.stats()["grows"] > 0
        assert pool.try_acquire() is None
        pool.release_from(indices)
        assert pool.trim() > 0


def test_array_reaches_every_object_without_copying():
    with Pool(100, 50_000) as pool:
        index = pool.acquire_index()
        pool.view(index)[:] = 5
        array = pool.array
        assert (array[divmod(index, array.shape[1])] == 5).all()
        array[divmod(index, array.shape[1])] = 6
        assert (pool.view(index) == 6).all()
        pool.release_index(index)
        del array


def test_read_and_write_are_inverse():
    rng = np.random.default_rng(1)
    with Pool(513, 30_000) as pool:
        indices = np.empty(30_000, np.uint32)
        pool.acquire_into(indices)
        data = rng.integers(0, 256, (len(indices), 513), np.uint8)
        pool.write(indices, data)
        order = rng.permutation(len(indices))
        out = np.empty((100, 513), np.uint8)
        assert pool.read(indices[order[:100]], out) is out
        assert (out == data[order[:100]]).all()
        assert (pool.read(indices) == data).all()
        pool.release_from(indices)


def test_views_have_dtype_and_shape():
    with Pool(100, 10) as pool:
        buf = pool.acquire()
        floats = pool.view(buf, np.float32, (5, 5))
        floats[:] = np.arange(25).reshape(5, 5)
        assert np.frombuffer(buf, np.float32)[24] == 24
        assert np.from_dlpack(floats)[4, 4] == 24
        assert np.from_dlpack(buf)[0] == memoryview(buf)[0]
        for dtype, shape in ((np.float64, 13), (object, 1), (np.uint8, (101,)), (np.uint8, -1)):
            with pytest.raises(errors.InvalidArgumentError):
                pool.view(buf, dtype, shape)
        del floats, buf
        gc.collect()


def test_a_view_keeps_its_object_and_the_pool():
    pool = Pool(64, 1)
    view = memoryview(pool.acquire())
    assert pool.try_acquire() is None, "the buffer object is gone, its export is not"
    with pytest.raises(errors.StateError):
        pool.close()
    with pytest.raises(errors.StateError):
        pool.close(force=True)
    view.release()
    buf = pool.acquire()
    del pool
    gc.collect()
    memoryview(buf)[:] = b"x" * 64  # the pool outlives its name


def test_release_while_exported_is_refused():
    with Pool(64, 1) as pool:
        buf = pool.acquire()
        view = memoryview(buf)
        with pytest.raises(BufferError):
            buf.release()
        view.release()
        buf.release()
        with pytest.raises(errors.StateError):
            buf.release()
        with pytest.raises((errors.StateError, BufferError)):
            memoryview(buf)


def test_live_arrays_prevent_closing():
    pool = Pool(64, 10)
    array = pool.array
    with pytest.raises(BufferError):
        pool.close()
    assert not pool.closed
    del array
    pool.close()


def test_every_call_after_close_is_typed():
    pool = Pool(64, 10)
    buf = pool.acquire()
    buf.release()
    pool.close()
    pool.close()
    assert pool.closed
    assert "closed" in repr(pool)
    calls = [
        pool.acquire,
        pool.try_acquire,
        pool.acquire_index,
        lambda: pool.release_index(0),
        lambda: pool.acquire_into(np.empty(1, np.uint32)),
        lambda: pool.release_from(np.empty(1, np.uint32)),
        lambda: pool.array,
        lambda: pool.read([0]),
        lambda: pool.view(0),
        lambda: memoryview(pool),
        *(getattr(pool, n) for n in ("stats", "prefault", "trim", "flush_thread", "verify")),
        pool.__enter__,
    ]
    for call in calls:
        with pytest.raises((errors.ClosedError, BufferError)):
            call()


def test_indices_left_out_prevent_closing_unless_forced():
    pool = Pool(64, 10)
    pool.acquire_index()
    with pytest.raises(errors.StateError):
        pool.close()
    pool.close(force=True)
    assert pool.closed


def test_the_context_manager_does_not_mask_an_exception():
    with pytest.raises(KeyError, match="mine"), Pool(64, 10) as pool:
        pool.acquire_index()
        raise KeyError("mine")
    pool.close(force=True)


@pytest.mark.parametrize(
    "options",
    [
        {"object_bytes": 0},
        {"object_bytes": -1},
        {"object_bytes": 2**31},
        {"object_bytes": 2**70},
        {"object_bytes": 1.5},
        {"object_bytes": None},
        {"capacity": 0},
        {"capacity": -5},
        {"capacity": 2**63},
        {"capacity": "ten"},
        {"max_capacity": 5},
        {"align": 3},
        {"align": 2**22},
        {"pages": "huge"},
        {"pages": []},
        {"prefault": None},
        {"node": 64},
        {"node": -1},
        {"node": 2**40},
        {"check": "none"},
        {"fork": 1},
        {"cache_objects": 1},
        {"cache_objects": 513},
        {"cache_objects": 2**40},
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options):
    name = next(iter(options))
    with pytest.raises(errors.InvalidArgumentError, match=name):
        Pool(**{"object_bytes": 64, "capacity": 10, **options})


def test_more_memory_than_there_is():
    with pytest.raises(errors.OutOfMemoryError):
        Pool(2**30, 2**16, prefault="none")


@pytest.mark.parametrize(
    "indices",
    [
        None,
        [1, 2],
        np.zeros((2, 2), np.uint32).T[:1].T,
        np.zeros(2, np.float32),
        np.zeros(2, np.int64),
        b"abcdefgh",
        np.zeros(2, np.uint8),
        np.zeros(8, np.uint32)[::2],
        np.zeros(2, ">u4"),
    ],
    ids=str,
)
def test_index_arrays_of_the_wrong_kind(indices):
    with Pool(64, 10) as pool:
        with pytest.raises(errors.InvalidArgumentError):
            pool.acquire_into(indices)
        with pytest.raises(errors.InvalidArgumentError):
            pool.release_from(indices)
        assert pool.stats()["in_use"] == 0


def test_read_only_index_arrays_can_be_released_from_only():
    with Pool(64, 10) as pool:
        indices = np.empty(5, np.uint32)
        pool.acquire_into(indices)
        indices.flags.writeable = False
        with pytest.raises((errors.InvalidArgumentError, ValueError, BufferError)):
            pool.acquire_into(indices)
        pool.release_from(indices)


@pytest.mark.parametrize("bad", [-1, 10**6, 2**63, 2**70, "0", None, 1.0])
def test_foreign_indices(bad):
    with Pool(64, 10) as pool:
        for call in (pool.release_index, pool.view, lambda i: pool.read([i])):
            with pytest.raises(errors.InvalidArgumentError):
                call(bad)
        assert pool.stats()["in_use"] == 0


def test_a_bad_index_in_bulk_releases_nothing():
    with Pool(64, 10) as pool:
        indices = np.empty(4, np.uint32)
        pool.acquire_into(indices)
        with pytest.raises(errors.InvalidArgumentError):
            pool.release_from(np.append(indices, np.uint32(2**31)))
        assert pool.stats()["in_use"] == 4
        pool.release_from(indices)


def test_state_check_finds_double_release_in_bulk():
    with Pool(64, 10, check="state") as pool:
        one = pool.acquire_index()
        with pytest.raises(errors.StateError):
            pool.release_from(np.array([one, one], np.uint32))
        assert pool.stats()["in_use"] == 1
        pool.release_index(one)


def test_guarded_pools_have_buffers_but_no_arrays():
    with Pool(5000, 4, check="guard") as pool:
        with pytest.raises(errors.UnsupportedError):
            _ = pool.array
        with pool.acquire() as buf:
            memoryview(buf)[4999] = 1


def test_pickling_copies_a_buffer_and_refuses_a_pool():
    with Pool(16, 2) as pool:
        buf = pool.acquire()
        memoryview(buf)[:] = b"0123456789abcdef"
        assert bytes(pickle.loads(pickle.dumps(buf))) == b"0123456789abcdef"
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(pool)
        del buf


def test_a_subclass_that_forgets_init_is_typed():
    class Forgetful(Pool):
        def __init__(self):
            pass

    pool = Forgetful()
    for call in (pool.acquire, pool.acquire_index, lambda: memoryview(pool)):
        with pytest.raises((errors.Error, BufferError)):
            call()
    with pytest.raises(TypeError):
        Buf()


def in_child(target):
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("fork", ["cow", "exclude"])
def test_a_forked_child(fork):
    pool = Pool(64, 100, fork=fork)
    held = pool.acquire()
    memoryview(held)[:1] = b"p"

    def child():
        if fork == "exclude":
            with pytest.raises(errors.StateError):
                pool.acquire()
            with pytest.raises(errors.StateError):
                pool.acquire_into(np.empty(3, np.uint32))
        else:
            memoryview(held)[:1] = b"c"
            indices = np.empty(99, np.uint32)
            pool.acquire_into(indices)
            assert pool.try_acquire() is None
        os._exit(0)

    in_child(child)
    assert memoryview(held)[:1] == b"p"
    held.release()
    indices = np.empty(100, np.uint32)
    pool.acquire_into(indices)
    pool.release_from(indices)
    pool.close()


def test_the_last_object_is_reachable_from_any_thread():
    with Pool(64, 64) as pool:
        parked, leave = threading.Event(), threading.Event()

        def hoard():
            indices = np.empty(64, np.uint32)
            pool.acquire_into(indices)
            pool.release_from(indices)  # they lie in this thread's cache now
            parked.set()
            leave.wait(30)

        thread = threading.Thread(target=hoard)
        thread.start()
        parked.wait(30)
        indices = np.empty(64, np.uint32)
        pool.acquire_into(indices)
        pool.release_from(indices)
        leave.set()
        thread.join()


def test_threads_never_share_an_object():
    failures = []
    with Pool(64, 256) as pool:

        def work(name):
            rng = np.random.default_rng(name)
            for _ in range(300):
                indices = np.empty(rng.integers(1, 40), np.uint32)
                if not pool.try_acquire_into(indices):
                    continue
                data = np.full((len(indices), 64), name, np.uint8)
                pool.write(indices, data)
                if (pool.read(indices) != data).any():
                    failures.append(name)
                pool.release_from(indices)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pool.verify()
    assert failures == []


@pytest.mark.parametrize("pages", ["auto", "thp", "hugetlb", "4k"])
def test_every_page_wish_works_and_reports(pages):
    with Pool(4096, 2000, pages=pages, prefault="sync") as pool:
        assert 0 <= pool.coverage() <= 1
        if pages == "4k":
            assert pool.coverage() == 0
        pool.prefault()


def test_background_prefault_ends_with_the_pool():
    for _ in range(5):
        Pool(4096, 5000, prefault="background").close()
