"""Several engines behind one client: a request goes where most of its prefix lies already.

The router is an `EngineClient` over others, so a server does not know whether it speaks to one
engine or to many. It follows each worker's KV events into a `PresenceMap`, and sends a request to
the worker with the longest prefix; among equals to the one with the least work. A worker that has
`max_lead` more requests than the idlest is passed over: a popular prefix must not pile everything
onto one.

Failure: a worker that dies is started anew, in growing intervals, and nothing is known of its
memory until it says so. Its requests of which no token has been delivered go to another worker;
the others end with error kind "lost". With no worker alive `submit` raises `ClosedError`, and the
server is not healthy.

Threads: `submit` and `abort` belong to one event loop; the rest may be called by any thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pyruntime.engine.client import EngineClient
from pyruntime.engine.messages import Delta, Submit
from pyruntime.errors import ClosedError
from pyruntime.kv import block_keys
from pyruntime.serve.presence import FilterSet, Keys, MemberSet, PresenceMap, as_keys

__all__ = ["Load", "Router", "choose_worker"]

log = logging.getLogger(__name__)
RETRY_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SUMMED = (
    "running",
    "waiting",
    "kv_blocks",
    "kv_free_blocks",
    "hidden_bytes",
    "steps",
    "step_errors",
    "preemptions",
    "swaps",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "expert_bytes",
    "degraded_tokens",
)
Connect = Callable[[int, Callable[[], None]], EngineClient]


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a worker when a request arrives."""

    worker: int
    prefix: int
    """Leading blocks of the request that it seems to hold."""
    active: int
    """Requests it has and has not finished."""


def choose_worker(loads: Sequence[Load], max_lead: int = 8) -> int:
    """Return the worker for a request: longest prefix, then least loaded, then the first.

    Those with `max_lead` more requests than the least loaded are passed over.
    """
    least = min(load.active for load in loads)
    open_ = [load for load in loads if load.active < least + max_lead]
    return max(open_, key=lambda load: (load.prefix, -load.active, -load.worker)).worker


@dataclass(slots=True)
class _Worker:
    client: EngineClient | None = None
    life: int = 0
    """Names the client in the presence map: memory of one life says nothing about the next."""
    active: int = 0
    restarts: int = 0
    routed: int = 0
    hit_blocks: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Router:
    """Routes requests to workers.

    Parameters
    ----------
    connect : callable
        ``connect(i, ended)`` makes the client of worker `i`, which calls `ended` when its engine
        dies. It may take long, and runs on a thread of its own when a worker is started anew.
    num_workers : int
    block_size : int
        Of the workers' pools.
    make_filter : callable, optional
        Makes the filter of a worker's blocks for a capacity; a cuckoo filter by default.
    max_lead : int, default 8
        See `choose_worker`.
    policy : {"prefix", "round_robin"}
        The second is for comparison.
    """

    def __init__(
        self,
        connect: Connect,
        num_workers: int,
        block_size: int,
        make_filter: Callable[[int], MemberSet] = FilterSet,
        max_lead: int = 8,
        policy: str = "prefix",
    ) -> None:
        self._connect = connect
        self._block_size = block_size
        self._max_lead = max_lead
        self._policy = policy
        self.presence = PresenceMap(make_filter)
        self._workers = [_Worker() for _ in range(num_workers)]
        self._turn = itertools.count()
        self._lives = itertools.count(1)
        self._place: dict[str, int] = {}
        self._aborted: set[str] = set()
        self._refusing = ""
        self._closing = threading.Event()
        self._restarts: list[threading.Thread] = []
        self.lost = 0
        self.rerouted = 0
        try:
            for index, worker in enumerate(self._workers):
                self._install(worker, connect(index, partial(self._ended, index)))
        except BaseException:
            self.close()
            raise

    def _install(self, worker: _Worker, client: EngineClient) -> None:
        worker.life = next(self._lives)
        worker.client = client

    # Requests

    async def submit(self, request: Submit) -> AsyncGenerator[Delta, None]:
        """See `EngineClient`; a request that is lost before its first token is sent elsewhere.

        Raises
        ------
        pyruntime.errors.ClosedError
            The router is closed or draining, or no worker is alive.
        """
        if self._refusing:
            raise ClosedError(self._refusing)
        accepted, avoid = False, set[int]()  # lives that have lost it
        while True:
            try:
                index, client = await self._next(request, avoid)
            except ClosedError as error:
                if not accepted:
                    raise
                self.lost += 1
                yield Delta(request.id, [], None, "error", str(error), "lost")
                return
            worker = self._workers[index]
            avoid.add(worker.life)
            worker.active += 1
            self._place[request.id] = index
            again = begun = False
            try:
                async with aclosing(client.submit(request)) as deltas:
                    async for delta in deltas:
                        lost = delta.error_kind == "lost"
                        if lost and not begun and request.id not in self._aborted:
                            again = True
                            break
                        self.lost += lost
                        begun = begun or bool(delta.tokens)
                        if accepted and not (delta.tokens or delta.finish_reason):
                            continue  # a second acceptance is not news
                        accepted = True
                        yield delta
            except ClosedError:
                if self._refusing and not accepted:
                    raise
                if worker.client is client and not self._refusing:
                    self._ended(index)  # it died before its end was heard of
                again = True
            finally:
                worker.active -= 1
                self._place.pop(request.id, None)
                if not again:
                    self._aborted.discard(request.id)
            if not again:
                return
            self.rerouted += 1
            log.warning("request sent to another worker", extra={"fields": {"id": request.id}})

    async def _next(self, request: Submit, avoid: set[int]) -> tuple[int, EngineClient]:
        alive = [
            i
            for i, worker in enumerate(self._workers)
            if worker.client is not None and worker.life not in avoid
        ]
        if not alive:
            raise ClosedError("no engine is alive; one is being started")
        if self._policy == "round_robin":
            index = alive[next(self._turn) % len(alive)]
            prefix = 0
        else:
            for each in alive:
                await self._catch_up(each)
            keys = self._keys(request)
            loads = [
                Load(i, self.presence.prefix(self._workers[i].life, keys), self._workers[i].active)
                for i in alive
                if self._workers[i].client is not None
            ]
            if not loads:
                raise ClosedError("no engine is alive; one is being started")
            index = choose_worker(loads, self._max_lead)
            prefix = next(load.prefix for load in loads if load.worker == index)
        worker = self._workers[index]
        client = worker.client
        if client is None:
            raise ClosedError("the engine has just ended; it is being started")
        worker.routed += 1
        worker.hit_blocks += prefix
        return index, client

    def _keys(self, request: Submit) -> Keys:
        try:
            tokens = np.array(request.tokens, np.int32)
        except OverflowError:  # the worker will refuse it
            tokens = np.empty(0, np.int32)
        return as_keys(block_keys(tokens, self._block_size, request.tenant.encode()))

    async def _catch_up(self, index: int) -> None:
        worker = self._workers[index]
        client, life = worker.client, worker.life
        if client is None:
            return
        if not self.presence.follow(life, *client.kv_events(self.presence.next_event(life))):
            self.presence.rebuild(life, *await asyncio.to_thread(client.kv_snapshot))
        if worker.life != life:
            self.presence.forget(life)

    def abort(self, request_id: str) -> None:
        """See `EngineClient`."""
        index = self._place.get(request_id)
        client = None if index is None else self._workers[index].client
        if index is not None:
            self._aborted.add(request_id)
        if client is not None:
            client.abort(request_id)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """See `EngineClient`."""
        index = self._place.get(request_id)
        client = None if index is None else self._workers[index].client
        found = None if client is None else client.explain(request_id)
        return None if found is None else {**found, "worker": index}

    def kv_events(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """See `EngineClient`; a router holds no blocks of its own."""
        return 0, []

    def kv_snapshot(self) -> tuple[int, list[str]]:
        """See `EngineClient`; a router holds no blocks of its own."""
        return 0, []

    def stats(self) -> dict[str, Any]:
        """See `EngineClient`: sums over the workers, and ``workers`` with each one's part."""
        clients = [worker.client for worker in self._workers]
        parts = [None if client is None else client.stats() for client in clients]
        known = [part for part in parts if part is not None]
        merged: dict[str, Any] = {name: sum(p[name] for p in known) for name in SUMMED}
        for name in ("seconds", "finished", "waits", "policy_faults", "expert_memory", "kv"):
            merged[name] = _sum(part[name] for part in known)
        merged["kv_block_size"] = self._block_size
        merged["policy"] = known[0]["policy"] if known else ""
        merged["failing"] = not known or all(part["failing"] for part in known)
        merged["experts"] = (
            np.sum([part["experts"] for part in known], axis=0).tolist() if known else []
        )
        merged["queue"] = [entry for part in known for entry in part["queue"]][:40]
        merged["recent_steps"] = [step for part in known for step in part["recent_steps"][-40:]]
        merged["lost"], merged["rerouted"] = self.lost, self.rerouted
        merged["presence_rebuilds"] = self.presence.rebuilds
        merged["workers"] = [
            {
                "alive": part is not None,
                "active": worker.active,
                "routed": worker.routed,
                "hit_blocks": worker.hit_blocks,
                "restarts": worker.restarts,
                "prompt_tokens": part["prompt_tokens"] if part else 0,
                "cached_tokens": part["cached_tokens"] if part else 0,
            }
            for worker, part in zip(self._workers, parts, strict=True)
        ]
        return merged

    # Lives of workers

    def _ended(self, index: int) -> None:
        worker = self._workers[index]
        with worker.lock:
            client, worker.client = worker.client, None
            if client is None or self._closing.is_set():
                return
            life, worker.life = worker.life, 0
        self.presence.forget(life)
        thread = threading.Thread(target=self._restart, args=(index, client), daemon=True)
        self._restarts.append(thread)
        thread.start()

    def _restart(self, index: int, dead: EngineClient) -> None:
        dead.close()
        worker = self._workers[index]
        for attempt in itertools.count():
            if self._closing.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)]):
                return
            try:
                client = self._connect(index, partial(self._ended, index))
            except Exception:
                log.exception("worker %d could not be started", index)
                continue
            with worker.lock:
                if not self._closing.is_set():
                    worker.restarts += 1
                    self._install(worker, client)
                    log.warning("a worker was started anew", extra={"fields": {"worker": index}})
                    return
            client.close()
            return

    async def drain(self, timeout_s: float) -> bool:
        """See `EngineClient`."""
        self._refusing = self._refusing or "the engines take no new requests"
        clients = [worker.client for worker in self._workers if worker.client is not None]
        ended = await asyncio.gather(*(client.drain(timeout_s) for client in clients))
        return all(ended)

    def close(self) -> None:
        """See `EngineClient`."""
        self._refusing = self._refusing or "the router is closed"
        self._closing.set()
        for worker in self._workers:
            with worker.lock:
                client, worker.client = worker.client, None
            if client is not None:
                client.close()
        for thread in self._restarts:
            thread.join(30)


def _sum(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total
