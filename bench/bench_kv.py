"""The KV block pool beside vLLM's KV cache manager and SGLang's radix trees.

`PYRUNTIME_VLLM_PYTHON` and `PYRUNTIME_SGLANG_PYTHON` name interpreters that have them; each runs in
a process of its own, in rounds that alternate with ours, and medians over all rounds are compared.
Without them our figures are alone, and say so. Calls are made from Python, with all its costs, on
both sides; SGLang's Rust tree is called through its own binding, without its Python adapter.

Hit rates are of Mooncake's conversation trace (Qin et al., FAST 2025; Apache-2.0) in
``$PYRUNTIME_DATA/llm-traces``; without it, of seeded talks, and the figures say so.
"""

import gzip
import heapq
import json
import os
import random
import subprocess
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from bench import kv_rows
from bench.support import size
from pyruntime.kv import Admission, BlockPool, Retention, plan_prefixes

HERE = Path(__file__).parent
PYTHONS = {name: os.environ.get(f"PYRUNTIME_{name.upper()}_PYTHON") for name in ("vllm", "sglang")}
TRACE = Path(os.environ.get("PYRUNTIME_DATA", "")) / "llm-traces"
TRACE /= "mooncake_conversation_trace.jsonl.gz"


class Peer:
    """A peer in a process of its own, answering one JSON line per row."""

    def __init__(self, name):
        self.process = subprocess.Popen(
            [PYTHONS[name], str(HERE / "peers" / f"{name}_kv.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = json.loads(self.process.stdout.readline())

    def seconds(self, row, **arguments):
        self.process.stdin.write(json.dumps({"row": row, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def peers():
    """Peers that are there, by name: ``vllm``, ``sglang``."""
    there = {name: Peer(name) for name, python in PYTHONS.items() if python}
    yield there
    for peer in there.values():
        peer.close()


def us(seconds):
    return float(f"{1e6 * float(np.median(seconds)):.3g}")


# name, our row and its arguments, theirs: (peer, row, arguments, ratio aimed at).
DECODE = {"rows": 256, "steps": 40}
TABLE = [
    ("decode step, 256 sequences", "decode", DECODE, [("vllm", "decode", DECODE, 100)]),
    (
        "admission of 2048 new tokens",
        "cold",
        {"count": 10},
        [
            ("vllm", "cold", {"count": 3}, 20),
            ("sglang", "cold", {"tree": "rust", "count": 10}, 1.5),
            ("sglang", "cold", {"tree": "python", "count": 10}, None),
        ],
    ),
    (
        "lookup of 2048 known tokens",
        "lookup",
        {"count": 50},
        [
            ("vllm", "lookup", {"count": 10}, None),
            ("sglang", "lookup", {"tree": "rust", "count": 50}, 1.3),
            ("sglang", "lookup", {"tree": "python", "count": 20}, None),
        ],
    ),
    (
        "lookup among 700 prompts of 2048 tokens, none of them in the CPU's caches",
        "lookup_scattered",
        {"count": 50},
        [("sglang", "lookup", {"tree": "rust", "count": 50}, 1 / 1.5)],
    ),
    (
        "admission of 2048 known tokens",
        "hit",
        {"count": 50},
        [("vllm", "hit", {"count": 10}, 60)],
    ),
    ("release of 2048 tokens", "free", {"count": 50}, [("vllm", "free", {"count": 10}, None)]),
    *(
        (
            f"{what} of {blocks} blocks, each",
            "allocate",
            {"blocks": blocks, "release": release},
            [("vllm", "allocate", {"blocks": blocks, "release": release}, 25)],
        )
        for what, release in (("allocation", False), ("release", True))
        for blocks in (128, 4096)
    ),
    (
        "export hash of a block",
        "export_hash",
        {"blocks": 4096},
        [("vllm", "export_hash", {"blocks": 4096}, 30)],
    ),
    ("pool of 100 000 blocks", "construct", {}, [("vllm", "construct", {}, None)]),
    ("serving loop, a step", "mixed", {"steps": 150}, [("vllm", "mixed", {"steps": 100}, 40)]),
    *(
        (
            f"eviction of 64 tokens, {leaves} cached prompts, {what}",
            row,
            {"leaves": leaves, "count": 10},
            [
                ("sglang", "evict", {"tree": tree, "leaves": leaves, "count": 5}, aim)
                for tree, aim in trees
            ],
        )
        for what, row in (("whole call", "evict"), ("without the allocation", "evict_only"))
        for leaves, trees in (
            (1000, [("rust", None), ("python", None)]),
            (40_000, [("rust", 1000), ("python", 100_000)]),
            (250_000, []),
        )
    ),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", TABLE, ids=[name.replace(" ", "-") for name, *_ in TABLE])
def test_table(benchmark, peers, case):
    name, row, arguments, theirs = case
    if benchmark.disabled:
        if arguments.get("leaves", 0) > 1000:
            pytest.skip("takes a while to fill; it runs where it is measured")
        arguments = {k: min(v, 2) if k in ("steps", "count") else v for k, v in arguments.items()}
    ours, others = [], [[] for _ in theirs]

    def once():
        ours.extend(kv_rows.ROWS[row](**arguments))
        for found, (peer, their_row, their_arguments, _) in zip(others, theirs, strict=True):
            tree = their_arguments.get("tree")
            if peer in peers and (tree is None or tree in peers[peer].about["trees"]):
                found.extend(peers[peer].seconds(their_row, **their_arguments))

    kv_rows.ROWS[row](**arguments)  # once to fill and to warm up
    benchmark.pedantic(once, rounds=size(benchmark, 7, 1), iterations=1)
    benchmark.extra_info |= {"what": name, "us": us(ours)}
    for found, (peer, _, their_arguments, aim) in zip(others, theirs, strict=True):
        label = " ".join([peer, *filter(None, [their_arguments.get("tree")])])
        if not found:
            benchmark.extra_info[label] = "not measured: the peer is not here"
            continue
        benchmark.extra_info[label] = {
            "version": peers[peer].about["peer"],
            "us": us(found),
            "ratio": float(f"{np.median(found) / np.median(ours):.3g}"),
            "aim": aim and float(f"{aim:.3g}"),
        }


def test_decode_with_everything_on(benchmark):
    """Events, pins and a tick beside none; and 1024 sequences."""
    steps = size(benchmark, 100, 2)
    plain, observed, large = [], [], []

    def once():
        plain.extend(kv_rows.decode(256, steps))
        observed.extend(kv_rows.decode(256, steps, observed=True))
        large.extend(kv_rows.decode(1024, steps))

    benchmark.pedantic(once, rounds=size(benchmark, 7, 1), iterations=1)
    benchmark.extra_info |= {
        "us": us(plain),
        "observed_us": us(observed),
        "ratio": float(f"{np.median(observed) / np.median(plain):.3g}"),
        "aim": 1.5,
        "rows_1024_us": us(large),
        "rows_1024_aim_us": 20,
    }


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_bytes_per_block(benchmark):
    """Resident memory of a pool that is full of published content."""
    blocks = size(benchmark, 1_000_000, 20_000)
    rng, found = np.random.default_rng(8), []

    def once():
        before = resident()
        pool = BlockPool(blocks, max_blocks=256)
        for _ in range(blocks // 128):
            pool.free(kv_rows.served(pool, kv_rows.tokens(rng)))
        assert pool.stats()["nodes"] > 0.99 * blocks
        found.append((resident() - before) / blocks)

    benchmark.pedantic(once, rounds=1, iterations=1)
    benchmark.extra_info |= {"bytes_per_block": round(found[0], 1), "aim": 200}


def churn(load, run_blocks, blocks, rounds):
    """Blocks per contiguous run of sequences' tables, at a load."""
    rng = random.Random(1)
    pool = BlockPool(
        blocks, run_blocks=run_blocks, sharing=False, max_seqs=2048, max_blocks=512, seed=1
    )
    live, held = {}, 0
    for _ in range(rounds):
        while held < load * blocks:
            want = min(400, max(2, int(rng.lognormvariate(3.3, 0.8))))
            [(seq, _)] = pool.step(admissions=[Admission(np.zeros(16, np.int32))]).admitted
            live[seq] = [1, want]
            held += want
        grows = []
        for seq in rng.sample(sorted(live), min(len(live), 48)):
            live[seq][0] = min(live[seq][1], live[seq][0] + 1)
            grows.append((seq, live[seq][0] * 16))
        if not pool.step(grows=grows).fitted:
            break
        for seq, _ in grows:
            if live[seq][0] == live[seq][1]:
                held -= live.pop(seq)[1]
                pool.free(seq)
    rows = [pool.tables([seq])[0] for seq in live]
    return sum(map(len, rows)) / sum(1 + int((np.diff(row) != 1).sum()) for row in rows)


@pytest.mark.parametrize(("load", "aim"), [(0.7, 15), (0.9, 10), (0.97, 3)])
def test_contiguity(benchmark, load, aim):
    """Mean run after churn, with room behind sequences and without: what a swap copies at once."""
    blocks, rounds = size(benchmark, (20_000, 12_000), (2000, 50))
    runs = {}

    def once():
        runs.update({n: churn(load, n, blocks, rounds) for n in (1, 16)})

    benchmark.pedantic(once, rounds=1, iterations=1)
    benchmark.extra_info |= {
        "load": load,
        "mean_run": {str(n): round(run, 2) for n, run in runs.items()},
        "ratio": round(runs[16] / runs[1], 1),
        "aim": aim,
        "copies_of_2048_tokens": {str(n): round(128 / run, 1) for n, run in runs.items()},
    }


def talks(limit):
    """Hash ids of each request's 512-token blocks, in order of arrival; and where they are from."""
    if TRACE.exists():
        with gzip.open(TRACE, "rt") as lines:
            return [json.loads(line)["hash_ids"] for line in lines][:limit], "mooncake conversation"
    rng = np.random.default_rng(0)
    each, made, fresh = [[0, i + 1] for i in range(60)], [], 1000
    for _ in range(limit or 6000):
        i = int(rng.integers(60))
        if len(each[i]) > 60:
            each[i] = [0, fresh]
        each[i] += range(fresh, fresh := fresh + int(rng.integers(1, 8)))
        made.append(list(each[i]))
    return made, "seeded talks"


def hit_rate(requests, blocks, policy, run_blocks=16, running=16):
    """Tokens found of those asked for; `running` requests hold their blocks at a time."""
    pool = BlockPool(blocks, block_size=512, run_blocks=run_blocks, max_blocks=512)
    if policy != "lru":
        pool.set_policy(policy)
    live = deque()
    for ids in requests:
        prompt = np.repeat(np.array(ids[: blocks // 2], np.int32), 512)
        while True:
            outcome = pool.step(admissions=[Admission(prompt)])
            if outcome.fitted:
                break
            pool.free(live.popleft())
        seq = outcome.admitted[0][0]
        pool.commit(seq, len(prompt), ids=prompt)
        live.append(seq)
        if len(live) > running:
            pool.free(live.popleft())
    stats = pool.stats()
    return stats["hit_tokens"] / stats["asked_tokens"]


@pytest.mark.parametrize("blocks", [1000, 4000, 16_000, 64_000])
def test_hit_rates(benchmark, blocks):
    """By policy on a multi-turn trace, beside no limit, and what whole runs of victims cost."""
    requests, source = talks(size(benchmark, None, 200))
    rates = {}

    def once():
        for policy in ("lru", "slru"):
            rates[policy] = hit_rate(requests, blocks, policy)
        rates["lru, single blocks"] = hit_rate(requests, blocks, "lru", run_blocks=1)

    benchmark.pedantic(once, rounds=1, iterations=1)
    benchmark.extra_info |= {
        "trace": source,
        "requests": len(requests),
        "pool_tokens": blocks * 512,
        "hit_rate": {policy: round(rate, 4) for policy, rate in rates.items()},
        "loss_of_runs": round(rates["lru, single blocks"] - rates["lru"], 4),
        "loss_aim": 0.01,
    }


@pytest.mark.parametrize("blocks", [1000, 4000, 16_000])
def test_planned_batch(benchmark, blocks):
    """A whole trace as one batch known beforehand: hits as it came, and as planned."""
    requests, source = talks(size(benchmark, None, 200))
    prompts = [np.array([*ids, -1], np.int32) for ids in requests]  # the last is never shared
    plan = benchmark.pedantic(lambda: plan_prefixes(prompts, 1), rounds=3, iterations=1)
    total = sum(map(len, requests))
    planned = [requests[i] for i in plan.order()]
    benchmark.extra_info |= {
        "trace": source,
        "requests": len(requests),
        "pool_tokens": blocks * 512,
        "as_it_came": round(hit_rate(requests, blocks, "lru"), 4),
        "planned": round(hit_rate(planned, blocks, "lru"), 4),
        "one_prefix_each": round(plan.saved / total, 4),
        "possible": round(plan.possible / total, 4),
    }


TOOLS = {"read": (-1.2, 0.4), "search": (0.2, 0.8), "test": (1.5, 2.0)}  # lognormal seconds


def agents(policy, programs, blocks, slots=16, rate=12_000.0):
    """Simulated programs that call tools, a few per second, on one engine of `slots` sequences.

    A turn computes what is not cached at `rate` tokens/s, answers for a second, and calls a tool.
    The queue is in order of arrival. Returns mean seconds per program and the tokens computed
    again.
    """
    rng, clock = random.Random(9), [0]
    pool = BlockPool(blocks, block_size=512, max_blocks=256, max_seqs=512)
    kept = Retention(pool, rule=policy if policy != "lru" else "fixed", clock=lambda: clock[0])
    events, talks, at = [], {}, 0.0
    for program in range(programs):
        at += rng.expovariate(0.55)
        turns = max(2, int(rng.gauss(11, 3)))
        heapq.heappush(events, (at, program, "turn"))
        state = {"begin": at, "turns": turns, "done": 0, "tokens": 16 + program * 400, "pin": 0}
        state |= {"left": 0.0, "tool": "", "length": rng.randint(6, 20)}
        talks[program] = state
    queue, running, again, waits, spent = [], 0, 0, [0.0], []
    while events:
        now, program, kind = heapq.heappop(events)
        clock[0] = int(now * 1e9)
        kept.tick()
        talk = talks[program]
        if kind == "turn":
            if talk["done"]:
                kept.observe(talk["tool"], now - talk["left"])
            heapq.heappush(queue, (talk["begin"], program, now))
        else:  # answered
            running -= 1
            talk["done"] += 1
            prompt = np.repeat(np.arange(talk["length"]) + talk["tokens"], 512).astype(np.int32)
            pool.commit(talk["seq"], len(prompt), ids=prompt)
            if talk["done"] < talk["turns"]:
                talk["tool"] = rng.choices(list(TOOLS), [5, 3, 2])[0]
                talk["left"] = now
                if policy != "lru":
                    talk["pin"] = kept.leave(
                        talk["seq"],
                        talk["tool"],
                        arrival=program,
                        wait=sum(waits[-100:]) / len(waits[-100:]),
                        reload=len(prompt) / rate,
                    )
                seconds = rng.lognormvariate(*TOOLS[talk["tool"]])
                heapq.heappush(events, (now + min(seconds, 300), program, "turn"))
            else:
                spent.append(now - talk["begin"])
                kept.ended(talk["turns"])
            pool.free(talk["seq"])
        while queue and running < slots:
            _, program, since = queue[0]
            talk = talks[program]
            grown = talk["length"] + (rng.randint(2, 8) if talk["done"] else 0)
            prompt = np.repeat(np.arange(grown) + talk["tokens"], 512).astype(np.int32)
            outcome = pool.step(admissions=[Admission(prompt)])
            if not outcome.fitted:
                break
            heapq.heappop(queue)
            talk["seq"], cached = outcome.admitted[0]
            if talk["pin"]:
                kept.back(talk["pin"])
                talk["pin"] = 0
            again += max(0, talk["length"] * 512 * bool(talk["done"]) - cached)
            talk["length"] = grown
            waits.append(now - since)
            running += 1
            busy = (len(prompt) - cached) / rate + 1
            heapq.heappush(events, (now + busy, program, "answered"))
    return sum(spent) / len(spent), again


@pytest.mark.parametrize("blocks", [400, 800])
def test_tool_calls(benchmark, blocks):
    """Time to live by the formula and by the released rule, beside LRU, on simulated agents."""
    programs = size(benchmark, 150, 10)
    found = {}

    def once():
        for policy in ("lru", "fixed", "formula"):
            found[policy] = agents(policy, programs, blocks)

    benchmark.pedantic(once, rounds=1, iterations=1)
    benchmark.extra_info |= {
        "simulated": True,
        "pool_tokens": blocks * 512,
        "seconds_per_program": {policy: round(mean, 1) for policy, (mean, _) in found.items()},
        "tokens_computed_again": {policy: again for policy, (_, again) in found.items()},
    }
