"""Preemption by swap: what groups of blocks save, and what it costs beside computing again.

FastSwitch (arXiv 2411.18424) argues that swaps of scattered blocks drown in small copies. Here the
same trace of preemptions runs over pools that hand out blocks in groups, and one by one. Memory is
the CPU's on both sides: a copy costs no launch, so time says less here than the number of copies.
"""

import itertools
import time

import numpy as np
import pytest

from bench.support import size
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import Tokenizer
from pyruntime.kv import KvGroup, KvStorage, ServingPool, SwapEngine
from pyruntime.models import shipped

BLOCK, LAYERS = 16, 4
GROUPS = [KvGroup(tuple(range(LAYERS)), 0, BLOCK)]
COUNTED = ("blocks", "clean", "bytes", "descriptors", "copy_ns", "copy_cpu_ns")
now = time.perf_counter


class Trace:
    """Requests that grow at about 90 % load; one of them at random is preempted now and then.

    It is the same for every pool: what it does next depends on the seed and on counts alone.
    """

    def __init__(self, run_blocks, blocks):
        storage = KvStorage.allocate(GROUPS, blocks, 4, 64)  # pieces of 16 KiB, blocks of 128 KiB
        self.pool = ServingPool(
            blocks, BLOCK, LAYERS, GROUPS, blocks, storage, run_blocks=run_blocks
        )
        self.rng = np.random.default_rng(7)
        self.names = itertools.count()
        self.running, self.left, self.out = {}, {}, []
        self.seconds, self.swaps = 0.0, 0

    def blocks(self, tokens):
        return -(-tokens // BLOCK)

    def used(self):
        return sum(self.blocks(n + 1) for n in self.running.values())

    def room(self, tokens):
        return self.used() + self.blocks(tokens + 1) <= 0.9 * self.pool.num_blocks

    def admit(self):
        tokens = int(np.clip(self.rng.lognormal(5.7, 0.7), 32, 2000))
        if not self.room(tokens):
            return False
        name = next(self.names)
        self.pool.admit(name, np.full(tokens, name, np.int32))
        self.running[name], self.left[name] = tokens, int(self.rng.integers(50, 300))
        return True

    def step(self, preempt):
        back, victim = [], []
        if preempt and len(self.running) > 1:
            victim = [list(self.running)[int(self.rng.integers(len(self.running)))]]
            self.out.append((victim[0], self.running.pop(victim[0])))
            begin = now()
            self.pool.step([], swap_out=victim)
            self.seconds += now() - begin
        if not preempt and self.out and self.room(self.out[0][1]):
            name, self.running[name] = self.out[0][0], self.out[0][1]
            self.out.pop(0)
            back = [name]
            begin = now()
            self.pool.step([(name, self.running[name])], swap_in=back)
            self.seconds += now() - begin
        self.swaps += len(victim) + len(back)
        while not self.out and self.admit():
            pass
        for name in self.running:
            self.running[name] += 1
        while self.used() > self.pool.num_blocks:  # the newest starts anew another time
            name = max(self.running)
            self.pool.free(name)
            del self.running[name]
        self.pool.step(list(self.running.items()))
        for name, tokens in self.running.items():
            self.pool.commit(name, tokens, LAYERS)
        for name in list(self.running):
            self.left[name] -= 1
            if self.left[name] <= 0:
                self.pool.free(name)
                del self.running[name]


def measured(trace, before):
    """Figures per swap since `before`, and what to give as `before` next time."""
    stats = trace.pool.stats()
    total = {name: stats[f"swap_{name}"] for name in COUNTED}
    total |= {"swaps": trace.swaps, "seconds": trace.seconds}
    since = {name: value - before.get(name, 0) for name, value in total.items()}
    swaps = since["swaps"]
    assert swaps > 0 and stats["swap_failed"] == 0
    return total, {
        "swaps": swaps,
        "blocks": round(since["blocks"] / swaps, 1),
        "blocks not copied again": round(since["clean"] / swaps, 1),
        "mib": round(since["bytes"] / swaps / 2**20, 2),
        "copies": round(since["descriptors"] / swaps, 1),
        "copies if block by block": round(since["blocks"] * 2 * LAYERS / swaps, 1),
        "ms": round(1e3 * since["seconds"] / swaps, 3),
        "ms copying": round(since["copy_ns"] / 1e6 / swaps, 3),
        "cpu ms copying": round(since["copy_cpu_ns"] / 1e6 / swaps, 3),
    }


def test_preemption_trace(benchmark):
    """Per swap: copies, bytes and time. The trace alternates between the pools, step by step.

    The first phase begins with fresh pools, whose host memory is touched for the first time.
    """
    blocks, steps = size(benchmark, 1024, 256), size(benchmark, 1500, 60)
    traces = {run_blocks: Trace(run_blocks, blocks) for run_blocks in (16, 1)}
    before = {run_blocks: {} for run_blocks in traces}
    count = itertools.count(1)
    phases = []

    def round_():
        for _ in range(steps):
            number = next(count)
            order = list(traces.values())
            for trace in order if number // 25 % 2 else reversed(order):
                trace.step(number % 25 == 0)  # FastSwitch: 0.04 per iteration
        figures = {}
        for run_blocks, trace in traces.items():
            before[run_blocks], found = measured(trace, before[run_blocks])
            figures[f"groups of {run_blocks}"] = found
        grouped, single = figures.values()
        assert grouped["blocks"] == single["blocks"], "not the same trace"
        figures["times fewer copies with groups"] = round(single["copies"] / grouped["copies"], 2)
        phases.append(figures)

    benchmark.pedantic(round_, rounds=size(benchmark, 4, 1), iterations=1)
    for trace in traces.values():
        trace.pool.check()
    benchmark.extra_info |= {f"phase {i}, per swap": phase for i, phase in enumerate(phases, 1)}


def test_conversations(benchmark):
    """Blocks copied out, of those that left, in conversations of five turns.

    Each leaves the device while its user reads, and the host keeps what cannot change.
    """
    talks = size(benchmark, 200, 10)
    rng = np.random.default_rng(3)
    turns = np.clip(rng.lognormal(5.7, 0.7, (talks, 5)), 32, 2000).astype(int).cumsum(1)
    host_blocks = int((-(-turns[:, -1] // BLOCK)).sum())
    storage = KvStorage.allocate(GROUPS, 1024, 1, 4)
    pool = ServingPool(1024, BLOCK, LAYERS, GROUPS, host_blocks, storage)

    def once():
        for talk in range(talks):
            pool.admit(talk, np.full(8, talk, np.int32))
        for turn in range(5):
            for talk in rng.permutation(talks).tolist():
                tokens = int(turns[talk, turn])
                pool.step([(talk, tokens)], swap_in=[talk] if turn else [])
                pool.commit(talk, tokens, LAYERS)
                pool.step([], swap_out=[talk])

    benchmark.pedantic(once, rounds=1, iterations=1)
    pool.check()
    left = int((-(-turns // BLOCK)).sum())
    copied = 1 - pool.stats()["swap_clean"] / left
    benchmark.extra_info |= {"copied": round(copied, 3), "aim": 0.5}


@pytest.mark.parametrize("run", [1, 16])
def test_copy_bandwidth(benchmark, run):
    """The swap engine beside numpy's copy of as many bytes, in turns: scattered runs of blocks.

    Both sides copy between memory that has been touched, and more of it than the caches hold.
    """
    blocks, copied = size(benchmark, (4096, 1024), (64, 32))
    pieces = [[np.ones((blocks, BLOCK, 4, 64), np.float32) for _ in range(8)] for _ in range(2)]
    engine = SwapEngine()
    spaces = [engine.add_space(side) for side in pieces]
    rng = np.random.default_rng(4)
    first = rng.permutation(blocks // run)[: copied // run] * run
    runs = np.stack([first, rng.permutation(first), np.full(len(first), run)], 1).astype(np.uint32)
    rows = copied * len(pieces[0])
    flat = [np.ones((rows, pieces[0][0][0].size), np.float32) for _ in range(2)]
    found = {"engine": [], "memcpy": []}

    def round_():
        begin = now()
        engine.copy(*spaces, runs)
        engine.wait()
        found["engine"].append(now() - begin)
        assert set(engine.collect().values()) == {0}
        begin = now()
        np.copyto(flat[1], flat[0])
        found["memcpy"].append(now() - begin)

    benchmark.pedantic(round_, rounds=size(benchmark, 21, 1), iterations=1, warmup_rounds=1)
    seconds = {name: float(np.median(values[1:] or values)) for name, values in found.items()}
    benchmark.extra_info |= {
        "mib": flat[0].nbytes >> 20,
        **{f"{name}, GB/s": round(flat[0].nbytes / t / 1e9, 2) for name, t in seconds.items()},
        "of memcpy": round(seconds["memcpy"] / seconds["engine"], 3),
        "aim at 16 blocks": 0.95,
    }


def first_token(loop, submit):
    """Seconds to the first token; the request is left running."""
    begin = now()
    loop.submit(submit)
    for _ in range(1000):
        if any(delta.tokens for delta in loop.step()):
            return now() - begin
    raise AssertionError("no token")


@pytest.mark.parametrize("tokens", [128, 480])
def test_time_to_token(benchmark, tokens):
    """To the next token: of a new prompt, a cached one, and one that comes back from the host."""
    ids = Tokenizer(shipped()).encode("The list is a list of values. " * 200)[:tokens]
    loop = make_loop(shipped(), policy="swap", kv_bytes=64 << 20, swap_bytes=64 << 20)
    names, found = map(str, itertools.count()), {"recompute": [], "prefix hit": [], "swap-in": []}

    def submit(tenant):
        return Submit(next(names), ids, SamplingParams(), 8, ignore_eos=True, tenant=tenant)

    def drain():
        while loop.busy:
            loop.step()

    def round_():
        tenant = next(names)
        found["recompute"].append(first_token(loop, submit(tenant)))
        drain()
        found["prefix hit"].append(first_token(loop, submit(tenant)))
        [handle] = [request.id for request in loop.scheduler.running]
        loop.pool.step([], swap_out=[handle])
        begin = now()
        loop.pool.step([(handle, len(ids))], swap_in=[handle])
        loop.step()
        found["swap-in"].append(now() - begin)
        drain()

    round_()
    for values in found.values():
        values.clear()
    benchmark.pedantic(round_, rounds=size(benchmark, 15, 1), iterations=1)
    middle = {name: float(np.median(values)) for name, values in found.items()}
    benchmark.extra_info |= {
        "tokens": len(ids),
        **{f"{name}, ms": round(1e3 * value, 3) for name, value in middle.items()},
        "recompute / prefix hit": round(middle["recompute"] / middle["prefix hit"], 2),
        "recompute / swap-in": round(middle["recompute"] / middle["swap-in"], 2),
    }
