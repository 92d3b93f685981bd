"""What `bench_kv` measures of our pool; rows of the same names in ``peers`` measure theirs.

Each row returns seconds, of calls or of blocks as its name says. State is kept between rounds.
"""

import random
import time
from itertools import count as counter

import numpy as np

from pyruntime.kv import Admission, BlockPool, Retention, export_keys

SIZE = 16
now = time.perf_counter
STATE = {}


def tokens(rng, n=2048):
    return rng.integers(0, 32000, n, np.int32)


def served(pool, prompt):
    """Admit, compute and publish a prompt."""
    [(seq, _)] = pool.step(admissions=[Admission(prompt)]).admitted
    pool.commit(seq, len(prompt), ids=prompt)
    return seq


def decode(rows, steps, observed=False):
    """A batch step of `rows` sequences of about 1000 tokens; `observed`: events, pins, a clock."""
    key = ("decode", rows, observed)
    if key not in STATE:
        rng = np.random.default_rng(1)
        events = 1 << 16 if observed else 0
        pool = BlockPool(rows * 400, max_seqs=rows + 64, max_blocks=512, events=events)
        seqs = [served(pool, tokens(rng, 1000 + i % SIZE)) for i in range(rows)]
        tables = [np.empty((rows, 512), np.int32)]
        slots, lengths = [np.empty(rows, np.int32)], np.empty(rows, np.int32)
        batch = pool.batch(seqs, tables=tables, slots=slots, lengths=lengths)
        kept = Retention(pool, cap=1.0)
        if observed:
            for i, seq in enumerate(seqs[:48]):
                kept.leave(seq, "tool", arrival=i, seconds=1000 + i)
        STATE[key] = pool, batch, kept, [0]
    pool, batch, kept, count = STATE[key]
    ids, seconds = np.zeros(len(batch), np.int32), []
    for _ in range(steps):
        count[0] += 1
        ids[:] = count[0]  # the peer appends Python ints; filling an array is the caller's here
        begin = now()
        batch.advance(ids)
        if observed:
            kept.tick()
        seconds.append(now() - begin)
    return seconds


def cold(count):
    """Match, allocate and publish 2048 tokens nobody has seen; every block evicts another."""
    if "cold" not in STATE:
        rng, pool = np.random.default_rng(2), BlockPool(20_000, max_blocks=256)
        for _ in range(170):
            pool.free(served(pool, tokens(rng)))
        STATE["cold"] = rng, pool
    rng, pool = STATE["cold"]
    prompts, seconds = [tokens(rng) for _ in range(count)], []
    for prompt in prompts:
        begin = now()
        seq = served(pool, prompt)
        seconds.append(now() - begin)
        pool.free(seq)
    return seconds


def warm():
    if "warm" not in STATE:
        pool, prompt = BlockPool(100_000, max_blocks=256), tokens(np.random.default_rng(3))
        pool.free(served(pool, prompt))
        assert pool.match(prompt).tokens == 2032
        STATE["warm"] = pool, prompt
    return STATE["warm"]


def lookup(count):
    """Find 2048 tokens."""
    pool, prompt = warm()
    seconds = []
    for _ in range(count):
        begin = now()
        pool.match(prompt)
        seconds.append(now() - begin)
    return seconds


def lookup_scattered(count):
    """Find 2048 tokens, a different prompt of 700 each time: 90 000 blocks."""
    if "scattered" not in STATE:
        rng = np.random.default_rng(4)
        pool, prompts = BlockPool(100_000, max_blocks=256), [tokens(rng) for _ in range(700)]
        for prompt in prompts:
            pool.free(served(pool, prompt))
        STATE["scattered"] = pool, prompts, random.Random(5)
    pool, prompts, rng = STATE["scattered"]
    seconds = []
    for prompt in rng.choices(prompts, k=count):
        begin = now()
        pool.match(prompt)
        seconds.append(now() - begin)
    return seconds


def hit(count):
    """Find 2048 tokens and hold them, with a block for what is new."""
    pool, prompt = warm()
    seconds = []
    for _ in range(count):
        begin = now()
        [(seq, _)] = pool.step(admissions=[Admission(prompt)]).admitted
        seconds.append(now() - begin)
        pool.free(seq)
    return seconds


def free(count):
    """Give 128 blocks back, most of them published."""
    pool, prompt = warm()
    seconds = []
    for _ in range(count):
        seq = served(pool, prompt)
        begin = now()
        pool.free(seq)
        seconds.append(now() - begin)
    return seconds


def allocate(blocks, release):
    """Seconds per block, in bulk."""
    if "pool" not in STATE:
        STATE["pool"] = BlockPool(100_000)
    pool, seconds = STATE["pool"], []
    for _ in range(20):
        seq = pool.open()
        begin = now()
        pool.step(grows=[(seq, blocks * SIZE)])
        middle = now()
        pool.free(seq)
        seconds.append(((now() - middle) if release else (middle - begin)) / blocks)
    return seconds


def evict(leaves, count):
    """Seconds per call: 64 tokens (4 blocks) of `leaves` cached prompts of 64 tokens make room."""
    pool, rng = crowded(leaves)
    seconds = []
    for _ in range(count):
        seq = pool.open()
        begin = now()
        pool.step(grows=[(seq, 64)])
        seconds.append(now() - begin)
        pool.free(seq)
        pool.free(served(pool, tokens(rng, 64)))
    return seconds


def crowded(leaves):
    """A pool that is full of `leaves` cached prompts of 64 tokens."""
    if ("evict", leaves) not in STATE:
        rng, pool = np.random.default_rng(6), BlockPool(4 * leaves, run_blocks=1, max_blocks=1024)
        for _ in range(leaves):
            pool.free(served(pool, tokens(rng, 64)))
        STATE["evict", leaves] = pool, rng
    return STATE["evict", leaves]


def evict_only(leaves, count):
    """Seconds per 4 blocks: evicting 512 at once, less allocating 512 that are free."""
    pool, rng = crowded(leaves)
    seconds = []
    for _ in range(count):
        spent = []
        for _ in range(2):
            seq = pool.open()
            begin = now()
            pool.step(grows=[(seq, 512 * SIZE)])
            spent.append(now() - begin)
            pool.free(seq)
        seconds.append(max(0.0, spent[0] - spent[1]) / 128)
        for _ in range(128):
            pool.free(served(pool, tokens(rng, 64)))
    return seconds


def export_hash(blocks):
    """Seconds per block."""
    ids = np.zeros(blocks * SIZE, np.int32)
    begin = now()
    export_keys(b"secret", b"", ids)
    return [(now() - begin) / blocks]


def construct():
    """A pool of 100 000 blocks."""
    begin = now()
    BlockPool(100_000)
    return [now() - begin]


def mixed(steps):
    """256 slots, 16 shared prefixes of 1024 tokens, suffixes and answers of random lengths."""
    if "mixed" not in STATE:
        generator = np.random.default_rng(7)
        shared = [tokens(generator, 1024) for _ in range(16)]
        pool = BlockPool(40_000, max_blocks=256)
        STATE["mixed"] = pool, shared, generator, random.Random(4), {}, {}, counter(1)
    pool, shared, generator, rng, live, due, clock = STATE["mixed"]
    tables, ids = [np.empty((256, 256), np.int32)], np.full(256, 7, np.int32)
    slots, lengths = [np.empty(256, np.int32)], np.empty(256, np.int32)
    seconds, done, batch = [], [], None
    for _ in range(steps):
        fresh = [
            np.append(shared[rng.randrange(16)], tokens(generator, rng.randrange(16, 256)))
            for _ in range(min(8, 256 + len(done) - len(live)))
        ]
        ends = [rng.randrange(32, 512) for _ in fresh]
        step = next(clock)
        begin = now()
        if fresh or done or batch is None:
            outcome = pool.step(frees=done, admissions=[Admission(prompt) for prompt in fresh])
            for seq in done:
                del live[seq]
            for (seq, _), prompt, end in zip(outcome.admitted, fresh, ends, strict=True):
                pool.commit(seq, len(prompt), ids=prompt)
                live[seq] = None
                due.setdefault(step + end, []).append(seq)
            n = len(live)
            batch = pool.batch(
                list(live), tables=[tables[0][:n]], slots=[slots[0][:n]], lengths=lengths[:n]
            )
        batch.advance(ids[: len(live)])
        done = due.pop(step, [])
        seconds.append(now() - begin)
    if done:
        pool.free(*done)
        for seq in done:
            del live[seq]
    return seconds


ROWS = {
    row.__name__: row
    for row in (
        decode,
        cold,
        lookup,
        lookup_scattered,
        hit,
        free,
        allocate,
        evict,
        evict_only,
        export_hash,
        construct,
        mixed,
    )
}
