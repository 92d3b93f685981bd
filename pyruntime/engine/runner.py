"""The engine: runs step plans on the CPU operators.

Contract
--------
``run(plan, tables, stop) -> StepResult`` executes a plan (`pyruntime.sched.plan`) over the block
tables that ``pool.step`` made for it (`pyruntime.kv`). `stop` is a native flag, read before every
operator. The engine owns

- the tokens and sampling parameters of each request (`add`, `remove`),
- the KV cache arrays (`kv`, a `KvStorage`); the pool owns who uses which block of which group,
- the hidden states of prefill pieces between layer slices; `hidden_bytes` counts them, and
  `hidden_budget` bounds them: a plan that would keep more is refused. Who gives an engine its
  memory counts both (`pyruntime.engine.llm.make_loop`).

Atomic: what a plan computes becomes visible (tokens, hidden states) only when all of it is done. If
`run` raises, nothing has advanced and the same plan may be run again; KV slots that were written
are beyond what anybody may read and are written again. A stopped plan keeps its place: running the
same plan again resumes it there, `drop` forgets it. Its requests' blocks must stay until then.

Order of reductions: every row goes through batch-invariant operators, so neither the cut of a
prefill nor the company in a step changes a bit of a request's logits. The random number of a
sampled token is a function of the request's seed and the token's position.

Threads: one thread runs an engine; the operators use the process's pool. `device` and `stream` of
plan, tables, storage and result say where their arrays live: ``"cpu"`` and 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyruntime import ops
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.last_rows import sample_rows
from pyruntime.engine.layers import Layers
from pyruntime.engine.loader import Progress, Weights, load_weights
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.step import (
    OPERATORS,
    ExpertBackend,
    GroupRows,
    Hidden,
    Ints,
    Piece,
    Rows,
    Sequence,
    StepResult,
    add_time,
)
from pyruntime.engine.stored import need_store, open_store
from pyruntime.engine.workspace import Workspace
from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError, StateError
from pyruntime.kv import KvGroup, KvStorage, StepTables
from pyruntime.moe import ExpertStore, ReferenceExperts, StoreExperts
from pyruntime.sched import StepPlan

__all__ = ["OPERATORS", "Engine", "ExpertBackend", "Piece", "StepResult", "kv_groups"]


@dataclass(slots=True)
class _Open:
    """A plan that is being run."""

    steps: Iterator[tuple[int, str]]
    result: StepResult
    at: tuple[int, str] = (0, OPERATORS[0])


def kv_groups(config: ModelConfig, block_size: int) -> list[KvGroup]:
    """Return the KV groups of a model: its layers by the window they attend to."""
    layers: dict[int, list[int]] = {}
    for layer, window in enumerate(config.windows):
        layers.setdefault(window, []).append(layer)
    return [KvGroup(tuple(some), window, block_size) for window, some in layers.items()]


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
    storage : KvStorage, optional
        K and V, with the groups of `kv_groups`; allocated by default.
    hidden_budget : int, optional
        Bytes of hidden states kept between layer slices at most; unlimited by default.
    step_rows : int, default 0
        Token rows of the largest step, whose activations then keep their memory
        (`pyruntime.engine.workspace`); 0: they are allocated as they come.
    """

    device = "cpu"
    stream = 0

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        num_blocks: int,
        block_size: int = 16,
        experts: ExpertBackend | None = None,
        storage: KvStorage | None = None,
        hidden_budget: int | None = None,
        step_rows: int = 0,
    ) -> None:
        self.config = config
        self.weights = weights
        self.block_size = block_size
        self.experts = experts or ReferenceExperts(weights.experts)
        c = config
        self.kv = storage or KvStorage.allocate(
            kv_groups(c, block_size), num_blocks, c.kv_heads, c.head_dim
        )
        if [g.window for g in self.kv.groups] != [g.window for g in kv_groups(c, block_size)]:
            raise InvalidArgumentError("the storage's KV groups are not this model's")
        self.hidden_budget = hidden_budget
        self._layers = Layers(config, weights, self.experts, self.kv)
        self._step_rows = step_rows
        self._idle: list[Workspace] = []  # one but for plans that were stopped
        self._sequences: dict[int, Sequence] = {}
        self._hidden: dict[int, Hidden] = {}
        self._open: dict[int, _Open] = {}

    @classmethod
    def load(
        cls,
        directory: str | Path,
        num_blocks: int,
        block_size: int = 16,
        progress: Progress | None = None,
        bits: int | None = None,
        experts_of: Callable[[ExpertStore, Weights], ExpertBackend] | None = None,
        **options: Any,
    ) -> Engine:
        """Load a Hugging Face model directory, or a quantized one (`pyruntime.engine.stored`).

        `bits` is the width of a quantized model's experts, its widest by default; `experts_of`
        makes another backend of its store; `options` are the constructor's. Errors as in
        `ModelConfig.load`, `load_weights` and `open_store`.
        """
        config = ModelConfig.load(directory)
        store = open_store(directory, config)
        need_store(store, directory, bits)
        weights = load_weights(directory, config, progress, store)
        if store is not None:
            make = experts_of or (lambda store, _: StoreExperts(store, bits))
            options.setdefault("experts", make(store, weights))
        return cls(config, weights, num_blocks, block_size, **options)

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
        self._sequences[request] = Sequence(prompt, params)

    def remove(self, request: int) -> None:
        """Forget a request; unknown ones are ignored."""
        self._sequences.pop(request, None)
        self._hidden.pop(request, None)

    def tokens(self, request: int) -> Ints:
        """Return prompt and generated tokens (a view, int32)."""
        sequence = self._sequence(request)
        return sequence.tokens[: sequence.size]

    def _sequence(self, request: int) -> Sequence:
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
        return self.kv.nbytes

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
            if len(tables.copies):
                self.kv.copy_blocks(tables.copies)
            if rows.alpha is not None:
                for index, group in enumerate(rows.groups):
                    shape = (len(rows.requests), int(group.visible.max(initial=0)))
                    result.marks[index] = np.zeros(shape, np.uint8)
            steps = self._steps(plan, rows, result, return_logits)
            current = _Open(steps, result)
        result = current.result
        for at in current.steps:
            current.at = at
            if stop is not None and stop.is_set():
                result.stopped = True
                result.reached = self._reached(plan, *at)
                result.status = dict.fromkeys(plan.requests(), "stopped")
                self._open[plan.id] = current
                return result
        result.stopped = False
        result.reached = self._reached(plan, self.config.num_layers, "")
        result.status = {
            **dict.fromkeys(plan.requests(), "advanced"),
            **dict.fromkeys(result.requests, "sampled"),
            **dict.fromkeys(result.failed, "failed"),
        }
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

    def _rows(self, plan: StepPlan, tables: StepTables) -> Rows:
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
        positions = np.arange(starts[-1], dtype=np.int32) - (starts[:-1] - lows)[row_piece]
        try:
            piece_rows = np.array([tables.row_of[r] for r in requests], np.int32)
        except KeyError as error:
            raise NotFoundError(f"request {error} has no block table in this step") from None
        table_rows = piece_rows[row_piece]
        if positions.size and positions.max() >= c.max_len:
            raise CapacityError(f"a sequence reached the context of {c.max_len} tokens")
        if len(tables.groups) != len(self.kv.groups):
            raise StateError(f"the model has {len(self.kv.groups)} KV groups")
        groups = []
        for group in tables.groups:
            slot = positions - group.shift[table_rows]
            block, offset = np.divmod(slot, group.block_size)
            if block.size and (block.max() >= group.tables.shape[1] or block.min() < 0):
                raise StateError("a block table is shorter than its sequence")
            slots = group.tables[table_rows, block].astype(np.int64) * group.block_size + offset
            if (slots < 0).any():
                raise StateError("a token's block is missing from its table")
            groups.append(GroupRows(group.tables, slots, (slot + 1).astype(np.int32)))
        kept = sum(
            h - lo for (lo, h), (_, last) in zip(spans, ranges, strict=True) if last < layers
        )
        if self.hidden_budget is not None and kept * c.hidden * 4 > self.hidden_budget:
            raise CapacityError(
                f"{kept} tokens between layer slices take {kept * c.hidden * 4} bytes of hidden "
                f"states; the budget is {self.hidden_budget}"
            )
        layer_ranges = np.array(ranges, np.int32).reshape(-1, 2)
        return Rows(
            requests,
            starts,
            layer_ranges[:, 0],
            layer_ranges[:, 1],
            row_piece,
            positions.astype(np.int32),
            table_rows,
            groups,
            tables.alpha,
        )

    def _steps(
        self, plan: StepPlan, rows: Rows, result: StepResult, return_logits: bool
    ) -> Iterator[tuple[int, str]]:
        """Execute the plan in a workspace that no other plan uses."""
        work = self._idle.pop() if self._idle else Workspace(self._step_rows)
        try:
            yield from self._execute(plan, rows, result, return_logits, work)
        finally:
            self._idle.append(work)

    def _execute(
        self,
        plan: StepPlan,
        rows: Rows,
        result: StepResult,
        return_logits: bool,
        work: Workspace,
    ) -> Iterator[tuple[int, str]]:
        """Compute the plan, yielding before every operator; effects come at the very end."""
        c, w = self.config, self.weights
        ids = np.empty(len(rows.row_piece), np.int32)
        x = work.array("x", len(ids), c.hidden)
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
        token_status = np.zeros(len(x), np.uint8)
        for layer in range(c.num_layers):
            active = (rows.layer_lo <= layer) & (layer < rows.layer_hi)
            if not active.any():
                continue
            if active.all():
                yield from self._layers.run(layer, x, rows, slice(None), result, token_status, work)
            else:
                chosen = np.flatnonzero(active[rows.row_piece])
                some = work.array("some", len(chosen), c.hidden)
                np.take(x, chosen, axis=0, out=some, mode="clip")  # "raise" makes a copy
                yield from self._layers.run(layer, some, rows, chosen, result, token_status, work)
                x[chosen] = some
        yield c.num_layers, "logits"
        clock = time.perf_counter()
        sampling: list[int] = []  # pieces
        for piece, request in enumerate(rows.requests):
            last = rows.positions[rows.starts[piece + 1] - 1] + 1
            if rows.layer_hi[piece] == c.num_layers and last == self._sequences[request].size:
                sampling.append(piece)
        sampled = sample_rows(
            w, c.eps, self._sequences, sampling, x, rows, token_status, result, return_logits, work
        )
        for piece in np.flatnonzero(rows.layer_hi < c.num_layers).tolist():
            part = slice(rows.starts[piece], rows.starts[piece + 1])
            low = int(rows.positions[part.start])
            self._hidden[rows.requests[piece]] = Hidden(
                low, low + part.stop - part.start, int(rows.layer_hi[piece]), x[part].copy()
            )
        for piece in np.flatnonzero((rows.layer_lo > 0) & (rows.layer_hi == c.num_layers)).tolist():
            del self._hidden[rows.requests[piece]]
        for request in plan.preempt[:, 0].tolist():  # it starts its slices anew
            self._hidden.pop(request, None)
        for request, token in sampled:
            self._sequences[request].append(token)
        add_time(result.seconds, "sampling", clock)
