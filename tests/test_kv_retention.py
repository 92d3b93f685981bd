"""Pins of programs that call tools: how long, until when, and who gives way."""

import copy
import math
import os
import random

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.kv import Admission, BlockPool, Retention
from tests.kv_model import Model

SCALE = float(os.environ.get("PYRUNTIME_TEST_SCALE", 1))
SECOND = 10**9


def best(durations, benefit):
    """The tau of 0 and all durations for which P(tau) * benefit - tau is most; the least one."""
    taus = [0.0, *sorted(durations)]
    shares = np.searchsorted(np.sort(durations), taus, side="right") / len(durations)
    worth = shares * benefit - np.array(taus)
    return taus[int(np.argmax(worth))]


def prompt(*parts, size=4, cut=0):
    tokens = np.repeat(np.array(parts, np.int32), size)
    return tokens[: len(tokens) - cut]


def serve(pool, tokens):
    outcome = pool.step(admissions=[Admission(tokens)])
    assert outcome.fitted
    [(seq, cached)] = outcome.admitted
    pool.commit(seq, len(tokens), ids=tokens)
    return seq, cached


class Clock:
    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


# How long


def test_the_time_to_live_is_what_pays_most():
    rng = np.random.default_rng(1)
    for case in range(40):
        kept = Retention(BlockPool(8))
        tools = {name: [] for name in "abc"}
        for _ in range(int(rng.integers(101, 1800))):
            tool = "abc"[int(rng.choice(3, p=[0.7, 0.2, 0.1]))]
            seconds = float(np.round(rng.lognormal(0, 2), int(rng.integers(0, 4))))
            kept.observe(tool, seconds)
            tools[tool].append(seconds)
            tools.setdefault("all", []).append(seconds)
        wait, reload, eta = rng.random() * 5, rng.random() * 9, rng.random()
        for tool, durations in tools.items():
            known = durations[-1000:] if len(durations) > 100 else tools["all"][-1000:]
            tau = kept.suggest(tool, wait=wait, reload=reload, eta=eta)
            assert tau == best(known, wait * eta + reload), (case, tool)
            assert tau <= wait * eta + reload  # so a long tail never holds beyond that


def test_unknown_tools_are_exponential():
    kept = Retention(BlockPool(8), unknown_mean=0.5)
    assert kept.suggest("x", wait=1, reload=2, eta=1) == pytest.approx(0.5 * math.log(6))
    assert kept.suggest("x", reload=0.4, eta=1) == 0
    for _ in range(100):
        kept.observe("y", 7.0)
    assert kept.suggest("y", reload=3) == pytest.approx(0.5 * math.log(6))  # too few yet
    kept.observe("y", 7.0)
    assert kept.suggest("y", reload=3) == 0 and kept.suggest("y", reload=8) == 7


def test_the_released_rule_is_two_seconds_or_none():
    kept = Retention(BlockPool(8), rule="fixed")
    for seconds in (1.0, 3.0):
        kept.observe("quick", seconds)
    for seconds in (0.1, 0.1, 9.0):
        kept.observe("slow", seconds)
    assert [kept.suggest(t, reload=99) for t in ("quick", "slow", "unknown")] == [2, 0, 0]


def test_eta_is_minus_the_correlation_of_turns_done_and_left():
    rng = random.Random(2)
    for draw, low, high in (
        (lambda: 8, 1, 1),
        (lambda: rng.randint(1, 20), 0.2, 0.9),
        (lambda: 1 + int(math.log(rng.random()) / math.log(0.8)), 0, 0.1),
    ):
        kept, done, left = Retention(BlockPool(8)), [], []
        for _ in range(2000):
            turns = draw()
            kept.ended(turns)
            done += range(turns)
            left += range(turns, 0, -1)
        eta = max(0.0, -np.corrcoef(done, left)[0, 1])
        assert low <= eta + 1e-9 and eta - 1e-9 <= high
        for _ in range(101):
            kept.observe("t", 1.0)  # pays if wait * eta exceeds it
        for wait in (1.01, 3, 1.01 / max(eta, 1e-3), 0.99 / max(eta, 1e-3)):
            assert kept.suggest("t", wait=wait) == (1.0 if wait * eta > 1 else 0.0)
    assert Retention(BlockPool(8)).suggest("t", wait=3) == pytest.approx(math.log(3))  # 1 at first


def test_wrong_arguments_are_refused():
    pool = BlockPool(8)
    kept = Retention(pool)
    for call in (
        lambda: Retention(pool, rule="best"),
        lambda: Retention(pool, cap=1.5),
        lambda: Retention(pool, cap=math.nan),
        lambda: Retention(pool, unknown_mean=0),
        lambda: kept.observe("t", -1),
        lambda: kept.observe("t", math.inf),
        lambda: kept.ended(0),
        lambda: kept.suggest("t", wait=math.nan),
        lambda: kept.suggest("t", reload=-1),
        lambda: kept.suggest("t", eta=1.5),
        lambda: kept.suggest("t" * 5000),
    ):
        with pytest.raises(errors.InvalidArgumentError):
            call()
    with pytest.raises(errors.StateError):
        kept.leave(77, "t", arrival=1, seconds=1)
    assert not kept.back(0) and not kept.back(1) and not kept.back(2**33 + 1)


# Until when


def test_pins_end_by_the_clock():
    """Against a list of deadlines, over jumps of microseconds and of minutes."""
    rng, clock = random.Random(3), Clock()
    pool = BlockPool(64, block_size=4, max_seqs=2000)
    kept = Retention(pool, cap=1.0, clock=clock)
    seq, _ = serve(pool, prompt(1))
    deadlines = {}
    for _ in range(4000):
        if len(deadlines) < 60 and rng.random() < 0.6:
            seconds = 10 ** rng.uniform(-6, 2)
            pin = kept.leave(seq, "t", arrival=len(deadlines), seconds=seconds)
            deadlines[pin] = clock.now + int(seconds * 1e9)
        elif deadlines and rng.random() < 0.2:
            pin = rng.choice(list(deadlines))
            assert kept.back(pin) and not kept.back(pin)
            del deadlines[pin]
        else:
            clock.now += int(10 ** rng.uniform(2, 10.5))
            over = [pin for pin, deadline in deadlines.items() if deadline <= clock.now]
            assert kept.tick() == len(over)
            for pin in over:
                del deadlines[pin]
            pool.check()
        assert pool.stats()["pins"] == len(deadlines)
    clock.now -= SECOND
    assert kept.tick() == 0  # it never goes back


def test_what_is_pinned_is_kept_and_then_ordinary():
    clock = Clock()
    pool = BlockPool(8, block_size=4, run_blocks=1)
    kept = Retention(pool, clock=clock)
    seq, _ = serve(pool, prompt(1, 2))
    pin = kept.leave(seq, "t", arrival=1, seconds=2)
    pool.free(seq)
    for i in range(20):
        seq, _ = serve(pool, prompt(100 + i, 200 + i, 300 + i))
        pool.free(seq)
    assert pool.match(prompt(1, 2, 3)).tokens == 8
    clock.now = 2 * SECOND
    assert kept.tick() == 1 and not kept.back(pin)
    assert pool.match(prompt(1, 2, 3)).tokens == 8 and pool.available() == 8
    for i in range(3):
        seq, _ = serve(pool, prompt(500 + i, 600 + i, 700 + i))
        pool.free(seq)
    assert pool.match(prompt(1, 2, 3)).tokens == 0
    assert pool.stats()["pins_expired"] == 1


def test_the_cap_holds_and_earlier_programs_go_before_later_ones():
    pool = BlockPool(20, block_size=4)
    kept = Retention(pool, cap=0.3)  # 6 blocks
    seqs = [serve(pool, prompt(10 * i + 1, 10 * i + 2))[0] for i in range(5)]
    pins = [kept.leave(seq, "t", arrival=5 - i, seconds=9) for i, seq in enumerate(seqs[:3])]
    assert all(pins) and pool.stats()["pinned_blocks"] == 6
    before = pool.state_hash()
    assert kept.leave(seqs[3], "t", arrival=9, seconds=9) == 0  # later than all
    assert pool.state_hash() == before and pool.stats()["pins_refused"] == 1
    assert kept.leave(seqs[3], "t", arrival=1, seconds=9)
    assert not kept.back(pins[0]) and kept.back(pins[1]) and kept.back(pins[2])
    assert kept.leave(seqs[4], "t", arrival=2, seconds=0) == 0
    big, _ = serve(pool, prompt(*range(100, 107)))
    assert kept.leave(big, "t", arrival=0, seconds=9) == 0  # more than the cap by itself
    pool.check()


# Under pressure


def pinned(pool, kept, count):
    """Programs of two blocks each that left, in order of arrival."""
    pins = []
    for i in range(count):
        seq, _ = serve(pool, prompt(10 * i + 1, 10 * i + 2))
        pins.append(kept.leave(seq, "t", arrival=i, seconds=99))
        pool.free(seq)
    return pins


def test_a_step_ends_as_few_pins_as_make_it_fit():
    pool = BlockPool(16, block_size=4)
    kept = Retention(pool, cap=1.0)
    pins = pinned(pool, kept, 8)
    assert pool.available() == 0
    before = pool.state_hash()
    dry = pool.step(admissions=[Admission(prompt(*range(200, 205)))], dry=True)
    assert dry.fitted and dry.left == [1] and pool.state_hash() == before
    seq, _ = serve(pool, prompt(*range(200, 205)))  # five blocks: three pins
    assert pool.stats()["pins"] == 5 and pool.available() == 1
    for n in range(40):
        pool.native.fail_at(n)
        before = pool.state_hash()
        try:
            fitted = pool.step(grows=[(seq, 36)]).fitted  # four more: two pins
        except errors.OutOfMemoryError:
            assert pool.state_hash() == before
            continue
        break
    assert n > 5 and fitted and pool.stats()["pins"] == 3
    pool.native.fail_at(-1)
    before, refused = pool.state_hash(), pool.stats()["failed_steps"]
    assert not pool.step(grows=[(seq, 64)], admissions=[Admission(prompt(7))]).fitted
    assert pool.state_hash() == before and pool.stats()["failed_steps"] == refused + 1
    assert [kept.back(pin) for pin in pins] == [True] * 3 + [False] * 5
    assert pool.stats()["pins_pressed"] == 5
    pool.check()


def test_a_step_of_as_many_as_fit_ends_pins_for_each_that_does():
    pool = BlockPool(16, block_size=4)
    kept = Retention(pool, cap=1.0)
    pins = pinned(pool, kept, 6)
    wanted = [Admission(prompt(*range(300 + 10 * i, 305 + 10 * i))) for i in range(4)]
    outcome = pool.step(admissions=wanted, prefix=True)
    assert len(outcome.admitted) == 3 and not outcome.fitted  # 15 of 16 blocks: all but none
    assert [kept.back(pin) for pin in pins] == [False] * 6
    outcome = pool.step(admissions=wanted[3:], prefix=True)
    assert not outcome.admitted
    pool.check()


def test_a_batch_ends_pins_too():
    pool = BlockPool(8, block_size=4, run_blocks=1)
    kept = Retention(pool, cap=1.0)
    pins = pinned(pool, kept, 3)
    seqs = [pool.open(), pool.open()]
    batch = pool.batch(seqs)
    for step in range(12):
        batch.advance(np.full(2, 1000 + step, np.int32))
        pool.check()
    assert [kept.back(pin) for pin in pins] == [True, False, False]
    for step in range(4):
        batch.advance(np.full(2, 2000 + step, np.int32))
    before = pool.state_hash()
    with pytest.raises(errors.CapacityError):
        batch.advance(np.zeros(2, np.int32))
    assert pool.state_hash() == before


@pytest.mark.parametrize(("num_blocks", "size"), [(24, 4), (60, 16)])
def test_a_plain_model_agrees(num_blocks, size):
    """Who is evicted, whose pins end and when, over random programs."""
    rng, clock = random.Random(6), Clock()
    pool = BlockPool(num_blocks, block_size=size, run_blocks=1, max_seqs=64, seed=1)
    kept = Retention(pool, cap=1.0, clock=clock)
    model = Model(num_blocks, size)
    arrivals = 0

    def press(fits):
        """End as few pins as make it fit, or none."""
        for count in range(len(model.pins) + 1):
            trial = copy.deepcopy(model)
            for pin in model.latest()[:count]:
                trial.unpin(pin)
            if fits(trial):
                for pin in model.latest()[:count]:
                    model.unpin(pin)
                return True
        return False

    for op in range(int(2500 * SCALE)):
        kind = rng.random()
        if kind < 0.3 and len(model.live) < 20:
            parts = [rng.randint(0, 2) for _ in range(rng.randint(1, 6))]
            tokens = tuple(t for part in parts for t in [part] * size)[: rng.randint(1, 6 * size)]
            fits = press(lambda m, t=tokens: m.need_to_admit(t) <= m.available())
            outcome = pool.step(admissions=[Admission(np.array(tokens, np.int32))])
            assert outcome.fitted == fits, op
            if fits:
                [(seq, cached)] = outcome.admitted
                assert cached == model.admit(seq, tokens)
                pool.commit(seq, len(tokens), ids=np.array(tokens, np.int32))
                model.commit(seq)
        elif kind < 0.5 and model.live:
            seq = rng.choice(sorted(model.live))
            tokens = model.live[seq][0] + (rng.randint(0, 1),) * rng.randint(1, size)
            need = model.blocks(len(tokens)) - len(model.live[seq][2])
            fits = press(lambda m, n=need: n <= m.available())
            assert pool.step(grows=[(seq, len(tokens))]).fitted == fits, op
            if fits:
                model.grow(seq, tokens)
                pool.commit(seq, len(tokens), ids=np.array(tokens, np.int32))
                model.commit(seq)
        elif kind < 0.65 and model.live and len(model.pins) < 20:
            seq = rng.choice(sorted(model.live))
            arrivals += 1
            arrival = arrivals * 1000 + rng.randint(0, 9000)
            arrival = arrival * 10**6 + arrivals  # no two alike
            seconds = rng.choice([0.001, 0.1, 3.0])
            used = sum(len(chain) for _, _, chain in model.pins.values())
            if used + len(model.chain[seq]) > num_blocks:
                continue
            pin = kept.leave(seq, "t", arrival=arrival, seconds=seconds)
            model.pin(pin, seq, arrival, clock.now + int(seconds * 1e9))
        elif kind < 0.75:
            clock.now += int(10 ** rng.uniform(4, 9.3))
            over = [pin for pin, (_, deadline, _) in model.pins.items() if deadline <= clock.now]
            if len(over) > 1:  # which of several goes first is the wheel's affair: no content
                for pin in over[1:]:
                    assert kept.back(pin)
                    model.unpin(pin)
            assert kept.tick() == min(1, len(over))
            for pin in over[:1]:
                model.unpin(pin)
        elif kind < 0.8 and model.pins:
            pin = rng.choice(sorted(model.pins))
            assert kept.back(pin)
            model.unpin(pin)
        elif model.live:
            seq = rng.choice(sorted(model.live))
            pool.free(seq)
            model.free(seq)
        assert pool.available() == model.available(), op
        assert pool.stats()["pins"] == len(model.pins), op
        pool.check()
        if op % 16 == 0:
            for content in list(model.holders)[:5]:
                tokens = np.array((*content, 0), np.int32)
                assert pool.match(tokens).tokens == len(model.cached((*content, 0))) * size
    stats = pool.stats()
    assert stats["pins_pressed"] > 20 < stats["pins_expired"] and stats["evicted"]["capacity"] > 100
