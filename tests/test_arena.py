"""The arena from Python: against a model, its sharing of a budget, and its failures."""

import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyruntime import errors
from pyruntime.pool import UNIT_BYTES, Arena, Budget

LIMIT = 8  # units
SIZES = [1, 4096, 4097, 70_000, UNIT_BYTES // 2, UNIT_BYTES, UNIT_BYTES + 1, 3 * UNIT_BYTES // 2]


class ArenaModel(RuleBasedStateMachine):
    """Blocks of many sizes: disjoint, aligned, keep their bytes, and the budget adds up."""

    @initialize(classes=st.sampled_from([(), (70_000, 3 * UNIT_BYTES // 2)]))
    def start(self, classes):
        self.budget = Budget(LIMIT * UNIT_BYTES)
        self.arena = Arena(self.budget, reserve_bytes=4 * LIMIT * UNIT_BYTES, classes=classes)
        self.blocks = []
        self.stamp = 0

    @rule(num_bytes=st.sampled_from(SIZES))
    def acquire(self, num_bytes):
        try:
            block = self.arena.acquire(num_bytes)
        except errors.CapacityError:
            # The smallest slab of two objects of a size is under 7 units.
            assert self.arena.stats()["in_use_bytes"] > UNIT_BYTES // 4
            return
        assert block.ptr % 4096 == 0 and len(block) == num_bytes
        assert all(
            block.ptr + num_bytes <= other.ptr or other.ptr + other.nbytes <= block.ptr
            for other, _ in self.blocks
        )
        self.stamp = self.stamp % 255 + 1
        block.array()[[0, -1]] = self.stamp
        self.blocks.append((block, self.stamp))

    @rule(which=st.integers(0, 100))
    def release(self, which):
        if self.blocks:
            block, stamp = self.blocks.pop(which % len(self.blocks))
            assert (block.array()[[0, -1]] == stamp).all()
            block.release()

    @rule()
    def trim(self):
        empty = self.arena.stats()["empty_bytes"]
        assert self.arena.trim() == empty
        assert self.arena.stats()["empty_bytes"] == 0

    @invariant()
    def adds_up(self):
        if not hasattr(self, "arena"):
            return
        self.arena.verify()
        stats = self.arena.stats()
        assert stats["objects"] == len(self.blocks)
        assert stats["committed_bytes"] >= stats["in_use_bytes"] + stats["empty_bytes"]
        assert self.budget.limit_bytes - self.budget.available_bytes == stats["committed_bytes"]

    def teardown(self):
        if hasattr(self, "arena"):
            self.blocks.clear()
            self.arena.close()
            assert self.budget.available_bytes == self.budget.limit_bytes


TestArenaModel = ArenaModel.TestCase
TestArenaModel.settings = settings(
    max_examples=12, stateful_step_count=30, derandomize=True, deadline=None
)


def test_named_classes_fit_exactly():
    size = 5 * UNIT_BYTES // 4 + 4096
    for classes, in_use in [((), 3 * UNIT_BYTES // 2), ((size,), size)]:
        with Arena(reserve_bytes=64 * UNIT_BYTES, classes=classes) as arena:
            block = arena.acquire(size - 100)
            assert arena.stats()["in_use_bytes"] == in_use
            block.release()


def test_a_new_slab_takes_own_empty_slabs_before_it_asks_others():
    asked = []
    budget = Budget(3 * UNIT_BYTES)
    other = budget.register("other", reclaim=lambda n: asked.append(n) or 0)
    other.reserve(UNIT_BYTES)
    arena = Arena(budget)
    arena.acquire(4096).release()
    arena.acquire(UNIT_BYTES // 2).release()
    assert arena.stats()["empty_bytes"] == 2 * UNIT_BYTES
    block = arena.acquire(2 * UNIT_BYTES)
    assert not asked
    with pytest.raises(errors.CapacityError, match="arena asked for"):
        arena.acquire(4096)
    assert asked == [UNIT_BYTES]
    block.release()


def test_arenas_evict_from_each_other_by_priority():
    budget = Budget(4 * UNIT_BYTES)

    class Cache:
        def __init__(self, priority):
            self.blocks = []
            self.arena = Arena(budget, priority=priority, reclaim=self.evict)

        def evict(self, num_bytes):
            freed = 0
            while self.blocks and freed < num_bytes:
                freed += len(self.blocks.pop())
            return freed

        def fill(self, units):
            for _ in range(units):
                self.blocks.append(self.arena.acquire(UNIT_BYTES))

    low, high = Cache(0), Cache(1)
    low.fill(4)
    high.fill(3)
    assert len(low.blocks) == 1 and len(high.blocks) == 3
    with pytest.raises(errors.CapacityError):
        low.fill(2)
    assert len(high.blocks) == 3
    low.arena.verify()
    high.arena.verify()


def test_views_keep_the_object_out():
    arena = Arena(reserve_bytes=4 * UNIT_BYTES)
    block = arena.acquire(8192)
    view = block.array(np.float32, (4, 8))
    view[:] = 7
    block.release()
    assert (view == 7).all()
    with pytest.raises(errors.StateError, match="1 objects are still out"):
        arena.close()
    del view
    assert arena.stats()["objects"] == 0
    block = arena.acquire(8192)
    part = block.memory[:4]
    part[:] = b"abcd"
    block.release()
    block.release()
    assert arena.stats()["objects"] == 1  # the slice
    assert bytes(part) == b"abcd"
    part.release()
    assert arena.stats()["objects"] == 0
    with pytest.raises(errors.ClosedError):
        block.array()
    kept = arena.acquire(4096).array()
    assert arena.stats()["objects"] == 1
    del kept
    arena.close()
    arena.close()


def test_bad_arguments_are_typed_errors():
    with pytest.raises(errors.InvalidArgumentError, match="reserve_bytes"):
        Arena()
    for keywords in [
        {"reserve_bytes": 0},
        {"reserve_bytes": 1 << 60},
        {"reserve_bytes": UNIT_BYTES, "classes": [0]},
        {"reserve_bytes": UNIT_BYTES, "classes": [-1]},
        {"reserve_bytes": UNIT_BYTES, "pages": "2m"},
        {"reserve_bytes": UNIT_BYTES, "node": 64},
        {"reserve_bytes": UNIT_BYTES, "name": ""},
        {"reserve_bytes": UNIT_BYTES, "priority": 1 << 40},
        {"reserve_bytes": UNIT_BYTES, "reclaim": 3},
        {"budget": 3},
    ]:
        with pytest.raises(errors.InvalidArgumentError):
            Arena(**keywords)
    with pytest.raises(errors.UnsupportedError, match="hugetlb"):
        Arena(reserve_bytes=UNIT_BYTES, pages="hugetlb")
    arena = Arena(reserve_bytes=UNIT_BYTES)
    for num_bytes in (0, -1, UNIT_BYTES + 1, 1.5):
        with pytest.raises(errors.InvalidArgumentError, match="bytes"):
            arena.acquire(num_bytes)
    with arena.acquire(100) as block, pytest.raises(errors.InvalidArgumentError, match="fit"):
        block.array(np.float32, 26)
    with pytest.raises(TypeError, match="pickle"):
        arena.__reduce__()
    arena.close()
    with pytest.raises(errors.ClosedError):
        arena.acquire(1)


def test_a_forked_child_keeps_its_bytes_but_cannot_call():
    arena = Arena(reserve_bytes=4 * UNIT_BYTES)
    block = arena.acquire(4096)
    view = block.array()
    view[:] = 5
    child = os.fork()
    if child == 0:
        try:
            arena.acquire(1)
        except errors.StateError:
            os._exit(0 if (view == 5).all() else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    del view
    block.release()
    arena.close()
