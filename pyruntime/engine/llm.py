"""A model as a library: text in, text out."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyruntime.engine.client import ThreadClient
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.layers import activation_bytes, predictor
from pyruntime.engine.loader import Progress, dense_bytes, load_weights
from pyruntime.engine.loop import EngineLoop
from pyruntime.engine.memory import BLOCK_OVERHEAD, EXTENT_OVERHEAD, MemoryPlan, plan_memory
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.engine.runner import Engine, kv_groups
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.stored import STORE_NAME, content_hash, need_store, open_store
from pyruntime.engine.text import StopStrings, Tokenizer
from pyruntime.errors import CapacityError, Error, InternalError, InvalidArgumentError
from pyruntime.kv import (
    BlockMemory,
    BlockPool,
    DiskCache,
    DiskTier,
    KvStorage,
    ServingPool,
    plan_prefixes,
)
from pyruntime.kv.disk_cache import QUEUE_BYTES
from pyruntime.moe import ExpertCache, ExpertStore, Fixed, StoreExperts, parse_policy
from pyruntime.pool import Budget
from pyruntime.sched import preset

__all__ = ["BLOCK_SIZE", "LLM", "Completion", "make_loop"]

BLOCK_SIZE = 16
STEP_TOKENS = 512
"""Prompt tokens of a step, where a policy has no limit of its own."""


def make_loop(
    model: str | Path,
    *,
    policy: str = "fcfs",
    kv_bytes: int = 1 << 30,
    kv_dtype: str = "float32",
    max_running: int = 64,
    max_queued: int = 1024,
    swap_bytes: int = 0,
    bits: int | None = None,
    memory_budget: int | None = None,
    bit_policy: str | None = None,
    deterministic: bool = True,
    disk_cache: str | Path | None = None,
    disk_bytes: int = 4 << 30,
    retention: str | None = "formula",
    progress: Progress | None = None,
) -> EngineLoop:
    """Load a model and everything that serves it.

    Parameters
    ----------
    model : path
        A Hugging Face model directory, or one made by ``pyruntime quantize``.
    policy : {"fcfs", "layered", "swap"}
    kv_bytes : int, default 1 GiB
        Upper limit of the KV cache and of the hidden states that a layered prefill keeps. Memory
        is taken as blocks are first written; prompts that were served stay until it is full.
    kv_dtype : {"float32", "float16"}
        Type that keys and values are kept in. Halves take half the memory, and a long context is
        attended to faster; they round what is computed (relative error 2 ** -11).
    max_running, max_queued : int
    swap_bytes : int, default 0
        Memory for preempted requests' keys and values; only policy ``swap`` uses it. It counts in
        the memory budget.
    bits : int, optional
        Width of a quantized model's experts; its widest by default.
    memory_budget : int, optional
        Bytes for everything the model uses (`pyruntime.engine.memory`): experts are then loaded as
        tokens need them. The KV cache takes from them as requests need it, up to `kv_bytes` or all
        but what experts need at least; what was served may keep a quarter of the budget. Needs a
        quantized model.
    bit_policy : str, optional
        Widths of a quantized model's experts token by token (`pyruntime.moe.parse_policy`); instead
        of `bits`.
    deterministic : bool, default True
        Text never depends on what is in memory (`pyruntime.moe.ExpertCache`).
    disk_cache : path, optional
        A file for keys and values of what was served: prompts that begin alike find them there,
        also after a restart. It belongs to one process, one model and one `disk_bytes`; the model's
        weights are read once more to tell. `EngineLoop.close` writes what is on its way.
    disk_bytes : int, default 4 GiB
        Of that file at most.
    retention : {"formula", "fixed"} or None
        How long what a program's turn computed is kept while it calls a tool
        (`pyruntime.kv.Retention`); None: as long as anything else that was served.
    progress : callable, optional
        Called with (layers loaded, layers).

    Raises
    ------
    pyruntime.errors.CapacityError
        The budget is too small; the message has the least that is enough, and its parts.
    pyruntime.errors.InvalidArgumentError
        The options do not go together, or the model is not quantized, or the disk cache is another
        model's. `pyruntime.kv.DiskTier` says what else its file may raise.
    """
    config = ModelConfig.load(model)
    if bits is not None and bit_policy is not None:
        raise InvalidArgumentError("give bits or bit_policy, not both: fixed:4 is a policy")
    if kv_dtype not in ("float32", "float16"):
        raise InvalidArgumentError(f"kv_dtype is {kv_dtype!r}; it must be float32 or float16")
    groups = kv_groups(config, BLOCK_SIZE)
    token_values = config.num_layers * 2 * config.kv_heads * config.head_dim
    item_bytes = BLOCK_SIZE * token_values * np.dtype(kv_dtype).itemsize
    block_bytes = item_bytes + (0 if memory_budget is None else BLOCK_OVERHEAD * len(groups))
    chosen = preset(policy)
    tokens = min(getattr(chosen.partition, "max_tokens", 0), max_running * config.max_len)
    hidden_budget = min(tokens * config.hidden * 4, kv_bytes // 4)
    if kv_bytes - hidden_budget < block_bytes:
        raise InvalidArgumentError(f"kv_bytes is {kv_bytes}; one block takes {block_bytes} bytes")
    cached = memory_budget is not None or bit_policy is not None or not deterministic
    if cached and not (Path(model) / STORE_NAME).exists():
        raise InvalidArgumentError(
            f"{model} is not quantized, so its experts are all in memory at one width; run "
            "`pyruntime quantize` first"
        )

    store = open_store(model, config)
    need_store(store, model, bits)
    rows, floor, plan = 0, 1, None
    shared: Budget | None = None  # what the KV cache and the experts draw on
    if memory_budget is not None:
        assert store is not None
        plan, floor, hidden_tokens = _plan(
            memory_budget,
            config,
            store,
            max_running,
            hidden_budget // (config.hidden * 4),
            getattr(chosen.partition, "min_tokens", 0),
            block_bytes,
            dense=dense_bytes(model, store),
            other=swap_bytes + (2 * QUEUE_BYTES if disk_cache is not None else 0),
            kv_most=kv_bytes,
            groups=len(groups),
        )
        hidden_budget = hidden_tokens * config.hidden * 4
        rows = max(hidden_tokens, STEP_TOKENS) + max_running
        shared = Budget(plan.shared)
    kv_bytes = kv_bytes - hidden_budget if plan is None else plan.kv
    weights = load_weights(model, config, progress, store)
    num_blocks = kv_bytes // block_bytes  # pages appear as they are written
    experts: ExpertCache | StoreExperts | None = None
    if cached:
        assert store is not None
        experts = ExpertCache(
            store,
            store.file_bytes if plan is None else plan.shared,
            policy=parse_policy(bit_policy) if bit_policy else Fixed(bits),
            deterministic=deterministic,
            budget=shared,
            predict=predictor(config, weights),
            floor=floor,
            scratch_bytes=64 << 20 if plan is None else plan.scratch,
        )
    elif store is not None:
        experts = StoreExperts(store, bits)
    engine = Engine(
        config,
        weights,
        num_blocks,
        BLOCK_SIZE,
        experts,
        KvStorage.allocate(
            groups,
            num_blocks,
            config.kv_heads,
            config.head_dim,
            small_pages=plan is not None,
            dtype=kv_dtype,
        ),
        hidden_budget,
        rows,
    )
    disk = None
    if disk_cache is not None:
        widths = f"bits {bits}, {bit_policy}, deterministic {deterministic}"
        blocks = f"blocks of {BLOCK_SIZE} tokens in {kv_dtype}"
        about = f"{content_hash(model).hex()}, {blocks}, {widths}"
        tier = DiskTier(
            disk_cache,
            item_bytes=item_bytes,
            capacity_bytes=disk_bytes,
            fingerprint=about.encode(),
        )
        disk = DiskCache(tier, engine.kv, BLOCK_SIZE)

    def memory(blocks: BlockPool) -> BlockMemory:
        assert shared is not None and memory_budget is not None
        assert isinstance(experts, ExpertCache)
        return BlockMemory(
            blocks,
            shared,
            [item_bytes * len(g.layers) // config.num_layers + BLOCK_OVERHEAD for g in groups],
            spare=experts.spare_bytes,
            settle=experts.drain,
            kept_bytes=memory_budget // 4,
            discard=engine.kv.discard,
        )

    pool = ServingPool(
        num_blocks,
        BLOCK_SIZE,
        config.num_layers,
        groups,
        swap_bytes * len(groups) // item_bytes,
        engine.kv,
        disk=disk,
        memory=None if shared is None else memory,
    )
    return EngineLoop(
        engine,
        pool,
        chosen,
        max_running=max_running,
        max_queued=max_queued,
        retention=retention,
    )


def _plan(
    budget: int,
    config: ModelConfig,
    store: ExpertStore,
    max_running: int,
    hidden_most: int,
    hidden_least: int,
    block_bytes: int,
    *,
    other: int,
    kv_most: int,
    **parts: int,
) -> tuple[MemoryPlan, int, int]:
    """Divide a budget.

    Returns
    -------
    plan : MemoryPlan
    floor : int
        Base planes that each layer can keep: a wish.
    hidden_tokens : int
        Tokens that hidden states are kept of between layer slices: as many as an eighth of the
        budget can compute at a time, none if those were too few, or the rest were.
    """
    per_token = config.hidden * 4 + activation_bytes(config, 1, 0) - activation_bytes(config, 0, 0)
    hidden = min(hidden_most, budget // 8 // per_token)
    hidden = 0 if hidden < hidden_least else hidden
    other += EXTENT_OVERHEAD * len(store.extents)
    context = -(-min(STEP_TOKENS, config.max_len) // BLOCK_SIZE) * block_bytes
    for tokens, floor in ((hidden, 1), (0, 1), (0, 0)):
        left = kv_most - tokens * config.hidden * 4
        try:
            plan = plan_memory(
                budget,
                other=other + tokens * config.hidden * 4,
                activations=activation_bytes(
                    config, max(tokens, STEP_TOKENS) + max_running, max_running
                ),
                experts=ExpertCache.least_bytes(store, floor),
                kv_most=left,
                kv_least=max(block_bytes, min(left // block_bytes * block_bytes, context)),
                **parts,
            )
        except CapacityError:
            if (tokens, floor) == (0, 0):
                raise
        else:
            break
    logging.getLogger(__name__).info("memory budget: %s", plan)
    return plan, floor, tokens


@dataclass
class Completion:
    """What was generated for one prompt."""

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    degraded_tokens: int = 0
    """Tokens, of the prompt too, that damaged experts computed at a lower width."""


class LLM:
    """A model that generates text in this process.

    Parameters
    ----------
    model : path, optional
        A Hugging Face model directory; the model that ships with pyruntime by default.
    policy, kv_bytes, kv_dtype, max_running, bits, memory_budget, bit_policy, deterministic
        See `make_loop`, also for `progress`.
    disk_cache, disk_bytes
        See `make_loop`. `close` the model, or use it in a ``with`` block, to keep what it computed
        last.

    Examples
    --------
    >>> from pyruntime import LLM
    >>> llm = LLM()
    >>> len(llm.generate(["The list is"], max_tokens=4)[0].tokens)
    4
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        policy: str = "fcfs",
        kv_bytes: int = 1 << 30,
        kv_dtype: str = "float32",
        max_running: int = 64,
        bits: int | None = None,
        memory_budget: int | None = None,
        bit_policy: str | None = None,
        deterministic: bool = True,
        disk_cache: str | Path | None = None,
        disk_bytes: int = 4 << 30,
        progress: Progress | None = None,
    ) -> None:
        if model is None:
            from pyruntime.models import shipped

            model = shipped()
        self.tokenizer = Tokenizer(model)
        self.loop = make_loop(
            model,
            policy=policy,
            kv_bytes=kv_bytes,
            kv_dtype=kv_dtype,
            max_running=max_running,
            bits=bits,
            memory_budget=memory_budget,
            bit_policy=bit_policy,
            deterministic=deterministic,
            disk_cache=disk_cache,
            disk_bytes=disk_bytes,
            progress=progress,
        )
        self._ids = itertools.count()
        self._client: ThreadClient | None = None

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue prompts, all in one batch, those with a common prefix one after the other.

        Parameters
        ----------
        prompts : str, or sequence of str or of tokens
        params : SamplingParams, optional
            Greedy by default.
        max_tokens : int, default 16
            Per prompt.
        stop : sequence of str
            Strings that end a completion and are left out of it.
        ignore_eos : bool, default False
            Go on after the model's end token.
        progress : callable, optional
            Called with (prompts done, prompts) about once a second.

        Returns
        -------
        list of Completion
            In the order of `prompts`.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            A prompt or parameter cannot be used; nothing was generated.
        pyruntime.errors.StateError
            `stream` is in use: the engine then belongs to its thread.
        """
        if self._client is not None:
            raise InvalidArgumentError("generate() cannot run beside stream(); use another LLM")
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        states: dict[str, _Completing] = {}
        waiting = []
        for prompt in given:
            submit = self._submit(prompt, params, max_tokens, ignore_eos)
            states[submit.id] = _Completing(self.tokenizer, stop)
            waiting.append(submit)
        # Those that share a prefix one after the other, so that it is still in memory.
        order = plan_prefixes([submit.tokens for submit in waiting], BLOCK_SIZE).order()
        waiting = [waiting[index] for index in reversed(order)]
        batch = 2 * self.loop.scheduler.resources.max_running
        done, told = 0, time.monotonic()
        try:
            while waiting or self.loop.busy:
                while waiting and self.loop.num_live < batch:
                    accepted = self.loop.submit(waiting.pop())
                    if accepted.finish_reason:
                        raise _error_of(accepted)
                for delta in self.loop.step():
                    state = states[delta.id]
                    if delta.error:
                        raise _error_of(delta)
                    if state.feed(delta) and delta.finish_reason is None:
                        self.loop.abort(delta.id)
                    done += state.completion.finish_reason != ""
                if progress is not None and time.monotonic() - told >= 1:
                    told = time.monotonic()
                    progress(done, len(given))
        except BaseException:
            for request_id in states:
                self.loop.abort(request_id)
            raise
        return [state.completion for state in states.values()]

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[str]:
        """Continue one prompt, yielding text as it comes; many streams share the engine's thread.

        Parameters and errors as in `generate`.
        """
        if self._client is None:
            self._client = ThreadClient(self.loop)
        state = _Completing(self.tokenizer, stop)
        submit = self._submit(prompt, params, max_tokens, ignore_eos)
        deltas = self._client.submit(submit)
        async for delta in deltas:
            if delta.error:
                raise _error_of(delta)
            before = len(state.completion.text)
            ended = state.feed(delta)
            if len(state.completion.text) > before:
                yield state.completion.text[before:]
            if ended:
                break

    def close(self) -> None:
        """End the engine's thread, if `stream` started one, and close the disk cache."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.loop.close()

    def _submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        max_tokens: int,
        ignore_eos: bool,
    ) -> Submit:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Submit(
            f"llm-{next(self._ids)}",
            tokens,
            params or SamplingParams(),
            max_tokens,
            ignore_eos=ignore_eos,
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Completing:
    """Collects one completion."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.completion = Completion("", [], "")
        self._decoder = tokenizer.detokenizer()
        self._stops = StopStrings(stop)

    def feed(self, delta: Delta) -> bool:
        """Take a delta; True once the completion is whole."""
        c = self.completion
        if c.finish_reason:
            return True
        c.tokens += delta.tokens
        c.logprobs += delta.logprobs or []
        c.degraded_tokens = max(c.degraded_tokens, delta.degraded_tokens)
        text, stopped = self._stops.feed(self._decoder.feed(delta.tokens))
        c.text += text
        if stopped:
            c.finish_reason = "stop"
        elif delta.finish_reason:
            c.text += self._stops.flush()
            c.finish_reason = delta.finish_reason
        return c.finish_reason != ""


def _error_of(delta: Delta) -> Error:
    kinds = {"invalid": InvalidArgumentError, "full": CapacityError}
    return kinds.get(delta.error_kind, InternalError)(delta.error)
