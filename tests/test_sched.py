"""The scheduler against a simulated engine: invariants hold under every event."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyruntime import errors
from pyruntime.kv import ReferenceBlockPool
from pyruntime.sched import (
    ChunkedPrefill,
    LayeredPrefill,
    Policy,
    Request,
    Resources,
    Scheduler,
    State,
    preset,
)

LAYERS = 5


class Bench:
    """A scheduler, a pool, and an engine that only counts."""

    def __init__(self, policy=None, num_blocks=40, block_size=4, max_running=6, max_queued=50):
        self.pool = ReferenceBlockPool(num_blocks, block_size, LAYERS)
        self.scheduler = Scheduler(Resources(LAYERS, 120, max_running, max_queued), policy)
        self.now = 0.0
        self.next_id = 0
        self.done = {}
        self.lengths = {}
        self.computed = {}  # (request, life) -> set of (token, layer)
        self.lives = {}
        self.log = []

    def arrive(self, prompt=10, new=5, **fields):
        self.next_id += 1
        request = Request(self.next_id, prompt, new, **fields)
        self.scheduler.arrive(request, self.now, self.pool)
        self.lengths[request.id] = request.known
        self.lives[request.id] = 0
        return request

    def end(self, request, state):
        self.done[request] = state
        self.pool.free(request)

    def plan(self):
        self.now += 1.0
        plan = self.scheduler.schedule(self.now, self.pool)
        if plan is None:
            return None
        for request, _ in plan.preempt.tolist():
            self.lives[request] += 1
        grow = [(r, t) for r, t in plan.kv_after.tolist()]
        for request, _ in grow:
            if not self.pool.knows(request):
                self.pool.admit(request, np.empty(0, np.int32))
        self.pool.step(grow, [r for r, _ in plan.preempt.tolist()])
        self.pool.check()
        self.log.append((plan.decode.tolist(), plan.prefill.tolist(), plan.preempt.tolist()))
        return plan

    def finish(self, plan):
        sampled = list(plan.decode.tolist())
        for request in sampled:
            if request in self.scheduler.requests:
                self._compute(request, self.lengths[request] - 1, self.lengths[request], 0, LAYERS)
        for request, low, high, first, last in plan.prefill.tolist():
            if request not in self.scheduler.requests:
                continue
            self._compute(request, low, high, first, last)
            if last == LAYERS and high == self.lengths[request]:
                sampled.append(request)
        self.scheduler.step_done(plan, sampled)
        for request in sampled:
            state = self.scheduler.requests.get(request)
            if state is None:
                continue
            self.lengths[request] += 1
            assert state.known == self.lengths[request]
            if state.generated >= state.max_new:
                self.scheduler.finish(request)
                self.end(request, State.FINISHED)

    def _compute(self, request, low, high, first, last):
        seen = self.computed.setdefault((request, self.lives[request]), set())
        for token in range(low, high):
            for layer in range(first, last):
                assert (token, layer) not in seen, "computed twice in one life"
                assert layer == 0 or (token, layer - 1) in seen
                assert layer > 0 or token == 0 or (token - 1, 0) in seen
                seen.add((token, layer))

    def run(self, limit=2000):
        for _ in range(limit):
            plan = self.plan()
            if plan is None:
                return
            self.finish(plan)
        raise AssertionError("no end")


def policies():
    return [
        preset("fcfs"),
        preset("layered"),
        Policy("small", partition=ChunkedPrefill(3)),
        Policy("layers", partition=LayeredPrefill(4, 60, 8)),
    ]


@pytest.mark.parametrize("index", range(4))
def test_everything_finishes(index):
    bench = Bench(policies()[index])
    rng = np.random.default_rng(index)
    for _ in range(30):
        bench.arrive(int(rng.integers(1, 90)), int(rng.integers(1, 30)))
    bench.run()
    assert set(bench.done.values()) == {State.FINISHED} and len(bench.done) == 30
    assert bench.pool.num_free == 40
    for (request, life), seen in bench.computed.items():
        if life == bench.lives[request]:
            tokens = bench.lengths[request] - 1
            assert seen == {(t, layer) for t in range(tokens) for layer in range(LAYERS)}


class Machine(RuleBasedStateMachine):
    """Random arrivals, cancellations, failures and steps."""

    def __init__(self):
        super().__init__()
        self.bench = None
        self.open = None
        self.arrived = set()
        self.failures = 0

    @precondition(lambda self: self.bench is None)
    @rule(index=st.integers(0, 3), blocks=st.integers(8, 40))
    def start(self, index, blocks):
        self.bench = Bench(policies()[index], blocks)

    @precondition(lambda self: self.bench)
    @rule(
        prompt=st.integers(0, 130),
        new=st.integers(1, 60),
        priority=st.integers(-1, 1),
    )
    def arrive(self, prompt, new, priority):
        bench = self.bench
        try:
            request = bench.arrive(prompt, new, priority=priority)
        except errors.InvalidArgumentError:
            assert prompt < 1 or prompt >= 120 or not bench.pool.fits(prompt + 1)
            return
        except errors.CapacityError:
            assert bench.scheduler.num_waiting == 50
            return
        assert bench.pool.fits(prompt + request.max_new)
        self.arrived.add(request.id)

    @precondition(lambda self: self.bench and self.arrived)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(sorted(self.arrived)))
        if self.bench.scheduler.cancel(request):
            self.bench.end(request, State.CANCELLED)
        else:
            assert request in self.bench.done

    @precondition(lambda self: self.bench and self.open is None)
    @rule()
    def plan(self):
        self.open = self.bench.plan()
        if self.open is None:  # work conservation
            assert not self.bench.scheduler.requests

    @precondition(lambda self: self.bench and self.open is not None)
    @rule()
    def step_done(self):
        plan, self.open = self.open, None
        self.bench.finish(plan)
        self.failures = 0

    @precondition(lambda self: self.bench and self.open is not None and self.failures < 3)
    @rule()
    def step_failed(self):
        plan, self.open = self.open, None
        self.failures += 1
        blamed = self.bench.scheduler.engine_error(plan)
        if blamed is not None:
            self.bench.end(blamed, State.FAILED)

    @invariant()
    def conserved(self):
        if self.bench is None:
            return
        bench = self.bench
        bench.pool.check()
        assert set(bench.scheduler.requests) | set(bench.done) == self.arrived
        assert not set(bench.scheduler.requests) & set(bench.done)
        assert len(bench.scheduler.running) <= 6
        for request in bench.scheduler.requests:
            assert bench.scheduler.explain(request).reason

    def teardown(self):
        if self.bench is None:
            return
        if self.open is not None:
            self.bench.finish(self.open)
        self.bench.run()
        assert not self.bench.scheduler.requests
        assert self.bench.pool.num_free == self.bench.pool.num_blocks


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def test_plans_replay_bit_for_bit():
    logs = []
    for _ in range(2):
        bench = Bench(preset("layered"))
        rng = np.random.default_rng(3)
        for _ in range(20):
            bench.arrive(int(rng.integers(1, 100)), int(rng.integers(1, 20)))
            if plan := bench.plan():
                bench.finish(plan)
        bench.run()
        logs.append(bench.log)
    assert logs[0] == logs[1]


def test_decodes_never_stall_behind_prefills():
    for policy in policies():
        bench = Bench(policy, num_blocks=200)
        bench.arrive(4, 40)
        while bench.scheduler.requests[1].state is not State.DECODE:
            bench.finish(bench.plan())
        for _ in range(4):
            bench.arrive(100, 2)
        for _ in range(10):
            plan = bench.plan()
            assert 1 in plan.decode.tolist()
            bench.finish(plan)


def test_layered_prefill_covers_all_tokens_a_slice_of_layers_at_a_time():
    bench = Bench(Policy(partition=LayeredPrefill(20, 200, 50)), num_blocks=100)
    bench.arrive(60, 1)
    bench.arrive(40, 1)
    seen = []
    for _ in range(5):
        plan = bench.plan()
        seen.append(
            {(low, high, first, last) for _, low, high, first, last in plan.prefill.tolist()}
        )
        bench.finish(plan)
    assert seen == [{(0, 60, g, g + 1), (0, 40, g, g + 1)} for g in range(5)]
    assert len(bench.done) == 2


@pytest.mark.parametrize("room", [0, 49])
def test_prompts_are_chunked_where_hidden_states_have_no_room(room):
    bench = Bench(Policy(partition=LayeredPrefill(20, 200, 50)), num_blocks=100)
    bench.scheduler.resources = replace(bench.scheduler.resources, hidden_tokens=room)
    bench.arrive(60, 1)
    plan = bench.plan()
    assert plan.prefill.tolist() == [[1, 0, 20, 0, LAYERS]]


def test_short_prompts_are_chunked_under_the_layered_preset():
    bench = Bench(preset("layered"))
    bench.arrive(50, 1)
    plan = bench.plan()
    assert plan.prefill.tolist() == [[1, 0, 50, 0, LAYERS]]


def test_impossible_requests_are_rejected_on_arrival():
    bench = Bench(num_blocks=10)
    with pytest.raises(errors.InvalidArgumentError, match="KV memory"):
        bench.arrive(40, 1)
    with pytest.raises(errors.InvalidArgumentError, match="context"):
        bench.arrive(120, 1)
    with pytest.raises(errors.InvalidArgumentError):
        bench.arrive(0, 1)
    capped = bench.arrive(30, 50)
    assert capped.max_new == 10
    bench.run()
    assert bench.done == {4: State.FINISHED}


def test_a_full_queue_refuses():
    bench = Bench(max_queued=2)
    bench.arrive()
    bench.arrive()
    with pytest.raises(errors.CapacityError):
        bench.arrive()


def test_priority_goes_first_and_gives_way_last():
    bench = Bench(max_running=1)
    bench.arrive(10, 1)
    bench.arrive(10, 1)
    bench.arrive(10, 1, priority=5)
    bench.run()
    assert list(bench.done) == [3, 1, 2]


def test_small_requests_pass_a_head_that_does_not_fit_but_not_for_ever():
    bench = Bench(num_blocks=20, max_running=20)
    bench.arrive(40, 30)  # runs, and holds most of the memory
    bench.finish(bench.plan())
    head = bench.arrive(60, 2)
    small = [bench.arrive(4, 2).id for _ in range(12)]
    order = []
    for _ in range(80):
        plan = bench.plan()
        if plan is None:
            break
        bench.finish(plan)
        order += [r for r in bench.done if r not in order]
    assert head.id in order
    passed = [r for r in small if order.index(r) < order.index(head.id)]
    assert 1 <= len(passed) <= 8


def test_explain_names_the_reason():
    bench = Bench(max_running=1)
    first, second, third = (bench.arrive() for _ in range(3))
    bench.finish(bench.plan())
    bench.finish(bench.plan())
    assert bench.scheduler.explain(first.id).reason == "running"
    assert bench.scheduler.explain(second.id).reason == "max_running"
    behind = bench.scheduler.explain(third.id)
    assert (behind.reason, behind.behind, behind.position) == ("behind", second.id, 1)
    with pytest.raises(errors.NotFoundError):
        bench.scheduler.explain(99)


def test_a_poisonous_request_is_isolated_and_the_rest_goes_on():
    bench = Bench(max_running=8, num_blocks=100)
    requests = [bench.arrive(8, 4).id for _ in range(7)]
    poison = requests[4]
    failures = 0
    for _ in range(200):
        plan = bench.plan()
        if plan is None:
            break
        if poison in plan.requests():
            failures += 1
            blamed = bench.scheduler.engine_error(plan)
            if blamed is not None:
                bench.end(blamed, State.FAILED)
        else:
            bench.finish(plan)
    assert bench.done.pop(poison) is State.FAILED
    assert set(bench.done.values()) == {State.FINISHED} and len(bench.done) == 6
    assert failures <= 6


def test_a_passing_failure_costs_nobody():
    bench = Bench()
    bench.arrive()
    bench.arrive()
    assert bench.scheduler.engine_error(bench.plan()) is None
    bench.run()
    assert set(bench.done.values()) == {State.FINISHED}


def test_late_and_repeated_results_are_ignored():
    bench = Bench()
    bench.arrive(5, 5)
    plan = bench.plan()
    bench.finish(plan)
    known = bench.scheduler.requests[1].known
    bench.scheduler.step_done(plan, [1])
    assert bench.scheduler.engine_error(plan) is None
    assert bench.scheduler.requests[1].known == known
    with pytest.raises(errors.InvalidArgumentError, match="not been answered"):
        bench.plan()
        bench.plan()


def test_deadlines_expire():
    bench = Bench()
    bench.arrive(5, 5, deadline=3.0)
    bench.arrive(5, 5)
    assert bench.scheduler.expired(2.9) == []
    assert bench.scheduler.expired(3.0) == [1]


class Raises:
    def key(self, request):
        raise RuntimeError("policy bug")

    refuse = victim = cut = key


class Nonsense:
    def key(self, request):
        return (math.nan,)

    def refuse(self, *_):
        return ""

    def victim(self, running):
        return Request(77, 1, 1)

    def cut(self, prefilling, num_decode, limits, take):
        taken = [r for _ in range(9) if (r := take(100)) is not None]
        good = [(r.id, r.computed, r.known, 0, LAYERS) for r in (*prefilling, *taken)]
        return [
            (99, 0, 4, 0, LAYERS),
            *good,
            *((i, low, high + 1, 0, 9) for i, low, high, *_ in good),
        ]


@pytest.mark.parametrize("part", ["ordering", "admission", "preemption", "partition"])
@pytest.mark.parametrize("broken", [Raises, Nonsense])
def test_broken_policies_are_replaced_and_counted(part, broken):
    bench = Bench(Policy(**{part: broken()}), num_blocks=12)
    for _ in range(8):
        bench.arrive(10, 20)
    bench.run()
    assert set(bench.done.values()) == {State.FINISHED} and len(bench.done) == 8
    if not (part == "admission" and broken is Nonsense):
        assert bench.scheduler.faults[part] > 0


def test_presets_are_listed():
    with pytest.raises(errors.NotFoundError, match="fcfs, layered"):
        preset("nope")


class OneAtATime:
    def __init__(self):
        self.served = {"a": 0, "b": 0}

    def pick(self, tenants):
        return min(tenants, key=self.served.get)

    def charge(self, tenant, prefill, decode):
        self.served[tenant] += prefill + decode


def test_fairness_chooses_among_tenants():
    fairness = OneAtATime()
    bench = Bench(Policy(fairness=fairness), max_running=1)
    for _ in range(4):
        bench.arrive(8, 2, tenant="a")
    bench.arrive(8, 2, tenant="b")
    bench.run()
    assert list(bench.done).index(5) == 1


class Window:
    def ready(self, waiting, oldest_s):
        return waiting >= 3 or oldest_s >= 5


def test_batching_may_hold_work_back_for_a_bounded_time():
    bench = Bench(Policy(batching=Window()))
    bench.arrive()
    assert bench.plan() is None
    assert bench.scheduler.explain(1).reason == "window"
    bench.arrive()
    bench.arrive()
    assert len(bench.plan().prefill) == 3
