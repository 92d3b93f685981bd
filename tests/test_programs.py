"""Programs that call tools between their turns: what the loop keeps for them, and for how long."""

import logging

import pytest

from pyruntime import errors
from pyruntime.engine import programs
from pyruntime.engine.llm import make_loop
from pyruntime.engine.loop import EngineLoop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.models import shipped

BLOCK = 16 * 4096
PROMPT = tuple(range(100, 164))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Bench:
    """A loop on the model that ships, with a clock that stands still unless it is moved."""

    def __init__(self, retention, blocks=24, **options):
        self.clock = Clock()
        made = make_loop(shipped(), kv_bytes=blocks * BLOCK, retention=None, **options)
        self.loop = EngineLoop(
            made.engine, made.pool, made.scheduler.policy, retention=retention, clock=self.clock
        )
        self.count = 0

    def submit(self, tokens, new=4, **fields):
        self.count += 1
        name = f"r{self.count}"
        delta = self.loop.submit(
            Submit(name, tokens, SamplingParams(), new, ignore_eos=True, **fields)
        )
        assert delta.finish_reason is None, delta
        return name

    def run(self):
        """Serve until nothing is left; return tokens, and tokens found in memory, by request."""
        out, cached = {}, {}
        for _ in range(3000):
            if not self.loop.busy:
                break
            for delta in self.loop.step():
                out.setdefault(delta.id, []).extend(delta.tokens)
                cached[delta.id] = cached.get(delta.id, 0) + delta.cached_tokens
        assert not self.loop.busy
        self.loop.pool.check()
        return out, cached

    def turn(self, tokens, program="p", last=False, tool="grep", **fields):
        name = self.submit(tokens, program=program, last_turn=last, tool=tool, **fields)
        out, cached = self.run()
        return list(tokens) + out[name], cached[name]

    def flood(self):
        """Serve enough else to push out whatever may go."""
        for i in range(10):
            self.submit([1000 + 64 * i + j for j in range(60)])
            self.run()

    def stats(self, name):
        return self.loop.pool.stats()[name]


def learned(retention, **options):
    """A program whose tool is known to take a second, and its text so far."""
    bench = Bench(retention, **options)
    text, _ = bench.turn(PROMPT)
    bench.clock.now += 1
    text, cached = bench.turn([*text, 7, 8, 9])
    assert cached >= 64  # nothing else was served in between
    return bench, text


@pytest.mark.parametrize(("rule", "kept"), [("fixed", True), (None, False)])
def test_a_turn_finds_what_the_one_before_computed(rule, kept):
    bench, text = learned(rule)
    assert bench.stats("pins") == kept
    bench.flood()
    bench.clock.now += 1
    _, cached = bench.turn([*text, 3, 4], last=True)
    assert (cached >= 64) == kept
    assert bench.stats("pins") == 0


def test_a_pin_ends_with_its_time():
    bench, text = learned("fixed")
    bench.clock.now += 2.5
    bench.flood()
    assert bench.stats("pins") == 0
    assert bench.turn([*text, 3, 4], last=True)[1] == 0


def test_the_formula_weighs_what_was_measured():
    """Ten seconds to compute a prompt anew, and a tool that takes one: it pays to keep it."""
    bench = Bench("formula")
    real = bench.loop.engine.run

    def slow(plan, *rest):
        bench.clock.now += 10 if len(plan.prefill) else 0
        return real(plan, *rest)

    bench.loop.engine.run = slow
    text, _ = bench.turn(PROMPT)
    assert bench.stats("pins") == 1
    bench.flood()
    assert bench.stats("pins") == 0  # of 64 tokens at 0.16 s: worth some seconds, not a minute
    bench, text = Bench("formula"), PROMPT
    bench.turn(text)
    assert bench.stats("pins") == 0  # computed in no time


def test_only_a_turn_that_finished_is_kept():
    bench, text = learned("fixed")
    name = bench.submit([*text, 3], 50, program="p", last_turn=False, tool="grep")
    for _ in range(3):
        bench.loop.step()
    assert bench.stats("pins") == 0  # the turn holds its blocks itself
    bench.loop.abort(name)
    assert bench.stats("pins") == 0
    bench.turn([*text, 3], program="", tool="grep")
    assert bench.stats("pins") == 0


def test_programs_of_tenants_are_apart():
    bench, text = learned("fixed")
    bench.turn([*text, 3], tenant="other", last=True)
    assert bench.stats("pins") == 1  # that of the first


def test_pins_hold_nobody_up():
    """Pins hold most of memory, and a prompt that needs all of it is admitted at once."""
    bench, _ = learned("fixed")
    for i in range(3):
        bench.turn([500 + 50 * i + j for j in range(70)], program=f"p{i}")
    held = bench.stats("pinned_blocks")
    assert held >= 8
    name = bench.submit([2000 - j for j in range(16 * 23)])
    deltas = [delta.id for _ in range(2) for delta in bench.loop.step()]
    assert deltas == [name] * 2
    assert bench.stats("pins") < 4
    assert bench.stats("pins_pressed") > 0
    bench.run()


@pytest.mark.parametrize("policy", ["fcfs", "swap", "layered"])
def test_text_does_not_depend_on_pins(policy):
    def play(retention):
        options = {"swap_bytes": 16 * BLOCK} if policy == "swap" else {}
        bench = Bench(retention, blocks=14, policy=policy, **options)
        texts = {p: [100 + 40 * p + j for j in range(40 + p)] for p in range(5)}
        found = 0
        for turn in range(3):
            names = {
                bench.submit(texts[p], 6, program=f"p{p}", last_turn=turn == 2, tool="t"): p
                for p in texts
            }
            out, cached = bench.run()
            found += sum(cached.values())
            for name, p in names.items():
                texts[p] = [*texts[p], *out[name], 50 + turn]
            bench.clock.now += 0.5
        assert bench.stats("pins") == 0
        return texts, bench

    wanted, _ = play(None)
    got, bench = play("fixed")
    assert got == wanted
    assert bench.stats("pins_made") > 0


def test_programs_that_stay_away_are_forgotten(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    bench, _ = learned("fixed")
    for name in ("q", "r"):
        bench.turn([9, 8, 7], program=name)
    assert list(bench.loop._programs._programs) == [("", "q"), ("", "r")]
    assert bench.stats("pinned_blocks") == 0  # theirs are of less than a block


def test_an_unknown_rule_is_refused():
    with pytest.raises(errors.InvalidArgumentError, match="rule"):
        Bench("for ever")


def test_a_pool_that_fails_its_check_serves_on(monkeypatch, caplog):
    bench, failures = Bench(None), []
    real, checked = bench.loop.engine.run, bench.loop.pool.check

    def run(plan, *rest):
        if not failures:
            failures.append(plan.id)
            raise OSError("injected")
        return real(plan, *rest)

    def check():
        raise errors.CorruptDataError("the block pool is inconsistent: injected")

    monkeypatch.setattr(bench.loop.engine, "run", run)
    monkeypatch.setattr(bench.loop.pool, "check", check)
    name = bench.submit(PROMPT)
    with caplog.at_level(logging.CRITICAL):
        assert bench.loop.step() == []
    assert failures
    monkeypatch.setattr(bench.loop.pool, "check", checked)
    out, _ = bench.run()
    assert len(out[name]) == 4
    assert [r.levelname for r in caplog.records if "inconsistent" in r.getMessage()] == ["CRITICAL"]
