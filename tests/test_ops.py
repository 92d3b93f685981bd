"""Operators against float64 numpy, and their bits against themselves in other batches."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyruntime
from pyruntime import errors, ops
from pyruntime._ext import _native

RNG = np.random.default_rng


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 9), k=st.integers(1, 70), m=st.integers(1, 19), seed=st.integers(0, 99))
def test_linear_matches_float64(n, k, m, seed):
    rng = RNG(seed)
    x, w, b = floats(rng, n, k), floats(rng, m, k), floats(rng, m)
    want = x.astype(np.float64) @ w.astype(np.float64).T + b
    np.testing.assert_allclose(ops.linear(x, w, b), want, rtol=1e-5, atol=1e-4)


def test_linear_reads_rows_that_are_apart():
    rng = RNG(1)
    x, w = floats(rng, 5, 40), floats(rng, 7, 64)
    np.testing.assert_array_equal(
        ops.linear(x[:, :32], w[:, :32]), ops.linear(x[:, :32].copy(), w[:, :32].copy())
    )


@pytest.mark.parametrize("m, k", [(300, 256), (2048, 256), (64, 1000)])
def test_linear_is_batch_invariant(m, k):
    rng = RNG(2)
    x, w = floats(rng, 131, k), floats(rng, m, k)
    whole = ops.linear(x, w)
    for first, last in [(0, 1), (3, 6), (60, 70), (5, 131)]:
        np.testing.assert_array_equal(ops.linear(x[first:last].copy(), w), whole[first:last])


def test_results_do_not_depend_on_threads():
    rng = RNG(3)
    x, w = floats(rng, 70, 512), floats(rng, 600, 512)
    try:
        pyruntime.set_num_threads(1)
        alone = ops.linear(x, w)
        pyruntime.set_num_threads(4)
        np.testing.assert_array_equal(ops.linear(x, w), alone)
    finally:
        pyruntime.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("d", [1, 7, 16, 64, 100])
def test_rms_norm(d):
    rng = RNG(d)
    x, w = floats(rng, 6, d), floats(rng, d)
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(ops.rms_norm(x, w, 1e-5), want, rtol=2e-6, atol=1e-6)
    assert ops.rms_norm(x, w, 1e-5, out=x) is x


def test_silu_mul_over_the_whole_range():
    gate = np.linspace(-120, 120, 4001, dtype=np.float32)[None]
    up = np.full_like(gate, 3.0)
    want = 3.0 * gate / (1.0 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(ops.silu_mul(gate, up), want, rtol=1e-6, atol=1e-30)
    nan = np.array([[np.nan, 1.0]], np.float32)
    assert np.isnan(ops.silu_mul(nan, np.ones_like(nan)))[0, 0]


def test_embedding_add_clamp():
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(ops.embedding(np.array([3, 0], np.int32), table), table[[3, 0]])
    with pytest.raises(errors.InvalidArgumentError, match="ids"):
        ops.embedding(np.array([4], np.int32), table)
    x = np.array([[1.0, -9.0, 3.0]], np.float32)
    ops.clamp(ops.add(x, x), 4.0)
    np.testing.assert_array_equal(x, [[2.0, -4.0, 4.0]])


def test_rope_rotates_pairs_by_position():
    rng = RNG(4)
    x = floats(rng, 3, 2, 10)
    angles = rng.uniform(0, 6, (5, 4))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([4, 0, 2], np.int32)
    want = x.astype(np.float64)
    c, s = cos[positions][:, None], sin[positions][:, None]
    low, high = want[..., :4].copy(), want[..., 4:8].copy()
    want[..., :4], want[..., 4:8] = low * c - high * s, high * c + low * s
    np.testing.assert_allclose(ops.rope(x, positions, cos, sin), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(errors.InvalidArgumentError, match="positions"):
        ops.rope(x, np.array([5, 0, 0], np.int32), cos, sin)


def attention_reference(q, k, v, visible, scale, window, group):
    out = np.zeros(q.shape)
    for i in range(q.shape[0]):
        first = max(0, visible[i] - window) if window else 0
        if visible[i] == first:
            continue
        for h in range(q.shape[1]):
            keys = k[i][first : visible[i], h // group].astype(np.float64)
            scores = keys @ q[i, h].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[i][first : visible[i], h // group]
    return out


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.sampled_from([4, 16, 33, 64, 128]),
    block=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([0, 1, 5, 300]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_attention_matches_float64(seed, kv_heads, group, d, block, window, dtype):
    rng = RNG(seed)
    n = int(rng.integers(1, 5))
    visible = rng.integers(0, 40 if block < 16 else 700, n).astype(np.int32)
    per = -(-int(visible.max()) // block) + 1
    blocks = per * n
    order = rng.permutation(blocks).astype(np.int32)
    tables = order.reshape(n, per)
    # another layer between: strides
    layers = floats(rng, 2, blocks, 2, block, kv_heads, d).astype(dtype)
    k_cache, v_cache = layers[0, :, 1], layers[1, :, 1]
    q = floats(rng, n, kv_heads * group, d)
    rows = rng.permutation(n).astype(np.int32)
    keys = [k_cache[tables[r]].reshape(-1, kv_heads, d) for r in rows]
    values = [v_cache[tables[r]].reshape(-1, kv_heads, d) for r in rows]
    want = attention_reference(q, keys, values, visible, 0.3, window, group)
    got = ops.paged_attention(q, k_cache, v_cache, tables, rows, visible, 0.3, window)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    for i in range(n):  # alone in the batch: the same bits
        one = slice(i, i + 1)
        alone = ops.paged_attention(
            q[one], k_cache, v_cache, tables, rows[one], visible[one], 0.3, window
        )
        np.testing.assert_array_equal(alone[0], got[i])


def test_attention_skips_holes_and_marks_heavy_slots():
    rng = RNG(5)
    k, v, q = floats(rng, 4, 4, 1, 16), floats(rng, 4, 4, 1, 16), floats(rng, 1, 2, 16)
    tables = np.array([[2, -1, 0]], np.int32)
    rows, visible = np.zeros(1, np.int32), np.array([11], np.int32)
    above = np.empty((1, 12), np.uint8)
    got = ops.paged_attention(q, k, v, tables, rows, visible, 1.0, alpha=0.1, above=above)
    keys = np.concatenate([k[2, :, 0], k[0, :3, 0]]).astype(np.float64)
    scores = keys @ q[0].astype(np.float64).T
    weights = np.exp(scores - scores.max(0))
    weights /= weights.sum(0)
    values = np.concatenate([v[2, :, 0], v[0, :3, 0]])
    np.testing.assert_allclose(got[0], weights.T @ values, rtol=1e-4, atol=1e-5)
    want = np.zeros(12, np.uint8)
    want[[0, 1, 2, 3, 8, 9, 10]] = (weights > 0.1).any(1)
    np.testing.assert_array_equal(above[0], want)


def test_kv_write_rounds_to_halves():
    rng = RNG(6)
    k, v = floats(rng, 3, 2, 20), 1e5 * floats(rng, 3, 2, 20)
    v[0, 0, :3] = np.nan, np.inf, -np.inf
    k_cache, v_cache = np.zeros((2, 2, 4, 2, 20), np.float16)
    ops.kv_write(k_cache, v_cache, np.array([6, -1, 1]), k, v)
    most = np.finfo(np.float16).max
    for cache, rows in ((k_cache, k), (v_cache, v)):
        want = np.clip(rows, -most, most).astype(np.float16)  # NaN stays
        np.testing.assert_array_equal(cache[1, 2], want[0])
        np.testing.assert_array_equal(cache[0, 1], want[2])
        assert np.count_nonzero(cache) == 80


def test_attention_and_kv_write_refuse_what_is_outside():
    cache = np.zeros((2, 4, 1, 8), np.float32)
    q = np.zeros((1, 1, 8), np.float32)
    zero = np.zeros(1, np.int32)
    for tables, visible in [([[2]], 1), ([[0]], 5), ([[0]], -1)]:
        with pytest.raises(errors.InvalidArgumentError):
            ops.paged_attention(
                q,
                cache,
                cache,
                np.array(tables, np.int32),
                zero,
                np.array([visible], np.int32),
                1.0,
            )
    row = np.ones((2, 1, 8), np.float32)
    with pytest.raises(errors.InvalidArgumentError, match="slots"):
        ops.kv_write(cache, cache.copy(), np.array([0, 8]), row, row)
    assert not cache.any()
    ops.kv_write(cache, cache.copy(), np.array([-1, 5]), row, row)
    assert cache[1, 1].all() and cache.sum() == 8
    for k, v in ((cache, cache.astype(np.float16)), (cache.astype(np.float64), cache)):
        with pytest.raises(errors.InvalidArgumentError, match=r"float16|same type"):
            ops.kv_write(k, v, np.array([0, 1]), row, row)
    with pytest.raises(TypeError):
        ops.linear(np.zeros((1, 2)), np.zeros((1, 2), np.float32))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), experts=st.integers(1, 70), sigmoid=st.booleans())
def test_router(seed, experts, sigmoid):
    rng = RNG(seed)
    logits = floats(rng, 5, experts)
    logits[1] = 0.5  # ties
    top_k = int(rng.integers(1, experts + 1))
    ids, weights = ops.router(logits, top_k, sigmoid=sigmoid, normalise=False)
    wide = logits.astype(np.float64)
    if sigmoid:
        scores = 1 / (1 + np.exp(-wide))
    else:
        scores = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    want = np.argsort(-wide, axis=-1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(weights, np.take_along_axis(scores, want, -1), rtol=1e-5)
    _, shares = ops.router(logits, top_k, sigmoid=sigmoid, normalise=True)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)


def test_router_reports_nan():
    ids, weights = ops.router(np.full((1, 4), np.nan, np.float32), 2)
    assert ids.tolist() == [[0, 1]] and np.isnan(weights).all()


@pytest.mark.parametrize("n, d, f, experts, top_k", [(7, 33, 20, 5, 2), (200, 64, 96, 8, 3)])
def test_moe_ffn(n, d, f, experts, top_k):
    rng = RNG(6)
    x, gate, up = floats(rng, n, d), floats(rng, experts, f, d), floats(rng, experts, f, d)
    down, weights = floats(rng, experts, d, f), floats(rng, n, top_k)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(n)]).astype(np.int32)
    ids[2, 1] = -1
    want = np.zeros((n, d))
    for token in range(n):
        for slot in range(top_k):
            e = ids[token, slot]
            if e < 0:
                continue
            g = gate[e].astype(np.float64) @ x[token]
            h = g / (1 + np.exp(-g)) * (up[e].astype(np.float64) @ x[token])
            want[token] += weights[token, slot] * (down[e].astype(np.float64) @ h)
    got = ops.moe_ffn(x, ids, weights, gate, up, down)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3)
    for token in (0, 2, n - 1):
        one = slice(token, token + 1)
        alone = ops.moe_ffn(x[one], ids[one], weights[one], gate, up, down)
        np.testing.assert_array_equal(alone[0], got[token])


def params(n=1, **values):
    rows = np.zeros(n, ops.SAMPLING)
    rows["num_logprobs"] = -1
    for name, value in values.items():
        rows[name] = value
    return rows


def test_greedy_takes_the_first_of_the_largest():
    logits = np.array([[1, 3, 3, 2]], np.float32)
    result = ops.sample(logits, params(num_logprobs=2))
    assert result.tokens.tolist() == [1]
    want = 3 - np.log(np.exp([1.0, 3, 3, 2]).sum())
    assert result.logprobs[0] == pytest.approx(want, rel=1e-5)
    assert result.top_ids[0, :2].tolist() == [1, 2]


def draws(logits, count=4000, **values):
    batch = np.repeat(np.asarray(logits, np.float32)[None], count, 0)
    rows = params(count, temperature=1.0, **values)
    rows["position"] = np.arange(count)
    return np.bincount(ops.sample(batch, rows).tokens, minlength=len(logits)) / count


def test_sampling_follows_the_distribution():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    np.testing.assert_allclose(draws(logits), [0.5, 0.25, 0.125, 0.125], atol=0.03)
    np.testing.assert_allclose(draws(logits, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(draws(logits, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(draws(logits, top_p=0.5), [1, 0, 0, 0])
    np.testing.assert_allclose(draws(logits, min_p=0.4), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    wide = np.zeros(1000)
    assert (draws(wide, top_p=0.3) > 0).nonzero()[0].max() <= 300


def test_randomness_depends_on_seed_and_position_alone():
    rng = RNG(7)
    logits = floats(rng, 6, 50)
    rows = params(6, temperature=1.3, seed=[1, 1, 2, 2, 3, 3], position=[5, 6, 5, 6, 5, 6])
    together = ops.sample(logits.copy(), rows).tokens
    for i in range(6):
        alone = ops.sample(logits[i : i + 1].copy(), rows[i : i + 1]).tokens
        assert alone[0] == together[i]


def philox(seed, position):
    """Philox4x32-10 in plain Python, from the paper's definition."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    c = [position & 0xFFFFFFFF, position >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (b >> 32) ^ c[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ c[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((c[1] << 32 | c[0]) >> 11) * 2.0**-53


def test_randomness_is_philox():
    # Known answer of Random123 (philox4x32-10, all zero): 6627e8d5 e169c58d ...
    assert philox(0, 0) == (0xE169C58D6627E8D5 >> 11) * 2.0**-53
    size = 1000
    for seed, position in [(0, 0), (7, 3), (2**63 + 5, 2**40)]:
        rows = params(1, temperature=1.0, seed=np.uint64(seed), position=position)
        token = ops.sample(np.zeros((1, size), np.float32), rows).tokens[0]
        assert token == int(philox(seed, position) * size)


def test_bias_and_penalties():
    logits = np.array([[2.0, 1.9, -1.0, 0.0]], np.float32)
    bias = (np.array([0, 1]), np.array([3], np.int32), np.array([5.0], np.float32))
    assert ops.sample(logits.copy(), params(), bias).tokens.tolist() == [3]
    history = (np.array([0, 3]), np.array([0, 1, 1], np.int32), np.array([1]))
    got = ops.sample(logits.copy(), params(presence_penalty=3.0), None, history)
    assert got.tokens.tolist() == [0]  # token 0 is prompt only
    got = ops.sample(logits.copy(), params(repetition_penalty=4.0), None, history)
    assert got.tokens.tolist() == [0]  # 0.5 against 0.475
    got = ops.sample(logits.copy(), params(frequency_penalty=-0.1), None, history)
    assert got.tokens.tolist() == [1]
    got = ops.sample(logits.copy(), params(num_logprobs=0, frequency_penalty=-0.1), None, history)
    assert got.logprobs[0] == pytest.approx(1.9 - np.log(np.exp(logits[0]).sum()), rel=1e-5)


def test_rows_without_a_finite_logit_fail_alone():
    logits = np.zeros((3, 4), np.float32)
    logits[0, 2] = np.nan
    logits[1] = -np.inf
    result = ops.sample(logits, params(3))
    assert result.status.tolist() == [1, 1, 0]
    assert result.tokens.tolist() == [-1, -1, 0]
    only = np.full((1, 4), -np.inf, np.float32)
    only[0, 2] = 1.0
    assert ops.sample(only, params(1, temperature=2.0)).tokens.tolist() == [2]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": np.nan},
        {"min_p": 2},
        {"repetition_penalty": -1},
        {"num_logprobs": 21},
        {"top_k": -1},
    ],
)
def test_bad_sampling_parameters_are_refused(values):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(values))):
        ops.sample(np.zeros((1, 4), np.float32), params(**values))


DIGEST = """
import hashlib, numpy as np
from pyruntime import ops
rng = np.random.default_rng(8)
f = lambda *s: rng.standard_normal(s).astype(np.float32)
digest = hashlib.sha256()
x = f(37, 203)
for part in (
    ops.linear(x, f(65, 203), f(65)),
    ops.rms_norm(x, f(203), 1e-6),
    ops.silu_mul(20 * f(9, 77), f(9, 77)),
    ops.paged_attention(f(3, 4, 40), f(60, 16, 2, 40), f(60, 16, 2, 40),
        np.arange(60, dtype=np.int32).reshape(2, 30), np.array([0, 1, 1], np.int32),
        np.array([1, 479, 300], np.int32), 0.5),
    ops.paged_attention(f(3, 4, 40), *f(2, 60, 16, 2, 40).astype(np.float16),
        np.arange(60, dtype=np.int32).reshape(2, 30), np.array([0, 1, 1], np.int32),
        np.array([1, 479, 300], np.int32), 0.5),
    *ops.router(f(11, 64), 6, sigmoid=True),
    ops.moe_ffn(f(9, 40), *ops.router(f(9, 4), 2), f(4, 50, 40), f(4, 50, 40), f(4, 40, 50)),
):
    digest.update(part.tobytes())
rows = np.zeros(20, ops.SAMPLING)
rows["temperature"], rows["top_p"], rows["position"] = 0.9, 0.8, np.arange(20)
result = ops.sample(f(20, 5000), rows)
digest.update(result.tokens.tobytes() + result.logprobs.tobytes())
print(digest.hexdigest())
"""


def test_simd_levels_agree_bit_for_bit():
    levels = ["scalar", "avx2", "avx512"]
    best = levels.index(_native.simd_detected().removesuffix("_vnni"))
    seen = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYRUNTIME_SIMD": level},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for level in levels[: best + 1]
    }
    assert len(seen) == 1
