"""One decoder layer, operator by operator, over the native operators and an expert backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.linear import apply
from pyruntime.engine.loader import LayerWeights, Weights
from pyruntime.engine.step import ExpertBackend, Floats, Ints, Rows, StepResult
from pyruntime.engine.step import add_time as _add
from pyruntime.engine.workspace import Workspace
from pyruntime.kv import KvStorage

__all__ = ["Layers", "activation_bytes", "predictor"]


class Layers:
    """The decoder layers of a model on its KV cache arrays.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
    experts : ExpertBackend
    kv : KvStorage
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, experts: ExpertBackend, kv: KvStorage
    ) -> None:
        self.config = config
        self.weights = weights
        self.experts = experts
        self.kv = kv
        angles = np.outer(np.arange(config.max_len, dtype=np.float32), config.rope.inv_freq)
        self._cos = np.cos(angles).astype(np.float32) * np.float32(config.rope.scale)
        self._sin = np.sin(angles).astype(np.float32) * np.float32(config.rope.scale)

    def run(
        self,
        layer: int,
        x: Floats,
        rows: Rows,
        chosen: slice | NDArray[np.int64],
        result: StepResult,
        token_status: NDArray[np.uint8],
        work: Workspace,
    ) -> Iterator[tuple[int, str]]:
        """One decoder layer over the rows `chosen`, whose hidden states are `x`, in place.

        What it takes from `work` is what `activation_bytes` counts.
        """
        c, w = self.config, self.weights.layers[layer]
        n, q_size, kv_size = len(x), c.heads * c.head_dim, c.kv_heads * c.head_dim
        yield layer, "qkv"
        clock = time.perf_counter()
        normed = ops.rms_norm(x, w.attention_norm, c.eps, work.array("normed", n, c.hidden))
        qkv = apply(normed, w.qkv, w.qkv_bias, work.array("qkv", n, q_size + 2 * kv_size))
        q = work.copy("q", qkv[:, :q_size])
        k = work.copy("k", qkv[:, q_size : q_size + kv_size])
        v = work.copy("v", qkv[:, q_size + kv_size :])
        if w.q_norm is not None and w.k_norm is not None:  # before clipping, as OLMoE does
            q_rows, k_rows = q.reshape(-1, len(w.q_norm)), k.reshape(-1, len(w.k_norm))
            ops.rms_norm(q_rows, w.q_norm, c.eps, q_rows)
            ops.rms_norm(k_rows, w.k_norm, c.eps, k_rows)
        if c.clip_qkv:
            for part in (q, k, v):
                ops.clamp(part, c.clip_qkv)
        clock = _add(result.seconds, "dense", clock)
        yield layer, "rope"
        clock = time.perf_counter()
        q = q.reshape(n, c.heads, c.head_dim)
        k = k.reshape(n, c.kv_heads, c.head_dim)
        positions = np.ascontiguousarray(rows.positions[chosen])
        ops.rope(q, positions, self._cos, self._sin)
        ops.rope(k, positions, self._cos, self._sin)
        k_cache, v_cache = self.kv.keys[layer], self.kv.values[layer]
        group = self.kv.group_of[layer]
        where = rows.groups[group]
        slots = np.ascontiguousarray(where.slots[chosen])
        ops.kv_write(k_cache, v_cache, slots, k, v.reshape(n, c.kv_heads, c.head_dim))
        _add(result.seconds, "attention", clock)
        yield layer, "attention"
        clock = time.perf_counter()
        visible = np.ascontiguousarray(where.visible[chosen])
        above = None
        if rows.alpha is not None:
            above = np.empty((n, int(visible.max(initial=0))), np.uint8)
        attended = ops.paged_attention(
            q,
            k_cache,
            v_cache,
            where.tables,
            np.ascontiguousarray(rows.table_rows[chosen]),
            visible,
            c.head_dim**-0.5,
            c.windows[layer],
            work.array("attended", n, c.heads, c.head_dim),
            alpha=rows.alpha,
            above=above,
        )
        if above is not None:
            pieces, first = np.unique(rows.row_piece[chosen], return_index=True)
            marks = result.marks[group][:, : above.shape[1]]
            marks[pieces] |= np.bitwise_or.reduceat(above, first, axis=0)
        _add(result.seconds, "attention", clock)
        yield layer, "output"
        clock = time.perf_counter()
        ops.add(x, apply(attended.reshape(n, q_size), w.out, w.out_bias, normed))
        ops.rms_norm(x, w.ffn_norm, c.eps, normed)
        _add(result.seconds, "dense", clock)
        if w.router is None:
            yield layer, "experts"
            clock = time.perf_counter()
            ops.add(x, _mlp(normed, w, c.dense_ffn, work))
            _add(result.seconds, "dense", clock)
            return
        yield layer, "router"
        clock = time.perf_counter()
        ids, shares = ops.router(ops.linear(normed, w.router), c.top_k, normalise=c.normalise)
        _add(result.seconds, "dense", clock)
        yield layer, "experts"
        clock = time.perf_counter()
        out = work.array("out", n, c.hidden)
        if layer + 1 < c.num_layers and self.weights.layers[layer + 1].router is not None:
            self.experts.hint(layer + 1, x)
        status = self.experts.ffn(layer, normed, ids, shares, out)
        if status.any():
            token_status[chosen] |= status
        clock = _add(result.seconds, "experts", clock)
        if w.dense is not None and w.shared_gate is not None:
            _, gate = ops.router(
                ops.linear(normed, w.shared_gate), 1, sigmoid=True, normalise=False
            )
            shared = _mlp(normed, w, c.shared_ffn, work)
            shared *= gate
            ops.add(out, shared)
        ops.add(x, out)
        counts = np.bincount(ids.reshape(-1), minlength=c.num_experts)
        assert result.expert_tokens is not None and result.expert_bytes is not None
        result.expert_tokens[layer] += counts
        result.expert_bytes[layer] += np.count_nonzero(counts) * self.experts.expert_bytes(layer)
        _add(result.seconds, "dense", clock)


def activation_bytes(config: ModelConfig, rows: int, sampling: int) -> int:
    """Return the bytes of a step's arrays at most, and of the rotary tables.

    Parameters
    ----------
    config : ModelConfig
    rows : int
        Token rows.
    sampling : int
        Requests that sample.
    """
    c = config
    width = max(c.shared_ffn, 0 if all(c.sparse) else c.dense_ffn)
    projected = (c.heads + 2 * c.kv_heads) * c.head_dim
    floats = 5 * c.hidden + 2 * projected + c.heads * c.head_dim  # x twice, normed, out, spare
    floats += 2 * width + c.hidden if width else 0
    coded = 2 * max(c.hidden, c.heads * c.head_dim, width)  # rows of a quantized matrix
    routed = 8 * c.num_experts + 64 * c.top_k
    row = floats * 4 + coded + routed + 128  # and places, positions and marks
    return rows * row + 2 * sampling * c.vocab_size * 4 + c.max_len * c.head_dim * 4


def predictor(config: ModelConfig, weights: Weights) -> Callable[[int, Floats], Ints]:
    """Return a guess of a layer's experts from hidden states one layer earlier.

    The layer's own router is applied to them: the residual stream changes little from one layer to
    the next (Eliseev and Mazur 2023, arXiv 2312.17238, section 3.2).
    """

    def predict(layer: int, x: Floats) -> Ints:
        w = weights.layers[layer]
        assert w.router is not None
        logits = ops.linear(ops.rms_norm(x, w.ffn_norm, config.eps), w.router)
        ids, _ = ops.router(logits, config.top_k, normalise=False)
        return ids

    return predict


def _mlp(x: Floats, w: LayerWeights, width: int, work: Workspace) -> Floats:
    assert w.dense is not None
    gate, up, down = w.dense
    inner = apply(x, gate, out=work.array("gate", len(x), width))
    raised = apply(x, up, out=work.array("up", len(x), width))
    ops.silu_mul(inner, raised, inner)
    return apply(inner, down, out=work.array("down", *x.shape))
