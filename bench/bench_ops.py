"""Operators beside numpy and torch, in one process.

numpy and torch use as many threads as pyruntime does. Each benchmark's `extra_info` has the peers'
best times from interleaved rounds and the ratio (above 1: we are faster).
"""

import os
import time

import numpy as np
import pytest

import pyruntime
from pyruntime import ops

torch = pytest.importorskip("torch")
THREADS = len(os.sched_getaffinity(0))
torch.set_num_threads(THREADS)
pyruntime.set_num_threads(THREADS)
RNG = np.random.default_rng(0)
ROUNDS = 40


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def compare(benchmark, ours, **peers):
    """Time ours and the peers in alternating rounds."""
    best = dict.fromkeys(peers, float("inf"))

    def before():
        for name, peer in peers.items():
            begin = time.perf_counter()
            peer()
            best[name] = min(best[name], time.perf_counter() - begin)

    for _ in range(3):
        ours()
        before()
    benchmark.pedantic(ours, setup=before, rounds=ROUNDS, iterations=1)
    for name, seconds in best.items():
        benchmark.extra_info[f"{name}_us"] = round(1e6 * seconds, 1)
        benchmark.extra_info[f"ratio_{name}"] = round(seconds / benchmark.stats.stats.min, 2)


@pytest.mark.parametrize("n, k, m", [(1, 2048, 2048), (8, 2048, 2048), (256, 2048, 2048)])
def test_linear(benchmark, n, k, m):
    x, w, out = floats(n, k), floats(m, k), np.empty((n, m), np.float32)
    tx, tw = torch.from_numpy(x), torch.from_numpy(w)
    compare(
        benchmark,
        lambda: ops.linear(x, w, None, out),
        numpy=lambda: np.matmul(x, w.T, out=out),
        torch=lambda: torch.nn.functional.linear(tx, tw),
    )


def test_rms_norm(benchmark):
    x, w, out = floats(256, 2048), floats(2048), np.empty((256, 2048), np.float32)
    tx, tw = torch.from_numpy(x), torch.from_numpy(w)
    compare(
        benchmark,
        lambda: ops.rms_norm(x, w, 1e-6, out),
        numpy=lambda: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w,
        torch=lambda: torch.nn.functional.rms_norm(tx, (2048,), tw, 1e-6),
    )


def test_silu_mul(benchmark):
    x, y, out = floats(256, 2048), floats(256, 2048), np.empty((256, 2048), np.float32)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    compare(
        benchmark,
        lambda: ops.silu_mul(x, y, out),
        numpy=lambda: x / (1 + np.exp(-x)) * y,
        torch=lambda: torch.nn.functional.silu(tx) * ty,
    )


@pytest.mark.parametrize("batch, context", [(1, 2048), (16, 1024)])
def test_decode_attention(benchmark, batch, context):
    heads, kv_heads, d, block = 16, 4, 128, 16
    per = context // block
    k, v = floats(batch * per, block, kv_heads, d), floats(batch * per, block, kv_heads, d)
    q, out = floats(batch, heads, d), np.empty((batch, heads, d), np.float32)
    tables = RNG.permutation(batch * per).astype(np.int32).reshape(batch, per)
    rows, visible = np.arange(batch, dtype=np.int32), np.full(batch, context, np.int32)
    tq = torch.from_numpy(q)[:, :, None]
    # The peer gets contiguous sequences: it has no block tables.
    tk, tv = (
        torch.from_numpy(a[tables].reshape(batch, context, kv_heads, d)).transpose(1, 2)
        for a in (k, v)
    )
    compare(
        benchmark,
        lambda: ops.paged_attention(q, k, v, tables, rows, visible, d**-0.5, out=out),
        torch=lambda: torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, enable_gqa=True),
    )


@pytest.mark.parametrize("n", [1, 8, 256])
def test_moe_ffn(benchmark, n):
    experts, top_k, d, f = 16, 4, 1024, 512
    gate, up, down = floats(experts, f, d), floats(experts, f, d), floats(experts, d, f)
    x, out = floats(n, d), np.empty((n, d), np.float32)
    ids, weights = ops.router(floats(n, experts), top_k)
    tg, tu, td, tx = (torch.from_numpy(a) for a in (gate, up, down, x))
    tw = torch.from_numpy(weights)

    def peer():
        result = torch.zeros(n, d)
        for expert in range(experts):
            token, slot = np.nonzero(ids == expert)
            if len(token):
                token, slot = torch.from_numpy(token), torch.from_numpy(slot)
                part = tx[token]
                hidden = torch.nn.functional.silu(part @ tg[expert].T) * (part @ tu[expert].T)
                result.index_add_(0, token, (hidden @ td[expert].T) * tw[token, slot, None])
        return result

    compare(benchmark, lambda: ops.moe_ffn(x, ids, weights, gate, up, down, out), torch=peer)


@pytest.mark.parametrize("mode", ["greedy", "top_p"])
def test_sample(benchmark, mode):
    n, vocab = 16, 50_000
    given = floats(n, vocab)
    tl = torch.from_numpy(given)
    params = np.zeros(n, ops.SAMPLING)
    params["num_logprobs"] = -1
    if mode == "top_p":
        params["temperature"], params["top_p"] = 1.0, 0.9

    def peer():
        if mode == "greedy":
            return tl.argmax(-1)
        ordered, index = tl.softmax(-1).sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > 0.9] = 0
        return index.gather(-1, torch.multinomial(ordered, 1))

    compare(benchmark, lambda: ops.sample(given, params), torch=peer)
