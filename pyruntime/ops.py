"""Float32 operators of a transformer step on numpy arrays.

Thin functions over the native operators (`pyruntime/ops.h`). Arrays are C-contiguous numpy arrays
of exactly the documented dtype: anything else is refused, never copied silently. The result is
written to `out`, which is made when it is not given. Every function releases the GIL and uses the
process's thread pool.

All are batch invariant: the bits of a result row depend on that row's inputs alone, not on the
other rows of the call, the number of threads or the SIMD level.

Every function raises `pyruntime.errors.InvalidArgumentError` for a wrong shape, layout or index
(outputs are then unchanged) and TypeError for a wrong dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native

__all__ = [
    "MAX_LOGPROBS",
    "SAMPLING",
    "SampleResult",
    "StopFlag",
    "add",
    "clamp",
    "embedding",
    "kv_write",
    "linear",
    "moe_ffn",
    "paged_attention",
    "rms_norm",
    "rope",
    "router",
    "sample",
    "silu_mul",
]

Floats = NDArray[np.float32]
Cache = NDArray[np.float32] | NDArray[np.float16]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

MAX_LOGPROBS: int = _native.MAX_LOGPROBS
StopFlag = _native.StopFlag

SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int32),
        ("num_logprobs", np.int32),
        ("seed", np.uint64),
        ("position", np.int64),
    ],
    align=True,
)
"""Structured dtype of one row's sampling parameters (`pyrt_ops_sampling`)."""

if SAMPLING.itemsize != _native.SAMPLING_BYTES:  # pragma: no cover - a broken build
    raise ImportError("SAMPLING does not match pyrt_ops_sampling")


def linear(
    x: Floats, weight: Floats, bias: Floats | None = None, out: Floats | None = None
) -> Floats:
    """Compute ``x @ weight.T + bias``.

    Parameters
    ----------
    x : ndarray of float32, shape (n, k)
        Rows may be further apart than they are long.
    weight : ndarray of float32, shape (m, k)
        Likewise.
    bias : ndarray of float32, shape (m,), optional
    out : ndarray of float32, shape (n, m), optional

    Returns
    -------
    ndarray of float32, shape (n, m)
    """
    if out is None:
        out = np.empty((x.shape[0], weight.shape[0]), np.float32)
    _native.ops_linear(x, weight, bias, out)
    return out


def embedding(ids: Ints, table: Floats, out: Floats | None = None) -> Floats:
    """Gather the rows `ids` (int32, shape (n,)) of `table` (float32, shape (rows, d))."""
    if out is None:
        out = np.empty((ids.shape[0], table.shape[1]), np.float32)
    _native.ops_embedding(ids, table, out)
    return out


def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats | None = None) -> Floats:
    """Divide the rows of `x` (float32, shape (n, d)) by their root mean square, times `weight`.

    `out` may be `x`. Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    if out is None:
        out = np.empty_like(x)
    _native.ops_rms_norm(x, weight, eps, out)
    return out


def add(x: Floats, y: Floats) -> Floats:
    """Add `y` to `x` in place (float32, shape (n, d)) and return `x`."""
    _native.ops_add(x, y)
    return x


def clamp(x: Floats, limit: float) -> Floats:
    """Limit `x` (float32, shape (n, d)) to ``[-limit, limit]`` in place and return it."""
    _native.ops_clamp(x, limit)
    return x


def silu_mul(gate: Floats, up: Floats, out: Floats | None = None) -> Floats:
    """Compute ``gate * sigmoid(gate) * up`` (float32, shape (n, f)); `out` may be either."""
    if out is None:
        out = np.empty_like(gate)
    _native.ops_silu_mul(gate, up, out)
    return out


def rope(x: Floats, positions: Ints, cos: Floats, sin: Floats) -> Floats:
    """Rotate queries or keys in place.

    Parameters
    ----------
    x : ndarray of float32, shape (n, heads, d)
        Dimensions ``i`` and ``i + half`` of each head form a pair; those from ``2 * half`` on stay.
    positions : ndarray of int32, shape (n,)
        Row of `cos` and `sin` for each row of `x`.
    cos, sin : ndarray of float32, shape (positions, half)

    Returns
    -------
    ndarray
        `x`.

    References
    ----------
    Su et al., RoFormer (2021), section 3.4.2.
    """
    _native.ops_rope(x, positions, cos, sin)
    return x


def kv_write(k_cache: Cache, v_cache: Cache, slots: Longs, k: Floats, v: Floats) -> None:
    """Store keys and values in their slots.

    Parameters
    ----------
    k_cache, v_cache : ndarray of float32 or float16, shape (blocks, block size, kv heads, d)
        Any strides, alike for both, contiguous along d. Halves are rounded to nearest even; what
        is too large becomes the largest finite one.
    slots : ndarray of int64, shape (n,)
        ``block * block_size + offset``; -1 skips the row.
    k, v : ndarray of float32, shape (n, kv heads, d)
    """
    _native.ops_kv_write(k_cache, v_cache, slots, k, v)


def paged_attention(
    q: Floats,
    k_cache: Cache,
    v_cache: Cache,
    tables: Ints,
    rows: Ints,
    visible: Ints,
    scale: float,
    window: int = 0,
    out: Floats | None = None,
    alpha: float | None = None,
    above: NDArray[np.uint8] | None = None,
) -> Floats:
    """Attend to the slots of block tables.

    Parameters
    ----------
    q : ndarray of float32, shape (n, heads, d)
        Query head h reads KV head ``h // (heads // kv_heads)``.
    k_cache, v_cache : ndarray of float32 or float16, shape (blocks, block size, kv heads, d)
        Halves are read as float32.
    tables : ndarray of int32, shape (tables, max blocks)
        Block ids; -1 is a hole, whose slots are skipped.
    rows : ndarray of int32, shape (n,)
        The table of each query.
    visible : ndarray of int32, shape (n,)
        Slots ``0..visible-1`` of the table are attended.
    scale : float
        Factor of the dot products.
    window : int, default 0
        If positive, only the last `window` of the visible slots are attended.
    alpha : float, optional
        Threshold for `above`.
    above : ndarray of uint8, shape (n, slots), optional
        Receives 1 where any head's attention weight exceeds `alpha`, else 0.

    Returns
    -------
    ndarray of float32, shape (n, heads, d)
        Zeros for a query that attends to nothing.
    """
    if out is None:
        out = np.empty_like(q)
    _native.ops_paged_attention(
        q, k_cache, v_cache, tables, rows, visible, scale, window, out, alpha, above
    )
    return out


def router(
    logits: Floats, top_k: int, *, sigmoid: bool = False, normalise: bool = True
) -> tuple[Ints, Floats]:
    """Choose experts.

    Parameters
    ----------
    logits : ndarray of float32, shape (n, experts)
    top_k : int
        Experts per token.
    sigmoid : bool, default False
        Score with a sigmoid per expert instead of a softmax over all.
    normalise : bool, default True
        Divide the chosen scores by their sum.

    Returns
    -------
    ids : ndarray of int32, shape (n, top_k)
        In falling order of score; ties go to the lower id.
    weights : ndarray of float32, shape (n, top_k)
    """
    ids = np.empty((logits.shape[0], top_k), np.int32)
    weights = np.empty((logits.shape[0], top_k), np.float32)
    _native.ops_router(logits, sigmoid, normalise, ids, weights)
    return ids, weights


def moe_ffn(
    x: Floats,
    ids: Ints,
    weights: Floats,
    gate: Floats,
    up: Floats,
    down: Floats,
    out: Floats | None = None,
) -> Floats:
    """Run each token through its experts and add the results up, in the order of its slots.

    Parameters
    ----------
    x : ndarray of float32, shape (n, d)
    ids : ndarray of int32, shape (n, top_k)
        -1 skips a slot.
    weights : ndarray of float32, shape (n, top_k)
    gate, up : ndarray of float32, shape (experts, f, d)
    down : ndarray of float32, shape (experts, d, f)

    Returns
    -------
    ndarray of float32, shape (n, d)
    """
    if out is None:
        out = np.empty_like(x)
    _native.ops_moe_ffn(x, ids, weights, gate, up, down, out)
    return out


class SampleResult(NamedTuple):
    """What `sample` returns."""

    tokens: Ints
    """Shape (n,); -1 where the row failed."""
    logprobs: Floats
    """Shape (n,): log-probability of the token under the logits as given; NaN if not asked."""
    top_ids: Ints
    """Shape (n, MAX_LOGPROBS): the most likely tokens; only the first `num_logprobs` count."""
    top_logprobs: Floats
    status: NDArray[np.uint8]
    """Shape (n,): 0, or 1 for a row with a NaN or without any finite logit."""


def sample(
    logits: Floats,
    params: NDArray[np.void],
    bias: tuple[Longs, Ints, Floats] | None = None,
    tokens: tuple[Longs, Ints, Longs] | None = None,
) -> SampleResult:
    """Sample one token per row.

    The order is bias, penalties, temperature, top-k, top-p, min-p. The random number is
    Philox4x32-10 of (seed, position): equal parameters and logits give equal tokens, whatever else
    is in the batch.

    Parameters
    ----------
    logits : ndarray of float32, shape (n, vocab)
        Overwritten.
    params : ndarray of `SAMPLING`, shape (n,)
    bias : (offsets, ids, values), optional
        Row i gets ``values[offsets[i]:offsets[i+1]]`` added at ``ids[...]``; int64, int32, float32.
    tokens : (offsets, ids, num_prompt), optional
        Row i's tokens so far, of which the first ``num_prompt[i]`` are the prompt, for penalties:
        repetition over both parts, presence and frequency over the output.

    Returns
    -------
    SampleResult

    References
    ----------
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3.
    """
    n = logits.shape[0]
    result = SampleResult(
        np.empty(n, np.int32),
        np.empty(n, np.float32),
        np.empty((n, MAX_LOGPROBS), np.int32),
        np.empty((n, MAX_LOGPROBS), np.float32),
        np.empty(n, np.uint8),
    )
    _native.ops_sample(
        logits,
        np.ascontiguousarray(params).view(np.uint8).reshape(-1),
        *(bias or (None, None, None)),
        *(tokens or (None, None, None)),
        result.tokens,
        result.logprobs,
        result.top_ids,
        result.top_logprobs,
        result.status,
    )
    return result
