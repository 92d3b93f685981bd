"""The engine: runs step plans on the CPU operators.

Contract
--------
``run(plan, tables, stop) -> StepResult`` executes a plan (`pyruntime.sched.plan`) over the block
tables that ``pool.step`` made for it (`pyruntime.kv`). `stop` is a native flag, read before every
operator. The engine owns

- the tokens and sampling parameters of each request (`add`, `remove`),
- the KV cache arrays, [layers, 2, blocks, block size, kv heads, head dim] in float32; the pool owns
  who uses which block,
- the hidden states of prefill pieces between layer slices; `hidden_bytes` counts them.

Atomic: what a plan computes becomes visible (tokens, hidden states) only when all of it is done. If
`run` raises, nothing has advanced and the same plan may be run again; KV slots that were written
are beyond what anybody may read and are written again. A stopped plan keeps its place: running the
same plan again resumes it there, `drop` forgets it. Its requests' blocks must stay until then.

Order of reductions: every row goes through batch-invariant operators, so neither the cut of a
prefill nor the company in a step changes a bit of a request's logits. The random number of a
sampled token is a function of the request's seed and the token's position.

Threads: one thread runs an engine; the operators use the process's pool. `device` and `stream` of
tables and result say where their arrays live: ``"cpu"`` and 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.loader import LayerWeights, Progress, Weights, load_weights
from pyruntime.engine.sampling import SamplingParams
from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError, StateError
from pyruntime.kv import StepTables
from pyruntime.moe import ReferenceExperts
from pyruntime.sched import StepPlan

__all__ = ["OPERATORS", "Engine", "ExpertBackend", "Piece", "StepResult"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

OPERATORS = ("qkv", "rope", "attention", "output", "router", "experts")
"""The operators of a layer, in order; then, after the last layer, "logits"."""


class ExpertBackend(Protocol):
    """See `pyruntime.moe`."""

    def ffn(
        self, layer: int, x: Floats, ids: Ints, weights: Floats, out: Floats
    ) -> NDArray[np.uint8]:
        """Compute the experts of one layer."""
        ...

    def hint(self, layer: int, x: Floats) -> None:
        """Announce that `x` is about to reach `layer`."""
        ...

    def begin_step(self, plan: StepPlan) -> None:
        """Announce a step."""
        ...

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert of `layer`."""
        ...

    def stats(self) -> dict[str, int]:
        """Return cumulative counters."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """How far a request's part of a step has come."""

    request: int
    token: int
    """Tokens whose part of the step is complete once `layer` and `operator` say so."""
    layer: int
    operator: str
    """Next operator; "" when the piece is done."""


@dataclass(slots=True)
class StepResult:
    """What a step did."""

    plan_id: int
    stopped: bool
    """Whether the stop flag ended the run before the plan was done."""
    reached: list[Piece]
    requests: list[int]
    """Requests that sampled, in the order of the arrays below."""
    sampled: ops.SampleResult | None
    failed: dict[int, str] = field(default_factory=dict)
    """Requests that cannot go on, and why; they are not in `requests`."""
    logits: Floats | None = None
    """[len(requests), vocab], if asked for."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by stage: attention, experts, dense, sampling."""
    expert_tokens: NDArray[np.int64] | None = None
    """[layers, experts]: tokens routed."""
    expert_bytes: NDArray[np.int64] | None = None
    """[layers]: weight bytes of the experts that were used."""
    device: str = "cpu"
    stream: int = 0


class _Sequence:
    """Tokens of one request, in a buffer that doubles."""

    __slots__ = ("params", "prompt_len", "row", "size", "tokens")

    def __init__(self, prompt: Ints, params: SamplingParams) -> None:
        self.tokens = np.empty(max(64, 2 * len(prompt)), np.int32)
        self.tokens[: len(prompt)] = prompt
        self.size = self.prompt_len = len(prompt)
        self.params = params
        self.row = params.row()

    def append(self, token: int) -> None:
        if self.size == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self.size] = token
        self.size += 1


@dataclass(slots=True)
class _Hidden:
    """Hidden states of tokens [low, high) that `layer` layers have been through."""

    low: int
    high: int
    layer: int
    x: Floats


@dataclass(slots=True)
class _Rows:
    """The token rows of a step: decodes first, then the pieces in order."""

    requests: list[int]
    starts: Ints  # first row of each piece, and the end
    layer_lo: Ints
    layer_hi: Ints
    row_piece: Ints
    positions: Ints
    slots: NDArray[np.int64]
    visible: Ints
    table_rows: Ints


@dataclass(slots=True)
class _Open:
    """A plan that is being run."""

    steps: Iterator[tuple[int, str]]
    result: StepResult
    at: tuple[int, str] = (0, OPERATORS[0])


class Engine:
    """Executes step plans of one model.

    Parameters
    ----------
    config : ModelConfig
    weights : Weights
    num_blocks : int
        KV blocks; the block pool must have as many.
    block_size : int, default 16
        Tokens per block.
    experts : ExpertBackend, optional
        Float32 experts in memory by default.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        num_blocks: int,
        block_size: int = 16,
        experts: ExpertBackend | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.block_size = block_size
        self.experts = experts or ReferenceExperts(weights.experts)
        c = config
        self._kv = np.zeros(  # pages appear as blocks are first written
            (c.num_layers, 2, num_blocks, block_size, c.kv_heads, c.head_dim), np.float32
        )
        angles = np.outer(np.arange(c.max_len, dtype=np.float32), c.rope.inv_freq)
        self._cos = np.cos(angles).astype(np.float32) * np.float32(c.rope.scale)
        self._sin = np.sin(angles).astype(np.float32) * np.float32(c.rope.scale)
        self._sequences: dict[int, _Sequence] = {}
        self._hidden: dict[int, _Hidden] = {}
        self._open: dict[int, _Open] = {}

    @classmethod
    def load(
        cls,
        directory: str | Path,
        num_blocks: int,
        block_size: int = 16,
        progress: Progress | None = None,
    ) -> Engine:
        """Load a Hugging Face model directory; errors as in `ModelConfig.load`, `load_weights`."""
        config = ModelConfig.load(directory)
        return cls(config, load_weights(directory, config, progress), num_blocks, block_size)

    # Requests

    def add(self, request: int, prompt: Ints, params: SamplingParams) -> None:
        """Make a request known.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            The prompt is empty, too long, or has a token outside the vocabulary.
        pyruntime.errors.StateError
            The request is known already.
        """
        prompt = np.ascontiguousarray(prompt, np.int32)
        if not 0 < len(prompt) <= self.config.max_len:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt)} tokens; it must have 1..{self.config.max_len}"
            )
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise InvalidArgumentError(f"prompt tokens must be in 0..{self.config.vocab_size - 1}")
        if request in self._sequences:
            raise StateError(f"request {request} is in the engine already")
        params.check(self.config.vocab_size)
        self._sequences[request] = _Sequence(prompt, params)

    def remove(self, request: int) -> None:
        """Forget a request; unknown ones are ignored."""
        self._sequences.pop(request, None)
        self._hidden.pop(request, None)

    def tokens(self, request: int) -> Ints:
        """Return prompt and generated tokens (a view, int32)."""
        sequence = self._sequence(request)
        return sequence.tokens[: sequence.size]

    def _sequence(self, request: int) -> _Sequence:
        sequence = self._sequences.get(request)
        if sequence is None:
            raise NotFoundError(f"request {request} is not in the engine")
        return sequence

    @property
    def hidden_bytes(self) -> int:
        """Bytes of hidden states kept between layer slices."""
        return sum(hidden.x.nbytes for hidden in self._hidden.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache arrays."""
        return self._kv.nbytes

    # Steps

    def run(
        self,
        plan: StepPlan,
        tables: StepTables,
        stop: ops.StopFlag | None = None,
        return_logits: bool = False,
    ) -> StepResult:
        """Execute a plan, or resume it after a stop.

        Parameters
        ----------
        plan : StepPlan
        tables : StepTables
            Of the requests in the plan.
        stop : StopFlag, optional
        return_logits : bool, default False
            Keep the logits of the rows that sample.

        Raises
        ------
        pyruntime.errors.NotFoundError
            A request is unknown to the engine or to `tables`.
        pyruntime.errors.StateError
            A piece does not continue where its request stands.
        """
        current = self._open.pop(plan.id, None)
        if current is None:
            rows = self._rows(plan, tables)
            self.experts.begin_step(plan)
            c = self.config
            result = StepResult(
                plan.id,
                False,
                [],
                [],
                None,
                expert_tokens=np.zeros((c.num_layers, c.num_experts), np.int64),
                expert_bytes=np.zeros(c.num_layers, np.int64),
            )
            steps = self._execute(plan, rows, tables.tables, result, return_logits)
            current = _Open(steps, result)
        result = current.result
        for at in current.steps:
            current.at = at
            if stop is not None and stop.is_set():
                result.stopped = True
                result.reached = self._reached(plan, *at)
                self._open[plan.id] = current
                return result
        result.stopped = False
        result.reached = self._reached(plan, self.config.num_layers, "")
        return result

    def drop(self, plan_id: int) -> None:
        """Forget a stopped plan: its requests stand where they stood before it."""
        self._open.pop(plan_id, None)

    def _reached(self, plan: StepPlan, layer: int, operator: str) -> list[Piece]:
        pieces = [
            Piece(r, self._sequences[r].size, layer, operator)
            for r in plan.decode.tolist()
            if r in self._sequences
        ]
        for request, _, high, layer_lo, layer_hi in plan.prefill.tolist():
            done = layer >= layer_hi
            pieces.append(
                Piece(
                    request,
                    high,
                    min(max(layer, layer_lo), layer_hi),
                    "" if done else operator if layer >= layer_lo else OPERATORS[0],
                )
            )
        return pieces

    def _rows(self, plan: StepPlan, tables: StepTables) -> _Rows:
        c, layers = self.config, self.config.num_layers
        requests = plan.requests()
        if len(set(requests)) != len(requests):
            raise StateError(f"plan {plan.id} names a request twice")
        spans = [(self._sequence(r).size - 1, self._sequence(r).size) for r in plan.decode.tolist()]
        ranges = [(0, layers)] * len(spans)
        for request, low, high, layer_lo, layer_hi in plan.prefill.tolist():
            sequence, hidden = self._sequence(request), self._hidden.get(request)
            if not (0 <= low < high <= sequence.size and 0 <= layer_lo < layer_hi <= layers):
                raise StateError(
                    f"request {request}: tokens {low}..{high} of {sequence.size} in layers "
                    f"{layer_lo}..{layer_hi} of {layers} are no piece"
                )
            if layer_lo and (
                hidden is None or (hidden.low, hidden.high, hidden.layer) != (low, high, layer_lo)
            ):
                raise StateError(
                    f"request {request} has no hidden states of tokens {low}..{high} at layer "
                    f"{layer_lo}"
                )
            spans.append((low, high))
            ranges.append((layer_lo, layer_hi))
        lengths = [high - low for low, high in spans]
        starts = np.zeros(len(spans) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        row_piece = np.repeat(np.arange(len(spans), dtype=np.int32), lengths)
        lows = np.array([low for low, _ in spans], np.int32)
        # Rotary position and slot agree here: no sequence has holes yet.
        positions = np.arange(starts[-1], dtype=np.int32) - (starts[:-1] - lows)[row_piece]
        try:
            piece_rows = np.array([tables.row_of[r] for r in requests], np.int32)
        except KeyError as error:
            raise NotFoundError(f"request {error} has no block table in this step") from None
        table_rows = piece_rows[row_piece]
        if positions.size and positions.max() >= c.max_len:
            raise CapacityError(f"a sequence reached the context of {c.max_len} tokens")
        block, offset = np.divmod(positions, self.block_size)
        if block.size and block.max() >= tables.tables.shape[1]:
            raise StateError("a block table is shorter than its sequence")
        slots = tables.tables[table_rows, block].astype(np.int64) * self.block_size + offset
        if (slots < 0).any():
            raise StateError("a token's block is missing from its table")
        layer_ranges = np.array(ranges, np.int32).reshape(-1, 2)
        return _Rows(
            requests,
            starts,
            layer_ranges[:, 0],
            layer_ranges[:, 1],
            row_piece,
            positions.astype(np.int32),
            slots,
            (positions + 1).astype(np.int32),
            table_rows,
        )

    def _execute(
        self,
        plan: StepPlan,
        rows: _Rows,
        tables: Ints,
        result: StepResult,
        return_logits: bool,
    ) -> Iterator[tuple[int, str]]:
        """Compute the plan, yielding before every operator; effects come at the very end."""
        c, w = self.config, self.weights
        ids = np.empty(len(rows.row_piece), np.int32)
        x = np.empty((len(ids), c.hidden), np.float32)
        for piece, request in enumerate(rows.requests):
            part = slice(rows.starts[piece], rows.starts[piece + 1])
            if rows.layer_lo[piece]:
                x[part] = self._hidden[request].x
                ids[part] = 0
            else:
                first = rows.positions[part.start]
                tokens = self._sequences[request].tokens
                ids[part] = tokens[first : first + part.stop - part.start]
        fresh = (rows.layer_lo == 0)[rows.row_piece]
        if fresh.all():
            ops.embedding(ids, w.embedding, x)
        elif fresh.any():
            x[fresh] = ops.embedding(ids[fresh], w.embedding)
        bad_tokens = np.zeros(len(x), bool)
        for layer in range(c.num_layers):
            active = (rows.layer_lo <= layer) & (layer < rows.layer_hi)
            if not active.any():
                continue
            if active.all():
                yield from self._layer(layer, x, rows, slice(None), tables, result, bad_tokens)
            else:
                chosen = np.flatnonzero(active[rows.row_piece])
                some = x[chosen]
                yield from self._layer(layer, some, rows, chosen, tables, result, bad_tokens)
                x[chosen] = some
        yield c.num_layers, "logits"
        clock = time.perf_counter()
        sampling: list[int] = []  # pieces
        for piece, request in enumerate(rows.requests):
            last = rows.positions[rows.starts[piece + 1] - 1] + 1
            if rows.layer_hi[piece] == c.num_layers and last == self._sequences[request].size:
                sampling.append(piece)
        sampled = self._sample(sampling, x, rows, bad_tokens, result, return_logits)
        for piece in np.flatnonzero(rows.layer_hi < c.num_layers).tolist():
            part = slice(rows.starts[piece], rows.starts[piece + 1])
            low = int(rows.positions[part.start])
            self._hidden[rows.requests[piece]] = _Hidden(
                low, low + part.stop - part.start, int(rows.layer_hi[piece]), x[part].copy()
            )
        for piece in np.flatnonzero((rows.layer_lo > 0) & (rows.layer_hi == c.num_layers)).tolist():
            del self._hidden[rows.requests[piece]]
        for request, token in sampled:
            self._sequences[request].append(token)
        _add(result.seconds, "sampling", clock)

    def _layer(
        self,
        layer: int,
        x: Floats,
        rows: _Rows,
        chosen: slice | NDArray[np.int64],
        tables: Ints,
        result: StepResult,
        bad_tokens: NDArray[np.bool_],
    ) -> Iterator[tuple[int, str]]:
        """One decoder layer over the rows `chosen`, whose hidden states are `x`, in place."""
        c, w = self.config, self.weights.layers[layer]
        n, q_size, kv_size = len(x), c.heads * c.head_dim, c.kv_heads * c.head_dim
        yield layer, "qkv"
        clock = time.perf_counter()
        qkv = ops.linear(ops.rms_norm(x, w.attention_norm, c.eps), w.qkv, w.qkv_bias)
        q = np.ascontiguousarray(qkv[:, :q_size])
        k = np.ascontiguousarray(qkv[:, q_size : q_size + kv_size])
        v = np.ascontiguousarray(qkv[:, q_size + kv_size :])
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
        k_cache, v_cache = self._kv[layer]
        slots = np.ascontiguousarray(rows.slots[chosen])
        ops.kv_write(k_cache, v_cache, slots, k, v.reshape(n, c.kv_heads, c.head_dim))
        _add(result.seconds, "attention", clock)
        yield layer, "attention"
        clock = time.perf_counter()
        attended = ops.paged_attention(
            q,
            k_cache,
            v_cache,
            tables,
            np.ascontiguousarray(rows.table_rows[chosen]),
            np.ascontiguousarray(rows.visible[chosen]),
            c.head_dim**-0.5,
            c.windows[layer],
        )
        _add(result.seconds, "attention", clock)
        yield layer, "output"
        clock = time.perf_counter()
        ops.add(x, ops.linear(attended.reshape(n, q_size), w.out, w.out_bias))
        normed = ops.rms_norm(x, w.ffn_norm, c.eps)
        _add(result.seconds, "dense", clock)
        if w.router is None:
            yield layer, "experts"
            clock = time.perf_counter()
            ops.add(x, _mlp(normed, w))
            _add(result.seconds, "dense", clock)
            return
        yield layer, "router"
        clock = time.perf_counter()
        self.experts.hint(layer, normed)
        ids, shares = ops.router(ops.linear(normed, w.router), c.top_k, normalise=c.normalise)
        _add(result.seconds, "dense", clock)
        yield layer, "experts"
        clock = time.perf_counter()
        out = np.empty_like(normed)
        status = self.experts.ffn(layer, normed, ids, shares, out)
        if status.any():
            bad_tokens[chosen] |= status != 0
        clock = _add(result.seconds, "experts", clock)
        if w.dense is not None and w.shared_gate is not None:
            _, gate = ops.router(
                ops.linear(normed, w.shared_gate), 1, sigmoid=True, normalise=False
            )
            ops.add(out, gate * _mlp(normed, w))
        ops.add(x, out)
        counts = np.bincount(ids.reshape(-1), minlength=c.num_experts)
        assert result.expert_tokens is not None and result.expert_bytes is not None
        result.expert_tokens[layer] += counts
        result.expert_bytes[layer] += np.count_nonzero(counts) * self.experts.expert_bytes(layer)
        _add(result.seconds, "dense", clock)

    def _sample(
        self,
        pieces: list[int],
        x: Floats,
        rows: _Rows,
        bad_tokens: NDArray[np.bool_],
        result: StepResult,
        return_logits: bool,
    ) -> list[tuple[int, int]]:
        """Fill the result's samples; return (request, token) pairs."""
        for piece in np.unique(rows.row_piece[bad_tokens]).tolist():
            result.failed[rows.requests[piece]] = "an expert could not be read"
        pieces = [piece for piece in pieces if rows.requests[piece] not in result.failed]
        if not pieces:
            return []
        last = rows.starts[np.array(pieces) + 1] - 1
        normed = ops.rms_norm(np.ascontiguousarray(x[last]), self.weights.norm, self.config.eps)
        logits = ops.linear(normed, self.weights.head)
        kept = logits.copy() if return_logits else None
        sequences = [self._sequences[rows.requests[piece]] for piece in pieces]
        params = np.array([sequence.row for sequence in sequences], ops.SAMPLING)
        params["position"] = [sequence.size for sequence in sequences]
        bias = tokens = None
        if any(sequence.params.logit_bias for sequence in sequences):
            pairs = [sorted(s.params.logit_bias.items()) for s in sequences]
            flat = [pair for row in pairs for pair in row]
            bias = (
                _offsets([len(row) for row in pairs]),
                np.array([token for token, _ in flat], np.int32),
                np.array([value for _, value in flat], np.float32),
            )
        if any(sequence.params.penalises for sequence in sequences):
            known = [s.tokens[: s.size if s.params.penalises else 0] for s in sequences]
            prompts = [min(s.prompt_len, len(k)) for s, k in zip(sequences, known, strict=True)]
            tokens = (
                _offsets([len(k) for k in known]),
                np.concatenate(known),
                np.array(prompts, np.int64),
            )
        sampled = ops.sample(logits, params, bias, tokens)
        good = sampled.status == 0
        for index in np.flatnonzero(~good).tolist():
            result.failed[rows.requests[pieces[index]]] = "its logits are not finite"
        if not good.all():
            sampled = ops.SampleResult(*(part[good] for part in sampled))
            kept = None if kept is None else kept[good]
        result.requests = [rows.requests[p] for p, fine in zip(pieces, good, strict=True) if fine]
        result.sampled, result.logits = sampled, kept
        return list(zip(result.requests, sampled.tokens.tolist(), strict=True))


def _mlp(x: Floats, w: LayerWeights) -> Floats:
    assert w.dense is not None
    gate, up, down = w.dense
    inner = ops.linear(x, gate)
    return ops.linear(ops.silu_mul(inner, ops.linear(x, up), inner), down)


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _add(seconds: dict[str, float], stage: str, since: float) -> float:
    now = time.perf_counter()
    seconds[stage] = seconds.get(stage, 0.0) + now - since
    return now
