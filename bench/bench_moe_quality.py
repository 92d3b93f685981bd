"""What the model that ships loses at each width, and at average widths chosen token by token.

Perplexity, and the divergence of its next-token distribution from that of the float model, on text
it was not trained on, in windows of 256 tokens: this project's own page and headers as they were on
2026-12-01 (``held_out.txt``, which stays as it is, so that figures of different days compare).
"""

from pathlib import Path

import numpy as np

from bench.support import size
from pyruntime import ops
from pyruntime.engine import runner
from pyruntime.engine.quantize import quantize
from pyruntime.engine.runner import Engine
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import Tokenizer
from pyruntime.kv import ReferenceBlockPool
from pyruntime.models import shipped
from pyruntime.moe import ExpertCache, parse_policy
from pyruntime.sched import make_plan

WINDOW = 256
WIDTHS = (2, 4, 6, 8)
POLICIES = ("average:4.0", "average:4.2", "average:5.0", "rank:8,4")


def held_out(count):
    """Return `count` windows of tokens."""
    text = (Path(__file__).parent / "held_out.txt").read_text()
    tokens = np.array(Tokenizer(shipped()).encode(text), np.int32)
    return tokens[: min(count, len(tokens) // WINDOW) * WINDOW].reshape(-1, WINDOW)


def log_probabilities(engine, windows):
    """Yield float64 [WINDOW, vocab] for each window."""
    layers = engine.config.num_layers
    pool = ReferenceBlockPool(64, 16, layers)
    kept = []
    sample = runner.sample_rows

    def spy(weights, eps, sequences, pieces, x, *rest):
        kept.append(x.copy())  # of all rows, where the engine goes on with the last
        return sample(weights, eps, sequences, pieces, x, *rest)

    runner.sample_rows = spy
    try:
        for i, window in enumerate(windows):
            engine.add(i, window, SamplingParams())
            pool.admit(i, engine.tokens(i))
            grow = [(i, WINDOW)]
            plan = make_plan(i + 1, (), [(i, 0, WINDOW, 0, layers)], grow, [])
            engine.run(plan, pool.step(grow, []))
            engine.remove(i)
            pool.free(i)
            rows = ops.rms_norm(kept.pop(), engine.weights.norm, engine.config.eps)
            logits = ops.linear(rows, engine.weights.head).astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    finally:
        runner.sample_rows = sample


class Counted:
    """A bit policy, and the levels it chose."""

    def __init__(self, policy):
        self.policy, self.chosen = policy, np.zeros(len(WIDTHS), np.int64)

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def levels(self, layer, ids, weights):
        levels = self.policy.levels(layer, ids, weights)
        self.chosen += np.bincount(levels.reshape(-1), minlength=len(WIDTHS))
        return levels


def test_quality(benchmark, tmp_path):
    windows = held_out(size(benchmark, 64, 2))
    report = quantize(shipped(), tmp_path / "q")
    read = np.array([report.bits_per_weight(level) for level in range(len(WIDTHS))])
    exact = list(log_probabilities(Engine.load(shipped(), 64, 16), windows))
    loss = -np.mean([e[np.arange(WINDOW - 1), w[1:]] for e, w in zip(exact, windows, strict=True)])
    found = {"float": {"perplexity": round(float(np.exp(loss)), 3)}}

    def measure(name, engine, bits):
        divergence, losses = [], []
        for e, got, window in zip(exact, log_probabilities(engine, windows), windows, strict=True):
            divergence.append((np.exp(e) * (e - got)).sum(axis=-1).mean())
            losses.append(-got[np.arange(WINDOW - 1), window[1:]].mean())
        found[name] = {
            "bits_read_per_weight": round(float(bits()), 3),
            "kl": float(f"{np.mean(divergence):.3e}"),
            "perplexity": round(float(np.exp(np.mean(losses))), 3),
        }

    def once():
        for level, bits in enumerate(WIDTHS):
            engine = Engine.load(tmp_path / "q", 64, 16, bits=bits)
            measure(f"{bits} bits", engine, lambda level=level: read[level])
        for name in POLICIES:
            policy = Counted(parse_policy(name))
            engine = Engine.load(
                tmp_path / "q",
                64,
                16,
                experts_of=lambda store, _, policy=policy: ExpertCache(
                    store, store.file_bytes, policy=policy
                ),
            )
            measure(name, engine, lambda policy=policy: np.average(read, weights=policy.chosen))

    benchmark.pedantic(once, rounds=1, iterations=1)
    benchmark.extra_info |= {"tokens": windows.size, "by width": found}
    benchmark.extra_info["kl of average:4.2 over 4 bits"] = round(
        found["average:4.2"]["kl"] / found["4 bits"]["kl"], 3
    )
