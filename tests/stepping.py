"""An engine and a pool stepped by hand on the oracle checkpoints."""

import itertools
from pathlib import Path

import numpy as np

from pyruntime.engine.config import ModelConfig
from pyruntime.engine.loader import load_weights
from pyruntime.engine.runner import Engine
from pyruntime.engine.sampling import SamplingParams
from pyruntime.kv import ReferenceBlockPool
from pyruntime.sched import make_plan

DATA = Path(__file__).parent / "data" / "oracle"
CASES = sorted(path.name for path in DATA.iterdir())
BOUND = 2e-4
LOADED = {}


def load(case):
    if case not in LOADED:
        config = ModelConfig.load(DATA / case)
        LOADED[case] = (config, load_weights(DATA / case, config))
    return LOADED[case]


class Bench:
    """An engine, a pool, and the steps of a loop by hand."""

    def __init__(self, case="qwen3moe", num_blocks=64, block_size=4):
        config, weights = load(case)
        # Activations keep their memory: what a step leaves there must not reach another.
        self.engine = Engine(config, weights, num_blocks, block_size, step_rows=8)
        self.pool = ReferenceBlockPool(num_blocks, block_size, config.num_layers)
        self.layers = config.num_layers
        self.plans = 0

    def add(self, request, prompt, **sampling):
        self.engine.add(request, np.asarray(prompt, np.int32), SamplingParams(**sampling))
        self.pool.admit(request, self.engine.tokens(request))

    def plan(self, decode=(), prefill=(), preempt=()):
        self.plans += 1
        grow = [(r, len(self.engine.tokens(r))) for r in decode]
        grow += [(piece[0], piece[2]) for piece in prefill]
        plan = make_plan(self.plans, decode, prefill, grow, [(r, 0) for r in preempt])
        return plan, self.pool.step(grow, preempt)

    def step(self, decode=(), prefill=(), **options):
        return self.engine.run(*self.plan(decode, prefill), **options)

    def prefill(self, request, cuts=(), layer_cuts=(), **options):
        """Prefill all known tokens in pieces; return the last step's result."""
        size = len(self.engine.tokens(request))
        edges = sorted({0, size, *cuts})
        layers = sorted({0, self.layers, *layer_cuts})
        for low, high in itertools.pairwise(edges):
            for first, last in itertools.pairwise(layers):
                result = self.step(prefill=[(request, low, high, first, last)], **options)
        return result

    def greedy(self, request, count, **options):
        """Prefill and decode; return tokens and the logits each was chosen from."""
        results = [self.prefill(request, return_logits=True, **options)]
        results += [self.step([request], return_logits=True) for _ in range(count - 1)]
        tokens = [int(r.sampled.tokens[0]) for r in results]
        return tokens, np.concatenate([r.logits for r in results])


def reference(case):
    return np.load(DATA / case / "reference.npz")
