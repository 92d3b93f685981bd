"""Prefix caches of an engine, reference and native: sharing, eviction, and events that add up."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.kv import EventLog, KvGroup, ReferencePrefixPool, ServingPool, block_keys
from pyruntime.models import shipped


def prompt(*parts, size=4):
    return np.repeat(np.array(parts, np.int32), size)


def run(pool, request, tokens, namespace=b""):
    """Serve a prompt whole; return its cached tokens."""
    cached = pool.admit(request, tokens, namespace)
    pool.step([(request, len(tokens))])
    pool.commit(request, len(tokens), pool.num_layers, tokens)
    pool.check()
    return cached


def test_keys_name_a_block_and_all_before_it():
    a, b = block_keys(prompt(1, 2, 3), 4), block_keys(prompt(1, 2, 4), 4)
    assert a[:2] == b[:2] and a[2] != b[2]
    assert block_keys(prompt(9, 2), 4)[1] != a[1]
    assert block_keys(prompt(1), 4, b"x") != a[:1]
    assert block_keys(prompt(1), 4, b"", b"secret") != a[:1]
    assert len(block_keys(prompt(1, 2)[:7], 4)) == 1


POOLS = pytest.mark.parametrize("make", [ReferencePrefixPool, ServingPool])


@POOLS
def test_prefixes_are_shared_within_a_namespace_only(make):
    pool = make(16, 4, 2)
    assert run(pool, 1, prompt(1, 2, 3)) == 0
    assert run(pool, 2, prompt(1, 2, 9)) == 8
    assert run(pool, 3, prompt(1, 2, 3)) == 8  # the last token is never cached
    assert run(pool, 4, prompt(1, 2), b"other") == 0
    tables = pool.step([(1, 12), (2, 12)]).tables
    assert (tables[0, :2] == tables[1, :2]).all() and tables[0, 2] != tables[1, 2]
    for request in (1, 2, 3, 4):
        pool.free(request)
    pool.check()
    assert pool.num_free == 16
    assert run(pool, 5, prompt(1, 2, 3, 4)) == 12  # freed blocks stay


@POOLS
def test_the_least_recently_used_end_goes_first(make):
    pool = make(4, 4)
    run(pool, 1, prompt(1, 2))
    pool.free(1)
    run(pool, 2, prompt(3))
    pool.free(2)
    run(pool, 3, prompt(5, 6))  # one free block, so one eviction: the end of 1-2
    pool.free(3)
    assert run(pool, 4, prompt(1, 2)) == 4
    pool.check()


def test_what_windows_release_the_reference_never_shares():
    groups = [KvGroup((0,), 8, 4)]
    pool = ReferencePrefixPool(16, 4, 1, groups)
    assert run(pool, 1, prompt(1, 2, 3, 4)) == 0 == run(pool, 2, prompt(1, 2, 3, 4))


class Machine(RuleBasedStateMachine):
    """Random programs; a mirror follows the events and must equal the index."""

    def __init__(self):
        super().__init__()
        self.pool = self.make()
        self.live = {}
        self.next = 0
        self.mirror, self.seq = set(), 0

    @rule(parts=st.lists(st.integers(0, 2), min_size=1, max_size=5), more=st.integers(0, 3))
    def admit(self, parts, more):
        tokens = prompt(*parts)[: 4 * len(parts) - more]
        if self.pool.need(self.next, len(tokens)) > self.pool.num_free:
            return
        cached = self.pool.admit(self.next, tokens)
        assert cached < len(tokens)
        self.pool.step([(self.next, len(tokens))])
        self.pool.commit(self.next, len(tokens), 1, tokens)
        self.live[self.next] = tokens
        self.next += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def grow(self, data):
        request = data.draw(st.sampled_from(sorted(self.live)))
        tokens = np.append(self.live[request], np.int32(data.draw(st.integers(0, 1))))
        if self.pool.dry_run([(request, len(tokens))]) < 0:
            return
        self.pool.step([(request, len(tokens))])
        self.pool.commit(request, len(tokens), 1, tokens)
        self.live[request] = tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        request = data.draw(st.sampled_from(sorted(self.live)))
        left = self.pool.dry_run([], [request])
        self.pool.free(request)
        assert self.pool.num_free == left
        del self.live[request]

    @invariant()
    def consistent(self):
        self.pool.check()
        self.seq, events = self.pool.events(self.seq)
        for event in events:
            if event["type"] == "stored":
                assert not self.mirror & set(event["keys"])
                self.mirror |= set(event["keys"])
            else:
                assert self.mirror >= set(event["keys"])
                self.mirror -= set(event["keys"])
        assert self.pool.snapshot() == (self.seq, self.pool.snapshot()[1])
        assert set(self.pool.snapshot()[1]) == self.mirror


class ReferenceMachine(Machine):
    def make(self):
        return ReferencePrefixPool(12, 4)


class NativeMachine(Machine):
    def make(self):
        return ServingPool(12, 4)


TestReference, TestNative = ReferenceMachine.TestCase, NativeMachine.TestCase
SETTINGS = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
TestReference.settings = TestNative.settings = SETTINGS


def test_an_event_log_says_what_it_has_lost():
    log = EventLog(capacity=4)
    for i in range(20):
        log.add("stored", [f"{i}"])
    following, events = log.since(19)
    assert following == 20 and [e["keys"] for e in events] == [["19"]]
    following, events = log.since(0)
    assert following == 20 and events == [{"seq": 19, "type": "dropped", "count": 20}]
    assert log.since(99)[1][0]["type"] == "dropped"  # of another life of the pool
    assert log.snapshot()[0] == 20 and len(log.snapshot()[1]) == 20
    log.add("removed", ["3"])
    assert "3" not in log.snapshot()[1]
    log.add("cleared")
    assert log.snapshot() == (22, [])
    copy = EventLog()
    copy.extend([{"seq": 5, "type": "cleared"}])
    assert copy.since(0)[1][0]["type"] == "dropped" and copy.since(5)[0] == 6
    copy.extend([{"seq": 9, "type": "cleared"}])
    assert copy.since(6)[1] == [{"seq": 9, "type": "dropped", "count": 4}]


def test_a_served_prompt_is_not_computed_twice():
    loop = make_loop(shipped())
    tokens = list(range(30, 90))
    ends = {}
    for name in ("a", "b"):
        loop.submit(Submit(name, tokens, max_tokens=20, ignore_eos=True))
        ends[name] = []
        while loop.busy:
            for delta in loop.step():
                ends[name] += [(delta.tokens, delta.cached_tokens)]
    assert [t for t, _ in ends["a"]] == [t for t, _ in ends["b"]]
    assert sum(c for _, c in ends["a"]) == 0 and sum(c for _, c in ends["b"]) == 48
    # The answer is cached too: a next turn computes what is new.
    answer = [t for part, _ in ends["a"] for t in part]
    loop.submit(Submit("c", [*tokens, *answer, 5], max_tokens=1))
    assert max(d.cached_tokens for d in loop.step()) == 64
    loop.pool.check()
