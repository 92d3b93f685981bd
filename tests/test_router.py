"""The router: where requests go, what it believes, and what happens when workers die."""

import asyncio
import json
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest

from pyruntime import errors
from pyruntime.engine.client import ThreadClient
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Delta, Submit
from pyruntime.kv import EventLog, block_keys, serving
from pyruntime.models import shipped
from pyruntime.serve.presence import ExactSet, FilterSet, PresenceMap, as_keys
from pyruntime.serve.router import Load, Router, choose_worker
from tests.serving import Server

DEADLINE_S = 60


def test_the_longest_prefix_wins_until_a_worker_is_far_ahead():
    assert choose_worker([Load(0, 2, 5), Load(1, 3, 7)]) == 1
    assert choose_worker([Load(0, 3, 5), Load(1, 3, 4)]) == 1  # equal: less work
    assert choose_worker([Load(0, 0, 0), Load(1, 0, 0)]) == 0
    assert choose_worker([Load(0, 9, 8), Load(1, 0, 0)]) == 1  # eight more than the idlest
    assert choose_worker([Load(0, 9, 7), Load(1, 0, 0)]) == 0


def test_presence_follows_events_and_asks_for_a_snapshot_when_some_are_lost():
    log, presence = EventLog(capacity=4), PresenceMap()
    names = block_keys(np.arange(160, dtype=np.int32), 16)
    keys = as_keys(names)
    assert presence.prefix(0, keys) == 0
    log.add("stored", names[:6])
    assert presence.follow(0, *log.since(presence.next_event(0)))
    assert presence.prefix(0, keys) == 6
    log.add("removed", names[3:4], reason="capacity")
    assert presence.follow(0, *log.since(presence.next_event(0)))
    assert presence.prefix(0, keys) == 3 and presence.prefix(1, keys) == 0
    for _ in range(20):  # more than the log keeps
        log.add("removed", names[5:6], reason="capacity")
        log.add("stored", names[5:])
    log.add("stored", names[3:4])
    assert not presence.follow(0, *log.since(presence.next_event(0)))
    presence.rebuild(0, *log.snapshot())
    assert presence.prefix(0, keys) == 10
    log.add("cleared")
    assert presence.follow(0, *log.since(presence.next_event(0)))
    assert presence.prefix(0, keys) == 0
    presence.forget(0)
    assert presence.next_event(0) == 0


@pytest.mark.parametrize("kind", [ExactSet, FilterSet])
def test_a_filter_is_rebuilt_larger_when_it_is_full(kind):
    log, presence = EventLog(capacity=1 << 20), PresenceMap(kind)
    keys = [f"{i * 0x9E3779B97F4A7C15 & (2**64 - 1):016x}" for i in range(60_000)]
    rebuilt = 0
    for at in range(0, len(keys), 5000):
        log.add("stored", keys[at : at + 5000])
        if not presence.follow(0, *log.since(presence.next_event(0))):
            presence.rebuild(0, *log.snapshot())
            rebuilt += 1
        assert presence.prefix(0, as_keys(keys)) >= at + 5000  # nothing that is there is missed
    assert rebuilt == (2 if kind is FilterSet else 0)
    log.add("removed", [*keys[:5], *keys[:5]])  # the second time they are not there
    assert presence.follow(0, *log.since(presence.next_event(0)))
    assert presence.prefix(0, as_keys(keys)) < 5
    assert presence.prefix(0, as_keys(keys[5:])) == len(keys) - 5


class Workers:
    """Engine threads behind a router; they share one set of weights' worth of patience."""

    def __init__(self, count=2, **options):
        self.clients = {}
        self.router = Router(self.connect, count, 16, **options)

    def connect(self, index, ended):
        self.clients[index] = ThreadClient(make_loop(shipped(), max_running=4))
        return self.clients[index]


def conversation(seed, turns=3, size=48):
    tokens = np.random.default_rng(seed).integers(300, 1900, turns * size).tolist()
    return [tokens[: size * (turn + 1)] for turn in range(turns)]


async def serve(router, request):
    deltas = [delta async for delta in router.submit(request)]
    assert deltas[-1].finish_reason == "length", deltas[-1]
    return [token for delta in deltas for token in delta.tokens]


def replay(router):
    """Interleave four conversations; return the texts in order."""

    async def main():
        texts = []
        turns = [conversation(seed) for seed in range(4)]
        for turn in range(3):
            for seed in (2, 0, 3, 1) if turn % 2 else (0, 1, 2, 3):
                request = Submit(f"{turn}-{seed}", turns[seed][turn], ignore_eos=True, max_tokens=4)
                texts.append((turn, seed, await serve(router, request)))
        return sorted(texts)

    return asyncio.run(main())


class Liar(ExactSet):
    """The worst filter there is: everything seems to be everywhere."""

    def contains(self, keys):
        return np.ones(len(keys), bool)


def test_conversations_stay_where_their_prefix_is():
    results, cached = [], []
    for options in ({}, {"policy": "round_robin"}, {"make_filter": Liar}):
        workers = Workers(**options)
        try:
            results.append(replay(workers.router))
            stats = workers.router.stats()
            cached.append(stats["cached_tokens"])
            assert stats["kv_free_blocks"] == stats["kv_blocks"]
            assert sum(worker["routed"] for worker in stats["workers"]) == 12
        finally:
            workers.router.close()
    assert results[0] == results[1] == results[2]  # where a request runs changes no token
    assert cached[0] == 4 * (48 + 96)  # each turn finds the turns before
    assert cached[1] < cached[0]


def test_a_router_that_lost_events_rebuilds_from_a_snapshot(monkeypatch):
    monkeypatch.setattr(serving, "EVENTS", 2)  # of more blocks than are published at once
    workers = Workers()
    try:
        replay(workers.router)
        stats = workers.router.stats()
        assert stats["presence_rebuilds"] > 0 and stats["cached_tokens"] == 4 * (48 + 96)
    finally:
        workers.router.close()


class Scripted:
    """A client that plays a list of deltas, or dies."""

    def __init__(self, script):
        self.script = list(script)
        self.seen = []
        self.closed = False

    async def submit(self, request):
        self.seen.append(request.id)
        step = self.script.pop(0)
        if step == "dead":
            raise errors.ClosedError("dead")
        for delta in step:
            yield Delta(request.id, *delta)

    def abort(self, request_id):
        self.seen.append(f"abort {request_id}")

    def stats(self):
        raise AssertionError("not asked")

    def explain(self, request_id):
        return {"state": "decode"}

    def kv_events(self, since):
        return 0, []

    def kv_snapshot(self):
        return 0, []

    async def drain(self, timeout_s):
        return True

    def close(self):
        self.closed = True


ACCEPTED, TOKEN, DONE = (), ([7],), ([8], None, "length")
LOST = ([], None, "error", "gone", "lost")


def scripted(*scripts):
    clients = [Scripted(script) for script in scripts]
    made = []

    def connect(index, ended):
        made.append(index)
        return clients[index] if made.count(index) == 1 else Scripted([[ACCEPTED, DONE]] * 9)

    return Router(connect, len(scripts), 16), clients


def kinds(router, request_id="a"):
    async def main():
        return [
            (delta.tokens, delta.finish_reason, delta.error_kind)
            async for delta in router.submit(Submit(request_id, [1, 2, 3]))
        ]

    return asyncio.run(main())


@pytest.mark.parametrize("first", [[[ACCEPTED, LOST]], [[LOST]], ["dead"]])
def test_a_request_without_tokens_goes_to_another_worker(first):
    router, clients = scripted(first, [[ACCEPTED, TOKEN, DONE]])
    router._restart = lambda index, dead: None  # or the new one may be first
    assert kinds(router) == [([], None, ""), ([7], None, ""), ([8], "length", "")]
    assert router.rerouted == 1 and router.lost == 0 and clients[1].seen == ["a"]
    router.close()
    assert clients[1].closed


def test_a_request_with_tokens_ends_with_a_typed_error():
    router, _ = scripted([[ACCEPTED, TOKEN, LOST]], [])
    assert kinds(router)[-1] == ([], "error", "lost")
    assert router.lost == 1 and router.rerouted == 0
    router.close()


def test_a_request_that_no_worker_can_keep_ends():
    router, _ = scripted([[ACCEPTED, LOST]] * 9)
    assert kinds(router) == [([], None, ""), ([], "error", "lost")]
    router.close()
    with pytest.raises(errors.ClosedError):
        kinds(router)


def test_a_dead_worker_is_started_anew():
    router, clients = scripted(["dead"], [[ACCEPTED, DONE]] * 9)
    assert kinds(router)[-1][1] == "length"
    for thread in router._restarts:
        thread.join(DEADLINE_S)
    assert clients[0].closed and router._workers[0].restarts == 1
    assert kinds(router)[-1][1] == "length"
    router.close()


def test_workers_that_cannot_start_close_the_others():
    clients = []

    def connect(index, ended):
        if index == 1:
            raise errors.NotFoundError("no model")
        clients.append(Scripted([]))
        return clients[-1]

    with pytest.raises(errors.NotFoundError):
        Router(connect, 2, 16)
    assert clients[0].closed


def until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {DEADLINE_S} s: {what}")


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


@pytest.mark.slow
def test_two_workers_serve_and_one_is_killed_in_mid_stream():
    server = Server("--workers", 2, "--grace-s", 20)
    url = f"{server.url}/v1/completions"
    try:
        prompt = conversation(1)[2]
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        first = httpx.post(url, json=body, timeout=DEADLINE_S).json()
        second = httpx.post(url, json=body, timeout=DEADLINE_S).json()
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
        workers = [p for p in children(server.process.pid) if b"worker" in cmdline(p)]
        assert len(workers) == 2
        ends, begun = {}, threading.Barrier(5)

        def follow(index):
            long = {"prompt": [5 + index] * 20, "max_tokens": 700, "ignore_eos": True}
            lines = []
            with httpx.stream(
                "POST", url, json={**long, "stream": True}, timeout=DEADLINE_S
            ) as stream:
                for line in stream.iter_lines():
                    lines += [line.removeprefix("data: ")] if line else []
                    if line and len(lines) == 1:
                        begun.wait(DEADLINE_S)
            ends[index] = lines[-1]

        threads = [threading.Thread(target=follow, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(DEADLINE_S)
        os.kill(workers[0], signal.SIGKILL)
        for thread in threads:
            thread.join(2 * DEADLINE_S)
        # Those of the dead worker end with an error, the others as if nothing had happened.
        errors_ = [json.loads(end)["error"] for end in ends.values() if "error" in end]
        assert len(ends) == 4 and 0 < len(errors_) < 4
        assert all(error["code"] == 503 for error in errors_)
        assert sum(end == "[DONE]" for end in ends.values()) == 4 - len(errors_)
        until(lambda: server.status()["workers"][0]["alive"], "the worker is back")
        until(lambda: server.status()["workers"][1]["alive"], "the other one too")
        status = server.status()
        assert sum(worker["restarts"] for worker in status["workers"]) == 1
        assert status["lost"] == len(errors_) and not status["failing"]
        again = httpx.post(url, json=body, timeout=DEADLINE_S).json()
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        until(lambda: (s := server.status())["kv_free_blocks"] == s["kv_blocks"], "no block leaked")
        assert httpx.get(f"{server.url}/health").status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'pyruntime_serve_worker_alive{worker="1"} 1.0' in metrics
        assert "pyruntime_engine_cached_tokens_total" in metrics
        assert server.stop() == 0
        for pid in workers:
            until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "workers end")
    finally:
        server.process.kill()


def cmdline(pid):
    return open(f"/proc/{pid}/cmdline", "rb").read()
