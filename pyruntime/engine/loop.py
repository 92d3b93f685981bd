"""The loop that makes an engine serve: scheduler, block pool and engine, step by step.

One thread owns a loop. Order of a step: deadlines, ``scheduler.schedule`` (which asks
``pool.dry_run``), ``pool.step``, ``engine.run``, ``pool.commit``, ``scheduler.step_done``. Whatever
raises inside a step is reported to the scheduler, which retries and then isolates the request to
blame; every request ends in exactly one final delta.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from pyruntime import ops
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.engine.programs import Programs
from pyruntime.engine.runner import Engine, StepResult
from pyruntime.errors import CapacityError, CorruptDataError, Error
from pyruntime.kv import EnginePool, ServingPool
from pyruntime.kv.metrics import flatten
from pyruntime.sched import Policy, Preempt, Request, Resources, Scheduler, State, StepPlan

__all__ = ["EngineLoop", "StepRecord"]

log = logging.getLogger(__name__)
MAX_IDENTICAL_ERRORS = 64


class StepRecord(NamedTuple):
    """One step, for the status page."""

    seconds: float
    num_decode: int
    num_prefill_tokens: int
    num_waiting: int
    free_blocks: int


@dataclass(slots=True)
class _Live:
    handle: int
    submit: Submit
    request: Request
    stops: frozenset[int]
    generated: int = 0
    cached: int = 0
    degraded: int = 0


class _View:
    """The pool as the scheduler sees it."""

    def __init__(self, pool: EnginePool, start: Callable[[int], int]) -> None:
        self.dry_run = pool.dry_run
        self.need = pool.need
        self.fits = pool.fits
        self.can_swap = pool.can_swap
        self.start = start
        self.block_size = pool.block_size


@dataclass(slots=True)
class LoopStats:
    """Cumulative counters of a loop."""

    steps: int = 0
    step_errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    finished: Counter[str] = field(default_factory=Counter)
    expert_bytes: int = 0
    degraded_tokens: int = 0


class EngineLoop:
    """Serves requests with one engine.

    Parameters
    ----------
    engine : Engine
    pool : EnginePool
        With as many blocks as the engine has, of the same size.
    policy : Policy, optional
    max_running, max_queued : int
        Requests that compute at a time, and that may wait.
    retention : {"formula", "fixed"}, optional
        Keep what programs' turns computed while they call tools (`pyruntime.engine.programs`).
    clock : callable, optional
        Seconds; for tests.
    """

    def __init__(
        self,
        engine: Engine,
        pool: EnginePool,
        policy: Policy | None = None,
        *,
        max_running: int = 64,
        max_queued: int = 1024,
        retention: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.pool = pool
        config = engine.config
        resources = Resources(config.num_layers, config.max_len, max_running, max_queued)
        if engine.hidden_budget is not None:
            most = engine.hidden_budget // (config.hidden * 4)
            resources = replace(resources, hidden_tokens=most)
        self.scheduler = Scheduler(resources, policy)
        self.stop = ops.StopFlag()
        self.stats = LoopStats()
        self.recent: deque[StepRecord] = deque(maxlen=512)
        self.expert_tokens = np.zeros((config.num_layers, config.num_experts), np.int64)
        self._clock = clock
        self._live: dict[int, _Live] = {}
        self._handles: dict[str, int] = {}
        self._next_handle = 0
        self._alarmed = False
        self._view = _View(pool, self._start)
        self._programs = None
        if retention is not None and isinstance(pool, ServingPool):
            self._programs = Programs(pool, retention, clock)

    def _start(self, handle: int) -> int:
        self.pool.free(handle)  # of a step that failed after it was admitted
        tokens = self.engine.tokens(handle)
        live = self._live[handle]
        cached = self.pool.admit(handle, tokens, live.submit.tenant.encode())
        self.stats.cached_tokens += cached
        if live.generated == 0:
            live.cached = cached
            if self._programs is not None:
                self._programs.admitted(live.request)
        return cached

    def close(self) -> None:
        """Write what is on its way to a disk cache; no other call may follow."""
        if isinstance(self.pool, ServingPool):
            self.pool.close()

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._live)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def submit(self, submit: Submit) -> Delta:
        """Take a request in; the delta says whether it was accepted."""
        if submit.id in self._handles:
            return _refused(submit.id, "invalid", f"request id {submit.id!r} is in use")
        self._next_handle += 1
        handle = self._next_handle
        now = self._clock()
        request = Request(
            handle,
            len(submit.tokens),
            submit.max_tokens,
            priority=submit.priority,
            tenant=submit.tenant,
            program=submit.program,
            last_turn=submit.last_turn,
            tool=submit.tool,
        )
        if submit.deadline_s is not None:
            request.deadline = now + submit.deadline_s
        try:
            self.engine.add(handle, np.array(submit.tokens, np.int32), submit.sampling)
            self.scheduler.arrive(request, now, self._view)
        except CapacityError as error:
            self.engine.remove(handle)
            return _refused(submit.id, "full", str(error))
        except (Error, OverflowError) as error:
            self.engine.remove(handle)
            return _refused(submit.id, "invalid", str(error))
        stops = set(submit.stop_tokens)
        if not submit.ignore_eos:
            stops.update(self.engine.config.eos)
        self._live[handle] = _Live(handle, submit, request, frozenset(stops))
        self._handles[submit.id] = handle
        self.stats.prompt_tokens += len(submit.tokens)
        if self._programs is not None:
            self._programs.arrived(request)
        return Delta(submit.id)

    def abort(self, request_id: str) -> Delta | None:
        """End a request; None if it is unknown or has ended."""
        handle = self._handles.get(request_id)
        return None if handle is None else self._end(handle, State.CANCELLED, "abort")

    def step(self) -> list[Delta]:
        """Run one step and return what it brought; [] when there is nothing to do."""
        begin = self._clock()
        if self._programs is not None:
            self._programs.tick()
        deltas = [self._end(h, State.CANCELLED, "deadline") for h in self.scheduler.expired(begin)]
        plan = self.scheduler.schedule(begin, self._view)
        scheduled = self._clock()
        if plan is None:
            return deltas
        self.stats.preemptions += len(plan.preempt)
        self.stats.swaps += len(plan.swap_out)
        try:
            result = self._run(plan)
        except Exception as error:
            self._failed(plan, error, deltas)
            return deltas
        if result.stopped:
            self.engine.drop(plan.id)
            self.scheduler.plan_dropped(plan)
            return deltas
        ran = self._clock()
        self._account(plan, result, deltas)
        end = self._clock()
        if self._programs is not None and plan.num_tokens > len(plan.decode):
            self._programs.computed(plan.num_tokens, ran - scheduled)
        stats = self.stats
        stats.steps += 1
        stats.seconds["schedule"] += scheduled - begin + end - ran
        stats.seconds["engine"] += ran - scheduled
        for stage, seconds in result.seconds.items():
            stats.seconds[stage] += seconds
        self.recent.append(
            StepRecord(
                end - begin,
                len(plan.decode),
                plan.num_tokens - len(plan.decode),
                self.scheduler.num_waiting,
                self.pool.num_free,
            )
        )
        return deltas

    def _run(self, plan: StepPlan) -> StepResult:
        grow = plan.kv_after.tolist()
        free = [int(r) for r, mode in plan.preempt if mode == Preempt.RECOMPUTE]
        swaps = plan.swap_out.tolist(), plan.swap_in.tolist()
        return self.engine.run(plan, self.pool.step(grow, free, *swaps), self.stop)

    def _account(self, plan: StepPlan, result: StepResult, deltas: list[Delta]) -> None:
        layers = self.engine.config.num_layers
        partly = {
            r: layer_hi for r, _, _, _, layer_hi in plan.prefill.tolist() if layer_hi < layers
        }
        for request, tokens in plan.kv_after.tolist():
            if request in self._live:
                ids = self.engine.tokens(request)
                self.pool.commit(request, tokens, partly.get(request, layers), ids)
        if result.marks:
            self.pool.observe(plan.requests(), result.marks)
        self.scheduler.step_done(plan, result.requests)
        if result.expert_tokens is not None and result.expert_bytes is not None:
            self.expert_tokens += result.expert_tokens
            self.stats.expert_bytes += int(result.expert_bytes.sum())
        for handle, tokens in result.degraded.items():
            self._live[handle].degraded += tokens
            self.stats.degraded_tokens += tokens
        for handle, reason in result.failed.items():
            delta = self._end(handle, State.FAILED, "error")
            delta.error, delta.error_kind = reason, "internal"
            deltas.append(delta)
        if result.sampled is None:
            return
        self.stats.generated_tokens += len(result.requests)
        for row, (handle, token) in enumerate(
            zip(result.requests, result.sampled.tokens.tolist(), strict=True)
        ):
            live = self._live[handle]
            live.generated += 1
            wanted = live.submit.sampling.logprobs
            logprobs = None if wanted is None else [_logprobs(result.sampled, row, wanted)]
            if token in live.stops:
                delta = self._end(handle, State.FINISHED, "stop")
            elif live.generated >= live.request.max_new:
                delta = self._end(handle, State.FINISHED, "length")
            else:
                delta = Delta(live.submit.id)
            delta.tokens, delta.logprobs = [token], logprobs
            delta.cached_tokens = live.cached if live.generated == 1 else 0
            delta.degraded_tokens = live.degraded
            deltas.append(delta)

    def _failed(self, plan: StepPlan, error: Exception, deltas: list[Delta]) -> None:
        self.stats.step_errors += 1
        if self.stats.step_errors <= MAX_IDENTICAL_ERRORS:
            log.exception("step %d failed with %s", plan.id, type(error).__name__)
        self.engine.drop(plan.id)
        self._check()
        blamed = self.scheduler.engine_error(plan)
        if blamed is not None:
            delta = self._end(blamed, State.FAILED, "error")
            delta.error, delta.error_kind = "the engine failed on this request", "internal"
            deltas.append(delta)

    def _check(self) -> None:
        """Look at the pool after a failure: one that is inconsistent shares nothing any more."""
        try:
            self.pool.check()
        except CorruptDataError as error:
            if not self._alarmed:
                log.critical("%s; prompts are computed whole from here on, report this", error)
            self._alarmed = True

    def _end(self, handle: int, state: State, reason: str) -> Delta:
        live = self._live.pop(handle)
        del self._handles[live.submit.id]
        self.scheduler.finish(handle, state)
        if self._programs is not None:
            self._programs.ended(live.request, state is State.FINISHED)
        self.pool.free(handle)
        self.engine.remove(handle)
        self.stats.finished[reason] += 1
        return Delta(live.submit.id, finish_reason=reason)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Say why a request waits; None if it is unknown or has ended."""
        handle = self._handles.get(request_id)
        if handle is None:
            return None
        found = self.scheduler.explain(handle)
        behind = self._live.get(found.behind) if found.behind is not None else None
        return {
            "state": found.state,
            "reason": found.reason,
            "behind": behind.submit.id if behind else None,
            "waited_s": self._clock() - found.since,
            "position": found.position,
        }

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the next sequence number and the pool's events from `since` on; see `kv`."""
        events = getattr(self.pool, "events", None)
        return (0, []) if events is None else events(since)

    def kv_snapshot(self) -> tuple[int, list[str]]:
        """Return the sequence number of the next event, and the keys of all shared blocks."""
        snapshot = getattr(self.pool, "snapshot", None)
        return (0, []) if snapshot is None else snapshot()

    def snapshot(self) -> dict[str, Any]:
        """Return counters and gauges as plain values; any thread may call it."""
        stats, pool = self.stats, self.pool
        live = list(self._live.values())[:20]
        return {
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "kv_blocks": pool.num_blocks,
            "kv_free_blocks": pool.num_free,
            "kv_block_size": pool.block_size,
            "kv": flatten(pool.stats()) if isinstance(pool, ServingPool) else {},
            "hidden_bytes": self.engine.hidden_bytes,
            "steps": stats.steps,
            "step_errors": stats.step_errors,
            "preemptions": stats.preemptions,
            "swaps": stats.swaps,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "generated_tokens": stats.generated_tokens,
            "expert_bytes": stats.expert_bytes,
            "degraded_tokens": stats.degraded_tokens,
            "seconds": dict(stats.seconds),
            "finished": dict(stats.finished),
            "waits": dict(self.scheduler.waits),
            "policy": self.scheduler.policy.name,
            "policy_faults": dict(self.scheduler.faults),
            "failing": self.scheduler.failing,
            "experts": self.expert_tokens.tolist(),
            "expert_memory": _flat(self.engine.experts.stats()),
            "queue": [
                {
                    "id": each.submit.id,
                    "state": each.request.state.value,
                    "reason": each.request.wait_reason,
                    "tokens": each.request.known,
                }
                for each in live
            ],
            "recent_steps": [list(record) for record in list(self.recent)[-120:]],
        }


def _refused(request_id: str, kind: str, message: str) -> Delta:
    return Delta(request_id, finish_reason="error", error=message, error_kind=kind)


def _logprobs(sampled: ops.SampleResult, row: int, wanted: int) -> TokenLogprobs:
    top = zip(
        sampled.top_ids[row, :wanted].tolist(),
        sampled.top_logprobs[row, :wanted].tolist(),
        strict=True,
    )
    return TokenLogprobs(
        int(sampled.tokens[row]),
        float(sampled.logprobs[row]),
        [pair for pair in top if pair[0] >= 0],
    )


def _flat(stats: dict[str, Any]) -> dict[str, float]:
    """Numbers only; a list becomes one number for each of its places."""
    flat: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, list):
            flat.update({f"{name}_{i}": each for i, each in enumerate(value)})
        elif not isinstance(value, str):
            flat[name] = value
    return flat
