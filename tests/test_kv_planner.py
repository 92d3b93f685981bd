"""Planned prefixes: the best choice there is, checked against all choices."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime import errors
from pyruntime.kv import plan_prefixes

BLOCK = 4


def saving(prompts, groups):
    """What groups save, after a check that their requests do share the prefix."""
    total = 0
    for group in groups:
        first = prompts[group.requests[0]]
        for request in group.requests:
            assert prompts[request][: group.prefix] == first[: group.prefix]
            assert group.prefix < len(prompts[request])
        assert group.prefix % BLOCK == 0
        total += (len(group.requests) - 1) * group.prefix
    return total


def best(prompts):
    """Try every choice of one prefix (or none) for each prompt."""
    choices = [[tuple(p[:n]) for n in range(0, len(p), BLOCK)] for p in prompts]
    most = 0
    for choice in itertools.product(*choices):
        users = defaultdict(int)
        for prefix in choice:
            users[prefix] += 1
        most = max(most, sum((n - 1) * len(prefix) for prefix, n in users.items()))
    return most


def possible(prompts):
    """Tokens saved if every block of every prefix is computed once."""
    blocks = [tuple(p[:n]) for p in prompts for n in range(BLOCK, len(p), BLOCK)]
    return BLOCK * (len(blocks) - len(set(blocks)))


SMALL = st.lists(
    st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=17), min_size=1, max_size=6
)


@settings(max_examples=300, deadline=None)
@given(SMALL, st.randoms())
def test_no_other_choice_saves_more(prompts, random):
    prompts = [[token for token in prompt for _ in range(BLOCK // 2)][:18] for prompt in prompts]
    random.shuffle(prompts)
    plan = plan_prefixes(prompts, BLOCK)
    assert sorted(plan.order()) == list(range(len(prompts)))
    assert plan.saved == saving(prompts, plan.groups) == best(prompts)
    assert plan.possible == possible(prompts)


def conversation_tree(rng, prompts):
    """Prompts as users write them: a system prompt, a tool's text, a question."""
    systems = [rng.integers(0, 99, rng.integers(20, 200)).tolist() for _ in range(5)]
    tools = [rng.integers(0, 99, rng.integers(20, 400)).tolist() for _ in range(20)]
    return [
        systems[rng.integers(5)]
        + (tools[rng.integers(20)] if rng.random() < 0.8 else [])
        + rng.integers(0, 99, rng.integers(1, 100)).tolist()
        for _ in range(prompts)
    ]


def test_one_level_saves_nearly_what_all_levels_do():
    for seed in range(5):
        prompts = conversation_tree(np.random.default_rng(seed), 2000)
        plan = plan_prefixes(prompts, 16)
        assert plan.possible >= plan.saved >= 0.95 * plan.possible


def test_deep_chains_cost_no_recursion():
    talk = list(range(5000))
    prompts = [talk[: n + 1] for n in range(0, 5000, 4)]
    plan = plan_prefixes(prompts, BLOCK)
    assert plan.saved == saving(prompts, plan.groups) > 0.45 * plan.possible
    assert plan.possible == sum(n // BLOCK * BLOCK for n in range(0, 4996, 4))


def test_groups_that_decode_most_go_first():
    short, long = [1] * 9, [2] * 90
    plan = plan_prefixes([long, short, long, short], BLOCK)
    assert [g.requests for g in plan.groups] == [[1, 3], [0, 2]]
    plan = plan_prefixes([long, short, long, short], BLOCK, decode=[1000, 1, 1000, 1])
    assert [g.requests for g in plan.groups] == [[0, 2], [1, 3]]


def test_what_is_refused():
    assert plan_prefixes([]).groups == []
    for bad in ([[]], [[1], []], [[[1]]]):
        with pytest.raises(errors.InvalidArgumentError, match="prompt"):
            plan_prefixes(bad)
    with pytest.raises(errors.InvalidArgumentError, match="block_size"):
        plan_prefixes([[1]], 0)
    with pytest.raises(errors.InvalidArgumentError, match="decode"):
        plan_prefixes([[1]], decode=[1, 2])
