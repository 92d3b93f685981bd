"""Prefix hits: the router beside round robin on Mooncake's conversation trace.

`test_trace` replays all 12,031 requests at block level: a worker is an LRU cache of blocks, and a
request is at work for 30 ms per output token and 50 ms per block that missed. `test_processes`
sends the first 1,000 requests, each 512-token hash block mapped to one block of 16 tokens, at most
120 of them, to two engine processes with the model that ships.

The trace (Qin et al., Mooncake, FAST 2025; Apache-2.0) is read from
``$PYRUNTIME_DATA/llm-traces/mooncake_conversation_trace.jsonl.gz``; without it a seeded imitation
shows that everything runs, and its figures say so.
"""

import asyncio
import gzip
import heapq
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from bench.support import size
from pyruntime.engine.messages import Submit
from pyruntime.engine.process import ProcessClient
from pyruntime.kv import EventLog
from pyruntime.models import shipped
from pyruntime.serve.presence import PresenceMap, as_keys
from pyruntime.serve.router import Load, Router, choose_worker

TRACE = Path(os.environ.get("PYRUNTIME_DATA", "")) / "llm-traces"
TRACE /= "mooncake_conversation_trace.jsonl.gz"


def requests(limit=None):
    """Return (seconds, output length, hash ids) of each request, and where they come from."""
    if TRACE.exists():
        with gzip.open(TRACE, "rt") as lines:
            rows = [json.loads(line) for line in lines][:limit]
        return [(r["timestamp"] / 1e3, r["output_length"], r["hash_ids"]) for r in rows], "mooncake"
    rng = np.random.default_rng(0)
    talks, made, fresh = [[0, i + 1] for i in range(40)], [], 1000
    for second in range(limit or 2000):
        talk = talks[rng.integers(40)]
        talk += range(fresh, fresh := fresh + int(rng.integers(1, 6)))
        made.append((second / 3, 200, list(talk[:200])))
    return made, "imitation"


class Cache:
    """Blocks in least recently used order, and events about them."""

    def __init__(self, capacity):
        self.capacity, self.blocks, self.log = capacity, OrderedDict(), EventLog()

    def serve(self, names):
        """Take a request's blocks in; return how many leading ones were there."""
        hits = next((i for i, name in enumerate(names) if name not in self.blocks), len(names))
        fresh = [name for name in names if name not in self.blocks]
        for name in reversed(names):  # the end of a sequence is the older
            self.blocks[name] = None
            self.blocks.move_to_end(name)
        gone = []
        while len(self.blocks) > self.capacity:
            gone.append(self.blocks.popitem(last=False)[0])
        self.log.add("stored", fresh)
        if gone:
            self.log.add("removed", gone)
        return hits


def replay(trace, policy, workers, capacity):
    """Return hits over blocks, and how uneven the work was (largest over mean)."""
    caches = [Cache(capacity) for _ in range(workers)]
    presence = PresenceMap()
    active, ends, served = [0] * workers, [], [0] * workers
    hits = blocks = 0
    for index, (now, output, ids) in enumerate(trace):
        while ends and ends[0][0] <= now:
            active[heapq.heappop(ends)[1]] -= 1
        names = [f"{(i + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1):016x}" for i in ids]
        if policy == "round_robin":
            worker = index % workers
        else:
            for w, cache in enumerate(caches):
                if not presence.follow(w, *cache.log.since(presence.next_event(w))):
                    presence.rebuild(w, *cache.log.snapshot())
            keys = as_keys(names)
            worker = choose_worker(
                [Load(w, presence.prefix(w, keys), active[w]) for w in range(workers)]
            )
        found = caches[worker].serve(names)
        hits, blocks = hits + found, blocks + len(names)
        served[worker] += len(names) - found
        active[worker] += 1
        heapq.heappush(ends, (now + 0.03 * output + 0.05 * (len(names) - found), worker))
    return hits / blocks, max(served) * workers / max(1, sum(served))


@pytest.mark.parametrize("workers, capacity", [(2, 8192), (8, 2048), (8, 8192)])
def test_trace(benchmark, workers, capacity):
    trace, source = requests(size(benchmark, None, 200))
    result = benchmark.pedantic(
        replay, (trace, "prefix", workers, capacity), rounds=1, iterations=1
    )
    other = replay(trace, "round_robin", workers, capacity)
    one, _ = replay(trace, "round_robin", 1, workers * capacity)  # the same memory in one place
    benchmark.extra_info |= {
        "trace": f"{source}, {len(trace)} requests",
        "hit_rate": round(result[0], 4),
        "round_robin": round(other[0], 4),
        "one_worker_with_all_memory": round(one, 4),
        "largest_over_mean_work": round(result[1], 2),
        "round_robin_largest_over_mean": round(other[1], 2),
        "filter": "cuckoo, 16 bits",
    }


def through_processes(trace, policy, kv_bytes, at_once=4):
    """Serve a trace with two engine processes; return cached over prompt tokens."""
    options = {"kv_bytes": kv_bytes, "max_running": 16}
    router = Router(
        lambda _, ended: ProcessClient(str(shipped()), options, None, ended, threads=1),
        2,
        16,
        policy=policy,
    )
    table = np.random.default_rng(7).integers(300, 1900, (1 << 16, 16))

    async def main():
        gate = asyncio.Semaphore(at_once)

        async def one(index, ids):
            tokens = table[np.array(ids[:120]) % len(table)].reshape(-1).tolist()
            async with gate:
                request = Submit(str(index), tokens, max_tokens=1, ignore_eos=True)
                ends = [delta.finish_reason async for delta in router.submit(request)]
                assert ends[-1] == "length"

        await asyncio.gather(*(one(i, ids) for i, (_, _, ids) in enumerate(trace)))

    try:
        asyncio.run(main())
        stats = router.stats()
        return stats["cached_tokens"] / stats["prompt_tokens"]
    finally:
        router.close()


@pytest.mark.timeout(1800)
def test_processes(benchmark):
    trace, source = requests(size(benchmark, 1000, 24))
    kv_bytes = 512 << 20  # 8,192 blocks each, touched as they are used
    rate = benchmark.pedantic(
        through_processes, (trace, "prefix", kv_bytes), rounds=1, iterations=1
    )
    benchmark.extra_info |= {
        "trace": f"{source}, {len(trace)} requests",
        "hit_rate": round(rate, 4),
        "round_robin": round(through_processes(trace, "round_robin", kv_bytes), 4),
    }
