"""The native pool beside the reference prefix pool: the same program, the same answers.

`PYRUNTIME_TEST_SCALE` multiplies the operations: 20 plays a million here and in ``test_kv.py``.
"""

import os
import random

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.kv import ReferencePrefixPool, ServingPool

SCALE = float(os.environ.get("PYRUNTIME_TEST_SCALE", 1))


class Pair:
    """Both pools, and what their requests hold."""

    def __init__(self, num_blocks, size, seed):
        self.rng = random.Random(seed)
        self.size = size
        self.native = ServingPool(num_blocks, size, run_blocks=1, max_requests=64, seed=seed + 1)
        self.reference = ReferencePrefixPool(num_blocks, size)
        self.live = {}  # request -> tokens
        self.names = 0
        self.refused = 0

    def both(self, call):
        """Let both do the same, and return what they agree on: a value or an error."""
        answers = []
        for pool in (self.native, self.reference):
            before = self.native.pool.state_hash()
            try:
                answers.append((call(pool), None))
            except errors.Error as error:
                assert pool is self.reference or self.native.pool.state_hash() == before
                answers.append((None, type(error)))
        assert answers[0] == answers[1]
        return answers[0]

    def prompt(self):
        """Shared blocks, then tokens of its own: content is never written twice."""
        parts = [self.rng.randint(0, 2) for _ in range(self.rng.randint(0, 8))]
        own = [1000 + self.names] * self.rng.randint(1, 2 * self.size)
        return np.array([t for part in parts for t in [part] * self.size] + own, np.int32)

    def grown(self, request):
        more = [2000 + self.names] * self.rng.randint(1, self.size)
        return np.append(self.live[request], np.array(more, np.int32))

    def step(self, grow, free=()):
        """One step: growths, frees, and the commits of what was computed."""
        wanted = [(request, len(tokens)) for request, tokens in grow.items()]
        left, _ = self.both(lambda pool: pool.dry_run(wanted, free))
        _, error = self.both(lambda pool: len(pool.step(wanted, free).row_of))
        assert (error is None) == (left >= 0)
        if error:
            self.refused += 1
            return False
        assert self.native.num_free == left
        for request in free:
            del self.live[request]
        for request, tokens in grow.items():
            self.live[request] = tokens
            self.both(lambda pool, r=request, t=tokens: pool.commit(r, len(t), 1, t))
        return True

    def admit(self):
        self.names += 1
        tokens, space = self.prompt(), self.rng.choice([b"", b"", b"tenant"])
        reserve = self.rng.choice([0, 2 * len(tokens)])
        self.both(lambda pool: pool.admit(self.names, tokens, space, reserve))
        if not self.step({self.names: tokens}):
            self.both(lambda pool: pool.free(self.names))

    def grow(self):
        chosen = self.rng.sample(sorted(self.live), min(3, len(self.live)))
        leave = [chosen.pop()] if len(chosen) > 2 and self.rng.random() < 0.3 else []
        self.step({request: self.grown(request) for request in chosen}, leave)

    def free(self):
        request = self.rng.choice([*self.live, 10**6])
        self.both(lambda pool: pool.free(request))
        self.live.pop(request, None)

    def compare(self):
        self.native.check()
        assert self.native.num_free == self.reference.num_free
        assert self.native.promised == self.reference.promised
        assert self.native.hit_tokens == self.reference.hit_tokens
        for request in self.live:
            assert self.native.held(request) == self.reference.held(request)


@pytest.mark.parametrize(("num_blocks", "size"), [(16, 4), (48, 16), (64, 1)])
def test_native_and_reference_agree(num_blocks, size):
    """Hits, room and refusals, so also every eviction; invariants hold after each operation."""
    pair = Pair(num_blocks, size, 11)
    for _ in range(int(5000 * SCALE)):
        kind = pair.rng.random()
        if kind < 0.4 and len(pair.live) < 40:
            pair.admit()
        elif kind < 0.75 and pair.live:
            pair.grow()
        else:
            pair.free()
        pair.compare()
    stats = pair.native.stats()
    assert stats["evicted"]["capacity"] > 100 < stats["hit_tokens"]
    assert pair.refused > 50 and stats["duplicates"] == 0


def test_content_of_both_has_the_same_names():
    """Events of either add up to the same set of keys."""
    pair = Pair(32, 4, 3)
    for _ in range(int(600 * min(SCALE, 10))):
        pair.rng.choice([pair.admit, pair.grow, pair.free])() if pair.live else pair.admit()
        assert sorted(pair.native.snapshot()[1]) == sorted(pair.reference.snapshot()[1])
