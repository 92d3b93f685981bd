"""The byte budget from Python: against a model, callbacks, and its failures."""

import gc
import os
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyruntime import errors
from pyruntime.pool import UNIT_BYTES, Budget

LIMIT = 12  # units


class Holder:
    """A client willing to give up `gives` units."""

    def __init__(self, budget, name, priority):
        self.held = self.gives = 0
        self.priority = priority
        self.client = budget.register(name, priority=priority, reclaim=self.reclaim)

    def reclaim(self, num_bytes):
        units = min(-(-num_bytes // UNIT_BYTES), self.gives, self.held)
        self.client.give_back(units * UNIT_BYTES)
        self.held -= units
        self.gives -= units
        return units * UNIT_BYTES


class BudgetModel(RuleBasedStateMachine):
    """Reservations of four clients at three priorities against sums."""

    @initialize()
    def start(self):
        self.budget = Budget(LIMIT * UNIT_BYTES)
        self.holders = [Holder(self.budget, f"client {i}", i % 3) for i in range(4)]

    @property
    def available(self):
        return LIMIT - sum(holder.held for holder in self.holders)

    @rule(which=st.integers(0, 3), units=st.integers(0, LIMIT + 1))
    def reserve(self, which, units):
        mine = self.holders[which]
        lower = [h for h in self.holders if h is not mine and h.priority <= mine.priority]
        obtainable = self.available + sum(min(h.gives, h.held) for h in lower)
        untouched = [
            (h, h.held) for h in self.holders if h.priority > mine.priority or units > LIMIT
        ]
        if units <= min(obtainable, LIMIT):
            mine.client.reserve(units * UNIT_BYTES)
            mine.held += units
        else:
            before = mine.held
            with pytest.raises(errors.CapacityError, match=f"{units * UNIT_BYTES} bytes"):
                mine.client.reserve(units * UNIT_BYTES)
            assert mine.held == before
        assert all(h.held == held for h, held in untouched)

    @rule(which=st.integers(0, 3), units=st.integers(0, LIMIT))
    def give_back(self, which, units):
        mine = self.holders[which]
        if units <= mine.held:
            mine.client.give_back(units * UNIT_BYTES)
            mine.held -= units
        else:
            with pytest.raises(errors.InvalidArgumentError):
                mine.client.give_back(units * UNIT_BYTES)

    @rule(which=st.integers(0, 3), units=st.integers(0, 5))
    def become_willing(self, which, units):
        self.holders[which].gives = units

    @rule(which=st.integers(0, 3))
    def leave_and_come_back(self, which):
        mine = self.holders[which]
        mine.client.close(force=True)
        self.holders[which] = Holder(self.budget, f"client {which}", mine.priority)

    @invariant()
    def sums_agree(self):
        if not hasattr(self, "budget"):
            return
        assert self.budget.available_bytes == self.available * UNIT_BYTES
        for holder in self.holders:
            assert holder.client.reserved_bytes == holder.held * UNIT_BYTES

    def teardown(self):
        for holder in getattr(self, "holders", []):
            holder.client.close(force=True)


TestBudgetModel = BudgetModel.TestCase
TestBudgetModel.settings = settings(
    max_examples=60, stateful_step_count=30, derandomize=True, deadline=None
)


def test_stats_count_per_client():
    budget = Budget(4 * UNIT_BYTES)
    low, high = Holder(budget, "low", 0), budget.register("high", priority=1)
    low.client.reserve(3 * UNIT_BYTES)
    low.held, low.gives = 3, 3
    high.reserve(2 * UNIT_BYTES)
    stats = low.client.stats()
    assert (stats["asked"], stats["asked_bytes"], stats["freed_bytes"]) == (
        1,
        UNIT_BYTES,
        UNIT_BYTES,
    )
    assert stats["peak_bytes"] == 3 * UNIT_BYTES
    assert budget.stats()["reclaims"] == 1
    assert "0 of" in repr(budget) and "high" in repr(high)


def test_a_raising_or_lying_callback_is_reported_and_counts_as_nothing():
    budget = Budget(2 * UNIT_BYTES)
    seen = []
    broken = budget.register("broken", reclaim=lambda n: 1 / 0)
    odd = budget.register("odd", reclaim=lambda n: "much")
    liar = budget.register("liar", reclaim=lambda n: n)
    broken.reserve(UNIT_BYTES)
    odd.reserve(UNIT_BYTES)
    high = budget.register("high", priority=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_type))
        with pytest.raises(errors.CapacityError, match="0 of the budget's"):
            high.reserve(UNIT_BYTES)
    assert set(seen) == {ZeroDivisionError, TypeError}
    odd.close(force=True)
    liar.reserve(UNIT_BYTES)
    broken.close(force=True)
    high.reserve(UNIT_BYTES)
    with pytest.raises(errors.CapacityError):
        high.reserve(UNIT_BYTES)
    assert liar.reserved_bytes == UNIT_BYTES


def test_dropped_clients_leave_and_owners_are_not_kept_alive():
    budget = Budget(2 * UNIT_BYTES)
    owner = Holder(budget, "owner", 0)
    owner.client.reserve(UNIT_BYTES)
    gc.disable()
    try:
        del owner  # no cycle: gone at once, with its bytes
        assert budget.stats()["num_clients"] == 0
    finally:
        gc.enable()
    assert budget.available_bytes == 2 * UNIT_BYTES


def test_a_client_may_be_dropped_in_its_own_callback():
    budget = Budget(UNIT_BYTES)
    clients = {}

    def drop(num_bytes):
        clients.clear()
        gc.collect()
        return 0

    clients["low"] = budget.register("low", reclaim=drop)
    clients["low"].reserve(UNIT_BYTES)
    high = budget.register("high", priority=1)
    with pytest.raises(errors.CapacityError):
        high.reserve(UNIT_BYTES)
    assert not clients


def test_bad_arguments_are_typed_errors():
    for limit in (0, UNIT_BYTES - 1, 1 << 63, -1, "much"):
        with pytest.raises(errors.InvalidArgumentError, match="limit_bytes"):
            Budget(limit)
    budget = Budget(UNIT_BYTES)
    for name in ("", 3, "a\0b"):
        with pytest.raises(errors.InvalidArgumentError, match="name"):
            budget.register(name)
    for priority in (1 << 31, "high", 1.5):
        with pytest.raises(errors.InvalidArgumentError, match="priority"):
            budget.register("client", priority=priority)
    with pytest.raises(errors.InvalidArgumentError, match="reclaim"):
        budget.register("client", reclaim=5)
    client = budget.register("client")
    for num_bytes in (1, UNIT_BYTES + 1, -UNIT_BYTES, 1.5):
        with pytest.raises(errors.InvalidArgumentError, match="bytes"):
            client.reserve(num_bytes)
        with pytest.raises(errors.InvalidArgumentError, match="bytes"):
            client.give_back(num_bytes)
    client.reserve(UNIT_BYTES)
    with pytest.raises(errors.StateError, match="holds"):
        client.close()
    client.close(force=True)
    client.close()
    with pytest.raises(errors.ClosedError):
        client.reserve(UNIT_BYTES)
    with pytest.raises(TypeError, match="pickle"):
        budget.__reduce__()


def test_a_forked_child_is_refused():
    budget = Budget(UNIT_BYTES)
    client = budget.register("client")
    client.reserve(UNIT_BYTES)
    child = os.fork()
    if child == 0:
        try:
            client.give_back(UNIT_BYTES)
        except errors.StateError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert client.reserved_bytes == UNIT_BYTES


def test_threads_reserve_and_reclaim_from_each_other():
    budget = Budget(4 * UNIT_BYTES)
    failures = []

    def work(priority):
        try:
            lock = threading.Lock()
            held = 0

            def reclaim(num_bytes):
                nonlocal held
                with lock:
                    units = min(held, -(-num_bytes // UNIT_BYTES))
                    client.give_back(units * UNIT_BYTES)
                    held -= units
                return units * UNIT_BYTES

            client = budget.register(f"thread {priority}", priority=priority, reclaim=reclaim)
            for _ in range(100):
                try:
                    client.reserve(UNIT_BYTES)
                except errors.CapacityError:
                    continue
                with lock:
                    held += 1
            client.close(force=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert budget.available_bytes == 4 * UNIT_BYTES
