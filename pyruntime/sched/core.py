"""The scheduler's core: owns every request's state, asks the parts, and makes step plans.

Inputs are events, each with its time: `arrive`, `cancel`, `step_done`, `engine_error`. The clock
comes with the event, so a log of events replays to the same plans. The output is
`schedule(now, pool) -> StepPlan | None`. One thread owns a scheduler.

Failure behaviour: a request that can never fit is rejected on arrival. A head that does not fit may
be passed by at most `MAX_BYPASS` others or for `MAX_BYPASS_S` seconds; then nothing passes until it
fits. A failed plan is retried once as it was, then cut in halves until the poisonous request is
alone, which fails; the others go on. Late or repeated results are ignored by plan id.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError
from pyruntime.sched.compose import Explanation, KvView, Policy
from pyruntime.sched.model import Request, Resources, State
from pyruntime.sched.parts import Fcfs
from pyruntime.sched.plan import Piece, Preempt, StepPlan, make_plan

__all__ = ["Scheduler"]

MAX_BYPASS = 8
MAX_BYPASS_S = 2.0
MAX_POLICY_FAULTS = 10

_WAITING = (State.QUEUED, State.SWAPPED)

log = logging.getLogger(__name__)
T = TypeVar("T")


class Scheduler:
    """Makes step plans for one engine.

    Parameters
    ----------
    resources : Resources
        The engine's limits.
    policy : Policy, optional
        FCFS with chunked prefill by default.
    """

    def __init__(self, resources: Resources, policy: Policy | None = None) -> None:
        self.resources = resources
        self.policy = policy or Policy()
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []
        """In order of admission."""
        self.faults: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._waiting: list[tuple[tuple[float, ...], Request]] = []  # sorted by key
        self._deadlines: list[tuple[float, int]] = []
        self._plan: StepPlan | None = None
        self._next_plan = 0
        self._admitted = 0
        self._failed_once = False
        self._suspects: deque[list[int]] = deque()
        self._errors_in_row = 0

    # Events

    def arrive(self, request: Request, now: float, pool: KvView) -> None:
        """Take a request in.

        `request.max_new` is capped so that prompt and output fit in the model's length and in KV
        memory.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            The prompt is empty, or longer than the model or KV memory allows.
        pyruntime.errors.CapacityError
            The queue is full.
        """
        if request.id in self.requests:
            raise InvalidArgumentError(f"request {request.id} exists already")
        if request.prompt_len < 1 or request.max_new < 1:
            raise InvalidArgumentError("a request needs at least one prompt token and one output")
        if request.prompt_len >= self.resources.max_len:
            raise InvalidArgumentError(
                f"the prompt has {request.prompt_len} tokens; at most "
                f"{self.resources.max_len - 1} fit in the context"
            )
        request.max_new = min(request.max_new, self.resources.max_len - request.prompt_len)
        if not pool.fits(request.prompt_len + 1):
            raise InvalidArgumentError(
                f"the prompt has {request.prompt_len} tokens, which can never fit in KV memory"
            )
        low, high = 1, request.max_new  # the longest output that a lone request can hold
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if pool.fits(request.prompt_len + middle) else (low, middle - 1)
            )
        request.max_new = low
        if len(self._waiting) >= self.resources.max_queued:
            raise CapacityError(f"{len(self._waiting)} requests wait already; try again later")
        request.known = request.prompt_len
        request.arrival = request.wait_since = now
        self.requests[request.id] = request
        self._enqueue(request, "queue")
        if request.deadline < math.inf:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def cancel(self, request_id: int, state: State = State.CANCELLED) -> Request | None:
        """End a request in any state; a result in flight for it is dropped. None if unknown."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self._end(request, state)
        return request

    def expired(self, now: float) -> list[int]:
        """Return requests whose deadline has passed."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request_id = heapq.heappop(self._deadlines)[1]
            if request_id in self.requests:
                late.append(request_id)
        return late

    def step_done(self, plan: StepPlan, sampled: Iterable[int]) -> None:
        """Account for a finished plan.

        Parameters
        ----------
        plan : StepPlan
            The plan that ran to its end.
        sampled : iterable of int
            Requests that got a token. Whether they are finished is the caller's to say, with
            `finish`.
        """
        if self._plan is None or plan.id != self._plan.id:
            return
        self._plan = None
        self._failed_once = False
        self._errors_in_row = 0
        if self._suspects:
            self._suspects.popleft()
        layers = self.resources.num_layers
        charge = self.policy.fairness.charge if self.policy.fairness else None
        for request_id in plan.decode.tolist():
            if request := self.requests.get(request_id):
                request.computed = request.known
                if charge:
                    charge(request.tenant, 0, 1)
        for request_id, low, high, _, layer_hi in plan.prefill.tolist():
            if request := self.requests.get(request_id):
                request.swapped = False
                if layer_hi < layers:
                    request.layer_done, request.slice_hi = layer_hi, high
                else:
                    request.computed, request.layer_done = high, 0
                    if charge:
                        charge(request.tenant, high - low, 0)
        for request_id in sampled:
            if request := self.requests.get(request_id):
                request.known += 1
                request.state = State.DECODE

    def finish(self, request_id: int, state: State = State.FINISHED) -> None:
        """End a request that has got its last token or has failed."""
        if request := self.requests.get(request_id):
            self._end(request, state)

    def plan_dropped(self, plan: StepPlan) -> None:
        """Account for a plan that was stopped and will not be resumed; nothing of it counts."""
        if self._plan is not None and plan.id == self._plan.id:
            self._plan = None

    def engine_error(self, plan: StepPlan) -> int | None:
        """Account for a plan that raised; nothing of it counts.

        Returns
        -------
        int or None
            The request that is to blame and has been ended as failed, once it is known.
        """
        if self._plan is None or plan.id != self._plan.id:
            return None
        self._plan = None
        self._errors_in_row += 1
        blamed = [i for i in plan.requests() if i in self.requests]
        if not self._failed_once and not self._suspects:
            self._failed_once = True
            return None
        self._failed_once = False
        if self._suspects:
            self._suspects.popleft()
        if len(blamed) == 1:
            self._end(self.requests[blamed[0]], State.FAILED)
            return blamed[0]
        half = len(blamed) // 2
        for group in (blamed[half:], blamed[:half]):
            if group:
                self._suspects.appendleft(group)
        return None

    # The plan

    def schedule(self, now: float, pool: KvView) -> StepPlan | None:
        """Make the next plan, or None when there is nothing to do.

        The plan must be answered with `step_done` or `engine_error` before the next call.
        """
        if self._plan is not None:
            raise InvalidArgumentError(f"plan {self._plan.id} has not been answered")
        preempted: list[tuple[int, int]] = []
        while True:
            only = self._isolated()
            decode, pieces, grow = self._attempt(now, pool, only, preempted)
            if decode or pieces:
                break
            if only is not None:  # preempted meanwhile: nothing to learn from this group now
                self._suspects.popleft()
            elif len(self.running) > 1:  # memory is full of half-done prompts
                self._preempt_one(pool, preempted)
            else:
                break
        if not decode and not pieces and not preempted:
            return None
        self._next_plan += 1
        self._plan = make_plan(
            self._next_plan,
            [r.id for r in decode],
            pieces,
            grow,
            preempted,
            bool(pieces),
            [request_id for request_id, mode in preempted if mode == Preempt.SWAP],
            [piece[0] for piece in pieces if self.requests[piece[0]].swapped],
        )
        return self._plan

    def explain(self, request_id: int) -> Explanation:
        """Say why a request waits, and since when.

        Raises
        ------
        pyruntime.errors.NotFoundError
            The request is unknown or has ended.
        """
        request = self.requests.get(request_id)
        if request is None:
            raise NotFoundError(f"request {request_id} is unknown or has ended")
        if request.state not in _WAITING:
            return Explanation(request.state.value, "running", None, request.wait_since, -1)
        position = next(i for i, (_, r) in enumerate(self._waiting) if r is request)
        if position and not request.wait_reason:
            ahead = self._waiting[position - 1][1].id
            return Explanation(request.state.value, "behind", ahead, request.wait_since, position)
        reason = request.wait_reason or "budget"
        return Explanation(request.state.value, reason, None, request.wait_since, position)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def failing(self) -> bool:
        """Whether step after step has failed, so that new work should go elsewhere."""
        return self._errors_in_row >= 8

    # Parts of the plan

    def _isolated(self) -> set[int] | None:
        """Return the requests a search for a poisonous one is restricted to, None without one."""
        while self._suspects:
            if alive := {i for i in self._suspects[0] if i in self.requests}:
                return alive
            self._suspects.popleft()
        return None

    def _attempt(
        self, now: float, pool: KvView, only: set[int] | None, preempted: list[tuple[int, int]]
    ) -> tuple[list[Request], list[Piece], list[tuple[int, int]]]:
        """Return decodes, pieces, and what each request then holds."""
        while True:
            eligible = [r for r in self.running if only is None or r.id in only]
            decode = [r for r in eligible if r.state is State.DECODE]
            grow = [(r.id, r.known) for r in decode]
            left = pool.dry_run(grow, [request_id for request_id, _ in preempted])
            if left >= 0 or len(self.running) < 2:
                break
            self._preempt_one(pool, preempted)
        prefilling = [r for r in eligible if r.state is State.PREFILL]
        closed = bool(preempted) or only is not None
        kept: list[Piece] = []
        pieces = self._pieces(now, pool, decode, prefilling, left, closed)
        if pieces:  # requests that were started may have taken blocks from the cache
            left = pool.dry_run(grow, [request_id for request_id, _ in preempted])
        for piece in pieces:
            request_id, low, high, layer_lo, layer_hi = piece
            if layer_lo == 0:  # later slices of a layered prefill hold their memory already
                need = pool.need(request_id, high)
                if need > left and layer_hi == self.resources.num_layers:
                    high -= (need - left) * pool.block_size  # a chunk takes what is left
                    need = pool.need(request_id, high)
                if high <= low or need > left:
                    continue
                left -= need
            grow.append((request_id, high))
            kept.append((request_id, low, high, layer_lo, layer_hi))
        return decode, kept, grow

    def _preempt_one(self, pool: KvView, preempted: list[tuple[int, int]]) -> None:
        victim = self._ask("preemption", lambda: self.policy.preemption.victim(self.running))
        if victim not in self.running:
            self.faults["preemption"] += 1
            victim = self.running[-1]
        mode = getattr(self.policy.preemption, "mode", Preempt.RECOMPUTE)
        victim.swapped = mode is Preempt.SWAP and not preempted and pool.can_swap(victim.id)
        self.running.remove(victim)
        victim.layer_done = victim.slice_hi = 0
        if not victim.swapped:
            victim.computed = victim.cached_len = 0
        victim.num_preempted += 1
        self._enqueue(victim, "swapped" if victim.swapped else "preempted")
        preempted.append((victim.id, int(Preempt.SWAP if victim.swapped else Preempt.RECOMPUTE)))

    def _pieces(
        self,
        now: float,
        pool: KvView,
        decode: list[Request],
        prefilling: list[Request],
        left: int,
        closed: bool,
    ) -> list[Piece]:
        """Ask the partition; `closed` keeps the queue shut.

        It is shut when something was preempted in this step, which must not come back at once, and
        in the search for a poisonous request.
        """
        # Prefills in progress were admitted with their whole prompt in mind: keep that free.
        free = left - sum(pool.need(r.id, r.known + 1) for r in prefilling if not r.layer_done)
        if self.policy.batching and self._waiting and not closed:
            oldest = now - min(r.arrival for _, r in self._waiting)
            if not self.policy.batching.ready(len(self._waiting), oldest):
                closed = True
                self._mark("window")

        def take(tokens: int) -> Request | None:
            nonlocal free
            if closed or tokens < 1:
                return None
            request = self._admit(now, pool, free)
            if request is not None:
                free -= pool.need(request.id, request.known + 1)  # as if nothing were cached
                if not request.swapped:
                    request.computed = request.cached_len = pool.start(request.id)
            return request

        pieces = self._ask(
            "partition",
            lambda: self.policy.partition.cut(prefilling, len(decode), self.resources, take),
        )
        known = {r.id: r for r in self.running if r.state is State.PREFILL}
        good = [
            piece
            for piece in pieces
            if (r := known.pop(piece[0], None)) is not None  # popped: one piece per request
            and r.computed == piece[1] < piece[2] <= r.known
            and r.layer_done == piece[3] < piece[4] <= self.resources.num_layers
        ]
        self.faults["partition"] += len(pieces) - len(good)
        return good

    def _admit(self, now: float, pool: KvView, free: int) -> Request | None:
        if len(self.running) >= self.resources.max_running:
            self._mark("max_running")
            return None
        tenants = {r.tenant for _, r in self._waiting} if self.policy.fairness else None
        fairness = self.policy.fairness
        turn = fairness.pick(sorted(tenants)) if fairness and tenants else None
        for index, (_, request) in enumerate(self._waiting):
            if turn is not None and request.tenant != turn:
                request.wait_reason = "tenant_turn"
                continue
            refusal = self._ask("admission", partial(self._refuse, request, free * pool.block_size))
            if not refusal and pool.need(request.id, request.known + 1) <= free:
                del self._waiting[index]
                for _, passed in self._waiting[:index]:
                    passed.bypassed += 1
                request.state = State.PREFILL
                request.wait_reason, request.unfit_since = "", math.inf
                self._admitted += 1
                request.order = self._admitted
                self.running.append(request)
                return request
            request.wait_reason = refusal or "kv_full"
            self.waits[request.wait_reason] += 1
            request.unfit_since = min(request.unfit_since, now)
            if request.bypassed >= MAX_BYPASS or now - request.unfit_since >= MAX_BYPASS_S:
                return None  # drain until it fits
            if index >= MAX_BYPASS:
                return None
        return None

    def _refuse(self, request: Request, free_tokens: int) -> str:
        return self.policy.admission.refuse(request, self.running, free_tokens)

    def _mark(self, reason: str) -> None:
        if self._waiting:
            self._waiting[0][1].wait_reason = reason
            self.waits[reason] += 1

    def _enqueue(self, request: Request, reason: str) -> None:
        request.state = State.SWAPPED if reason == "swapped" else State.QUEUED
        request.wait_reason = "" if reason == "queue" else reason
        key = self._ask("ordering", lambda: self.policy.ordering.key(request))
        if any(math.isnan(part) for part in key):
            self.faults["ordering"] += 1
            key = Fcfs().key(request)
        low, high = 0, len(self._waiting)
        while low < high:
            middle = (low + high) // 2
            if self._waiting[middle][0] <= key:
                low = middle + 1
            else:
                high = middle
        self._waiting.insert(low, (key, request))

    def _end(self, request: Request, state: State) -> None:
        if request.state in _WAITING:
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
        elif request in self.running:
            self.running.remove(request)
        request.state = state
        del self.requests[request.id]

    def _ask(self, part: str, question: Callable[[], T]) -> T:
        """Ask a part of the policy; where it raises, the part's default decides instead."""
        try:
            return question()
        except Exception:
            broken, default = getattr(self.policy, part), getattr(Policy(), part)
            if type(broken) is type(default):
                raise
            self.faults[part] += 1
            log.exception("policy part %r failed; its default decides", part)
            setattr(self.policy, part, default)
            try:
                return question()
            finally:
                if self.faults[part] < MAX_POLICY_FAULTS:
                    setattr(self.policy, part, broken)
