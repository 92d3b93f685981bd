"""Copies of KV blocks between tiers, beside numpy."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime import errors
from pyruntime.kv import HostTier, KvGroup, KvStorage, ServingPool, SwapEngine
from pyruntime.kv.metrics import flatten
from pyruntime.kv.swap import _places, runs_of
from pyruntime.pool import UNIT_BYTES, Budget


def pieces(blocks, seed, count=4):
    rng = np.random.default_rng(seed)
    return list(rng.standard_normal((count, blocks, 4, 2, 8)).astype(np.float32))


def test_runs_put_neighbours_together():
    assert runs_of([5, 6, 9, 7], [1, 2, 8, 3]).tolist() == [[5, 1, 3], [9, 8, 1]]
    assert runs_of([], []).shape == (0, 3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.lists(st.permutations(range(12)), min_size=1, max_size=8))
def test_copies_end_as_if_one_after_the_other(workers, orders):
    near, far = pieces(12, 1), pieces(12, 2)
    want_near, want_far = [p.copy() for p in near], [p.copy() for p in far]
    engine = SwapEngine(workers)
    a, b = engine.add_space(near), engine.add_space(far)
    tickets = []
    for i, order in enumerate(orders):
        sources, targets = list(order[:5]), list(order[5:10])
        tickets.append(engine.copy(*((a, b) if i % 2 else (b, a)), runs_of(sources, targets)))
        for x, y in zip(*((want_near, want_far) if i % 2 else (want_far, want_near)), strict=True):
            y[targets] = x[sources]
    engine.wait()
    engine.verify()
    assert engine.collect() == dict.fromkeys(tickets, 0)
    np.testing.assert_array_equal(near, want_near)
    np.testing.assert_array_equal(far, want_far)
    stats = engine.stats()
    assert stats["blocks"] == 5 * len(orders)
    assert stats["bytes"] == 5 * len(orders) * 4 * near[0][0].nbytes


def test_a_copy_behind_a_fence_starts_when_it_is_signalled():
    near, far = pieces(4, 3), pieces(4, 4)
    engine = SwapEngine()
    a, b = engine.add_space(near), engine.add_space(far)
    fence = engine.add_fence()
    ticket = engine.copy(a, b, runs_of([0, 1], [2, 3]), fence, 7)
    assert not engine.wait(ticket, timeout_s=0.01)
    assert engine.busy(b, 2) and engine.busy(a, 0, for_writing=True) and not engine.busy(a, 0)
    for piece in near:
        piece[0] = 5
    threading.Timer(0.05, engine.signal, (fence, 7)).start()
    assert engine.wait(ticket)
    assert (np.array(far)[:, 2] == 5).all()
    other = engine.copy(a, b, runs_of([0], [0]), fence, 8)
    engine.cancel(other)
    engine.wait()
    assert set(engine.collect()) == {ticket, other}
    assert not engine.busy(b, 2)


def test_what_is_refused():
    engine = SwapEngine(queue_limit=1)
    near = pieces(4, 5)
    a = engine.add_space(near)
    with pytest.raises(errors.InvalidArgumentError, match="alike"):
        engine.add_space([near[0], near[1][:3]])
    with pytest.raises(errors.InvalidArgumentError, match="alike"):
        engine.add_space([near[0].swapaxes(1, 2)])
    with pytest.raises(errors.InvalidArgumentError, match="empty"):
        engine.add_space([])
    for runs in ([[0, 4, 1]], [[3, 0, 2]], [[0, 0, 1]], [[0, 2, 1], [1, 2, 1]]):
        with pytest.raises(errors.InvalidArgumentError):
            engine.copy(a, a, np.array(runs, np.uint32))
    with pytest.raises(errors.InvalidArgumentError):
        engine.copy(a, 99, runs_of([0], [1]))
    fence = engine.add_fence()
    engine.copy(a, a, runs_of([0], [1]), fence, 1)
    with pytest.raises(errors.StateError):
        engine.remove_space(a)
    with pytest.raises(errors.CapacityError):
        engine.copy(a, a, runs_of([2], [3]))
    with pytest.raises(errors.InvalidArgumentError, match="workers"):
        SwapEngine(0)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_host_tier_keeps_blocks(contiguous):
    groups = [KvGroup((0, 2), 0, 4), KvGroup((1,), 8, 4)]
    storage = KvStorage.allocate(groups, 10, 2, 8)
    if not contiguous:
        keys, values = (
            [np.zeros((10, 2, 4, 8), np.float32).swapaxes(1, 2) for _ in range(3)] for _ in "kv"
        )
        storage = KvStorage(groups, keys, values)
    rng = np.random.default_rng(6)
    for part in (*storage.keys, *storage.values):
        part[:] = rng.standard_normal(part.shape)
    before = [part.copy() for part in (*storage.keys, *storage.values)]
    tier = HostTier(storage, 6)
    places = tier.out(0, [7, 2, 3]), tier.out(1, [0, 9])
    tier.finish()
    for part in (*storage.keys, *storage.values):
        part[:] = 0
    tier.back(0, places[0], [1, 8, 9])
    tier.back(1, places[1], [5, 4])
    tier.finish()
    moved = {0: ([7, 2, 3], [1, 8, 9]), 1: ([0, 9], [5, 4]), 2: ([7, 2, 3], [1, 8, 9])}
    for i, part in enumerate((*storage.keys, *storage.values)):
        sources, targets = moved[i % 3]
        np.testing.assert_array_equal(part[targets], before[i][sources])
        assert not np.delete(part, targets, axis=0).any()
    tier.free(0, places[0])
    assert len(tier.out(0, [0, 1, 2, 3, 4, 5])) == 6
    tier.finish()
    assert (tier.stats()["jobs"] > 0) == contiguous


@pytest.mark.parametrize(
    ("free", "wanted", "places"),
    [
        ("1111.11.111", 2, [5, 6]),  # the tightest run
        ("1111.11.111", 3, [8, 9, 10]),
        ("1111.11.111", 6, [0, 1, 2, 3, 8, 9]),  # none fits: the longest first
        ("1111.11.111", 9, [0, 1, 2, 3, 8, 9, 10, 5, 6]),
        ("1111.11.111", 0, []),
        ("....", 2, []),
    ],
)
def test_places_on_the_host_are_runs(free, wanted, places):
    given = np.array([c == "1" for c in free])
    assert _places(given, wanted).tolist() == places


def test_a_host_tier_is_counted_against_a_budget():
    storage = KvStorage.allocate([KvGroup((0,), 0, 16)], 8, 4, 64)  # blocks of 32 KiB
    budget = Budget(2 * UNIT_BYTES)
    with pytest.raises(errors.CapacityError):
        ServingPool(8, host_blocks=129, storage=storage, host_budget=budget)
    assert budget.available_bytes == 2 * UNIT_BYTES  # refused without a trace
    pool = ServingPool(8, host_blocks=65, storage=storage, host_budget=budget)
    assert budget.available_bytes == 0  # 65 blocks take two units
    storage.keys[0][:] = np.arange(8).reshape(8, 1, 1, 1)
    pool.admit(1, np.arange(48, dtype=np.int32))
    row = pool.step([(1, 48)]).groups[0].tables[0, :3]
    before = storage.keys[0][row].copy()
    pool.step([], swap_out=[1])
    storage.keys[0][:] = -1
    row = pool.step([(1, 48)], swap_in=[1]).groups[0].tables[0, :3]
    np.testing.assert_array_equal(storage.keys[0][row], before)
    stats = pool.stats()
    assert stats["swap_blocks"] == 6
    assert stats["swap_bytes"] == 6 * (32 << 10)
    assert stats["swap_reserved_bytes"] == 2 * UNIT_BYTES
    metrics = flatten(stats)
    assert metrics["swap_bytes"] == stats["swap_bytes"]
    assert metrics["swaps|done"] == 2 and metrics["swaps|failed"] == 0
    assert 0 < metrics["swap_copies"] <= 12 and metrics["swap_seconds"] > 0
    pool.step([], swap_out=[1])
    assert flatten(pool.stats())["swapped_blocks"] == 3
    pool.check()
    del pool
    assert budget.available_bytes == 2 * UNIT_BYTES


class Writer:
    """A serving pool whose every slot holds what its request, token and last writing say."""

    GROUPS = (KvGroup((0,), 0, 4), KvGroup((1,), 12, 4))
    BLOCK = 4

    def __init__(self, num_blocks=24, host_blocks=20):
        self.storage = KvStorage.allocate(list(self.GROUPS), num_blocks, 1, 1)
        self.pool = ServingPool(
            num_blocks, self.BLOCK, 2, list(self.GROUPS), host_blocks, self.storage
        )
        self.known, self.out = {}, set()  # request: tokens

    def value(self, request, token):
        return request * 1000 + token

    def admit(self, request):
        self.pool.admit(request, np.full(40, request, np.int32))
        self.known[request] = 0

    def grow(self, request, tokens, layers=2):
        """Write the tokens that are new, and check all that were there."""
        back = [request] if request in self.out else []
        have = self.known[request]
        tables = self.pool.step([(request, tokens)], swap_in=back)
        self.out.discard(request)
        for group, table in zip(self.GROUPS, tables.groups, strict=True):
            keys = self.storage.keys[group.layers[0]]
            first = max(0, have - group.window + 1) if group.window else 0
            for token in range(first, tokens):
                place = table.tables[0, token // self.BLOCK], token % self.BLOCK, 0
                assert place[0] >= 0
                if token < have:
                    assert keys[place] == self.value(request, token)
                else:
                    keys[place] = self.value(request, token)
        self.pool.commit(request, tokens, layers)
        self.known[request] = tokens

    def leave(self, request):
        self.pool.step([], swap_out=[request])
        self.out.add(request)

    def copied(self):
        return self.pool.stats()["swap_blocks"], self.pool.stats()["swap_clean"]


def test_only_blocks_that_may_have_changed_are_copied_out_again():
    writer = Writer()
    writer.admit(1)
    writer.grow(1, 10)
    writer.leave(1)
    assert writer.copied() == (3 + 3, 0)  # two groups
    writer.grow(1, 17)
    assert writer.copied() == (12, 0) and writer.pool.num_swapped == 0
    writer.leave(1)
    # 2 of 5 blocks are there still; the window has released the first of 4 in its group.
    assert writer.copied() == (12 + 3 + 3, 2 + 1)
    writer.grow(1, 18)
    writer.leave(1)
    assert writer.copied() == (18 + 9 + 1 + 1, 3 + 4 + 3)
    assert writer.pool.num_swapped == 9
    writer.pool.free(1)
    assert writer.pool.num_swapped == 0
    # All of the host is there again.
    writer.admit(2)
    writer.grow(2, 40)
    assert writer.pool.can_swap(2)
    writer.leave(2)
    writer.pool.check()


def test_blocks_of_a_prefill_by_layers_are_copied_again():
    writer = Writer()
    writer.admit(1)
    writer.grow(1, 16, layers=1)  # the second layer is still to be written
    writer.leave(1)
    writer.grow(1, 16, layers=1)
    writer.leave(1)
    assert writer.copied()[1] == 0


OPERATIONS = st.tuples(st.sampled_from("agogogogf"), st.integers(0, 2), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, min_size=20, max_size=60))
def test_shadows_never_bring_back_what_is_old(program):
    writer = Writer()
    for name, index, count in program:
        known = list(writer.known)
        try:
            if name == "a" or not known:
                request = max(known, default=0) + 1
                writer.admit(request)
            else:
                request = known[index % len(known)]
            if name == "f":
                writer.pool.free(request)
                writer.out.discard(request)
                del writer.known[request]
            elif name == "o":
                writer.leave(request)
            else:
                writer.grow(request, min(40, writer.known[request] + count))
        except errors.CapacityError:
            continue
        pool = writer.pool
        on_host = sum(int((~free).sum()) for free in pool._host._free)
        assert on_host == pool.num_swapped + pool._num_shadow <= pool.host_blocks
        pool.check()
    for request in list(writer.known):
        writer.pool.free(request)
    assert all(free.all() for free in writer.pool._host._free)
