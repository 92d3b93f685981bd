"""The contracts between pool and engine: groups, holes, shifts, copies, swaps, marks, budgets."""

import dataclasses

import numpy as np
import pytest

from pyruntime import errors, ops
from pyruntime.engine.runner import Engine, kv_groups
from pyruntime.kv import KvStorage, ReferenceBlockPool
from pyruntime.sched import make_plan
from tests.stepping import BOUND, Bench, load, reference


class GroupedBench(Bench):
    """A pool with the model's KV groups, which releases what a window leaves behind."""

    def __init__(self, case, num_blocks=64, block_size=4, host_blocks=0, changes=None):
        config, weights = load(case)
        config = dataclasses.replace(config, **(changes or {}))
        self.engine = Engine(config, weights, num_blocks, block_size)
        kv = self.engine.kv
        self.pool = ReferenceBlockPool(
            num_blocks, block_size, config.num_layers, kv.groups, host_blocks, kv
        )
        self.layers, self.plans = config.num_layers, 0

    def step(self, decode=(), prefill=(), **options):
        plan, tables = self.plan(decode, prefill)
        result = self.engine.run(plan, tables, **options)
        for request, tokens in plan.kv_after.tolist():
            done = all(p[4] == self.layers for p in prefill if p[0] == request)
            self.pool.commit(request, tokens, self.layers if done else 1)
        return result


def test_a_sliding_window_releases_blocks_and_logits_stay():
    expected = reference("mixtral_window")
    bench = GroupedBench("mixtral_window")
    assert [group.window for group in bench.engine.kv.groups] == [24]
    bench.add(1, expected["prompt"])
    tokens, logits = bench.greedy(1, 64)
    assert np.abs(logits[::4] - expected["logits"]).max() <= BOUND
    assert tokens == expected["tokens"].tolist()
    assert bench.pool.held(1) <= 24 // 4 + 2  # of 26 blocks
    bench.pool.check()


def test_layers_with_and_without_a_window_have_tables_of_their_own():
    """Windows mixed: one group's holes and ids are not the other's."""
    prompt = reference("mixtral_window")["prompt"]
    mixed = {"windows": (0, 24, 0)}
    bench = GroupedBench("mixtral_window", changes=mixed)
    assert [group.layers for group in bench.engine.kv.groups] == [(0, 2), (1,)]
    one_table = Bench("mixtral_window")
    one_table.engine = GroupedBench("mixtral_window", changes=mixed).engine
    one_table.pool = ReferenceBlockPool(64, 4, 3, bench.engine.kv.groups)  # never told: no holes
    for each in (bench, one_table):
        each.add(1, prompt)
    tokens, logits = bench.greedy(1, 40)
    wanted, same = one_table.greedy(1, 40)
    assert tokens == wanted
    np.testing.assert_array_equal(logits, same)
    full, sliding = bench.pool.step([(1, 80)]).groups
    assert (full.tables >= 0).all() and (sliding.tables[0, :10] == -1).all()


def test_a_swapped_request_continues_bit_for_bit():
    prompt = reference("mixtral_window")["prompt"]
    mixed = {"windows": (0, 24, 0)}
    whole = GroupedBench("mixtral_window", changes=mixed)
    bench = GroupedBench("mixtral_window", host_blocks=64, changes=mixed)
    for each in (whole, bench):
        each.add(1, prompt)
        each.prefill(1)
    assert bench.pool.can_swap(1)
    bench.pool.step([], swap_out=[1])
    assert bench.pool.num_free == bench.pool.num_blocks and bench.pool.num_swapped > 0
    with pytest.raises(errors.StateError, match="swapped out"):
        bench.pool.step([(1, 41)])
    bench.add(2, prompt[:30])  # takes the blocks that were left
    bench.prefill(2)
    tables = bench.pool.step([(1, 41)], swap_in=[1])
    plan = make_plan(99, [1], [], [(1, 41)], swap_in=[1])
    got = bench.engine.run(plan, tables, return_logits=True).logits
    np.testing.assert_array_equal(got, whole.step([1], return_logits=True).logits)
    assert bench.pool.num_swapped == 0
    bench.pool.check()


def test_swapping_refuses_what_does_not_fit_and_changes_nothing():
    bench = GroupedBench("olmoe", num_blocks=16, host_blocks=3)
    for request in (1, 2):
        bench.add(request, [5] * (8 * request))
        bench.prefill(request)
    assert bench.pool.can_swap(1) and not bench.pool.can_swap(2) and not bench.pool.can_swap(9)
    with pytest.raises(errors.CapacityError, match="host"):
        bench.pool.step([], swap_out=[1, 2])
    assert bench.pool.num_swapped == 0
    bench.pool.step([], swap_out=[1])
    bench.pool.step([], swap_out=[1])  # out already
    with pytest.raises(errors.CapacityError):
        bench.pool.step([(1, 80)], swap_in=[1])
    assert bench.pool.num_swapped == 2
    bench.pool.free(1)
    assert bench.pool.num_swapped == 0
    bench.pool.free(2)
    bench.pool.check()


def test_positions_run_ahead_of_slots_after_compaction():
    """Evict eight tokens, by a hole in the table and by moving the rest together: same logits."""
    prompt = reference("qwen3moe")["prompt"]
    logits = []
    for compact in (False, True):
        bench = Bench()
        bench.add(1, prompt)
        bench.prefill(1)
        plan, tables = bench.plan([1])
        table = tables.groups[0].tables
        if compact:
            order = [s for s in range(40) if not 8 <= s < 16]
            slot = [table[0, s // 4] * 4 + s % 4 for s in range(40)]
            moves = [(slot[source], slot[target]) for target, source in enumerate(order)]
            bench.engine.kv.move_slots(0, np.array(moves))
            tables.groups[0].shift[:] = 8
        else:
            table[0, 2:4] = -1
        logits.append(bench.engine.run(plan, tables, return_logits=True).logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)
    untouched = Bench()
    untouched.add(1, prompt)
    untouched.prefill(1)
    assert np.abs(untouched.step([1], return_logits=True).logits - logits[0]).max() > 1e-3


def test_attention_marks_name_the_slots_above_alpha():
    prompt = reference("qwen3moe")["prompt"]
    plain, marked = Bench(), Bench()
    results = []
    for bench, alpha in ((plain, None), (marked, 0.1), (marked, 0.0)):
        if not bench.plans:
            bench.add(1, prompt)
            bench.add(2, prompt[:10])
            bench.prefill(1)
            bench.prefill(2)
        plan, tables = bench.plan([1, 2])
        tables.alpha = alpha
        results.append(bench.engine.run(plan, tables))
    assert results[0].marks == {}
    assert results[0].sampled.tokens.tolist() == results[1].sampled.tokens.tolist()
    marks = results[1].marks[0]
    assert marks.shape == (2, 41) and 0 < marks[0].sum() < 41
    assert not marks[1, 11:].any()
    every = results[2].marks[0]  # softmax weights are positive
    assert every[0].all() and every[1, :12].all() and not every[1, 12:].any()


def test_blocks_are_copied_before_the_step():
    prompt = reference("qwen3moe")["prompt"]
    bench = Bench()
    bench.add(1, prompt)
    bench.prefill(1)
    wanted = bench.step([1], return_logits=True).logits
    fork = Bench()
    fork.add(1, prompt)
    fork.prefill(1)
    plan, tables = fork.plan([1])
    last = int(tables.groups[0].tables[0, 10])  # the block of token 40: written by this step
    shared = int(tables.groups[0].tables[0, 9])
    spare = next(b for b in range(64) if b not in tables.groups[0].tables[0])
    tables.groups[0].tables[0, 9] = spare
    tables.copies = np.array([(0, shared, spare)], np.int32)
    got = fork.engine.run(plan, tables, return_logits=True).logits
    np.testing.assert_array_equal(got, wanted)
    assert last != spare


def test_storage_of_other_strides_gives_the_same_bits():
    """Block-major and head-major K and V: the engine follows strides."""
    prompt = reference("qwen2moe")["prompt"]
    plain = Bench("qwen2moe")
    config, weights = load("qwen2moe")
    groups = kv_groups(config, 4)
    heads, d, layers = config.kv_heads, config.head_dim, config.num_layers
    whole = np.zeros((64, layers, 2, heads, 4, d + 3), np.float32)
    parts = [
        [whole[:, layer, kind, :, :, :d].swapaxes(1, 2) for layer in range(layers)]
        for kind in (0, 1)
    ]
    other = Bench("qwen2moe")
    other.engine = Engine(config, weights, 64, 4, storage=KvStorage(groups, *parts))
    for each in (plain, other):
        each.add(1, prompt)
    np.testing.assert_array_equal(
        plain.prefill(1, [7], [1], return_logits=True).logits,
        other.prefill(1, [7], [1], return_logits=True).logits,
    )
    with pytest.raises(errors.InvalidArgumentError, match="group"):
        KvStorage([], *parts)
    with pytest.raises(errors.InvalidArgumentError, match="one type"):
        KvStorage(groups, [p.astype(np.float16) for p in parts[0]], parts[1])
    with pytest.raises(errors.InvalidArgumentError, match="float32 or float16"):
        KvStorage(groups, *([p.astype(np.float64) for p in part] for part in parts))


def test_keys_and_values_in_halves_change_little():
    config, weights = load("qwen2moe")
    exact, halves = Bench("qwen2moe"), Bench("qwen2moe")
    storage = KvStorage.allocate(
        kv_groups(config, 4), 64, config.kv_heads, config.head_dim, dtype="float16"
    )
    halves.engine = Engine(config, weights, 64, 4, storage=storage)
    assert 2 * halves.engine.kv_bytes == exact.engine.kv_bytes
    prompt = np.random.default_rng(3).integers(0, config.vocab_size, 40).tolist()
    logits = []
    for each in (exact, halves):
        each.add(1, prompt)
        result = each.prefill(1, cuts=[32], return_logits=True)  # the rest reads what was kept
        logits.append(result.logits[-1].astype(np.float64))
    exact, rounded = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits)
    divergence = (exact * np.log(exact / rounded)).sum()
    assert 0 < divergence < 1e-5


def test_hidden_states_stay_within_their_budget():
    config, weights = load("olmoe")
    bench = Bench("olmoe")
    bench.engine = Engine(config, weights, 64, 4, hidden_budget=20 * config.hidden * 4)
    for request, size in ((1, 20), (2, 21)):
        bench.add(request, [5] * size)
    bench.step(prefill=[(1, 0, 20, 0, 1)])
    assert bench.engine.hidden_bytes == 20 * config.hidden * 4
    with pytest.raises(errors.CapacityError, match="hidden"):
        bench.step(prefill=[(2, 0, 21, 0, 1)])
    plan, tables = bench.plan(preempt=[1])
    bench.engine.run(plan, tables)  # its slices start anew
    assert bench.engine.hidden_bytes == 0


def test_a_result_says_how_far_every_request_came():
    bench = Bench()
    bench.add(1, [5, 6, 7])
    bench.add(2, [5] * 12)
    bench.prefill(1)
    plan, tables = bench.plan([1], [(2, 0, 6, 0, 3)])
    stop = ops.StopFlag()
    stop.set()
    stopped = bench.engine.run(plan, tables, stop)
    assert set(stopped.status.values()) == {"stopped"}
    result = bench.engine.run(plan, tables)
    assert result.status == {1: "sampled", 2: "advanced"}
    assert {(p.request, p.token, p.layer, p.operator) for p in result.reached} == {
        (1, 5, 3, ""),
        (2, 6, 3, ""),
    }
    assert (result.device, result.stream, tables.device, plan.stream) == ("cpu", 0, "cpu", 0)
