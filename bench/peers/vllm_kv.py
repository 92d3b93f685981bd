"""vLLM's KV cache manager, for bench_kv.py: runs in an interpreter of its own.

One JSON object per line in, one out: ``{"row": name, ...sizes}`` -> ``{"seconds": [...]}``; the
first line out names the version. Rows measure what `bench.kv_rows` measures of ours.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever vLLM prints is no answer

import random  # noqa: E402

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    get_request_block_hasher,
    hash_block_tokens,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request  # noqa: E402

SIZE = 16
init_none_hash(sha256)
HASHER = get_request_block_hasher(SIZE, sha256)
now = time.perf_counter
number = 0


def manager(num_blocks, window=0, caching=True):
    shape = {"block_size": SIZE, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float16}
    spec = FullAttentionSpec(**shape)
    if window:
        spec = SlidingWindowSpec(sliding_window=window, **shape)
    config = KVCacheConfig(num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])  # one is null
    return KVCacheManager(
        config,
        max_model_len=1 << 20,
        scheduler_block_size=SIZE,
        hash_block_size=SIZE,
        enable_caching=caching,
    )


def request(tokens):
    global number
    number += 1
    return Request(
        str(number), tokens, SamplingParams(max_tokens=1 << 16), None, block_hasher=HASHER
    )


def admit(kv, r):
    blocks, cached, _ = kv.get_computed_blocks(r)
    new = kv.allocate_slots(r, r.num_tokens - cached, cached, blocks)
    if new is None:
        return None
    r.num_computed_tokens = r.num_tokens
    return cached


def prompts(count, length, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(32000) for _ in range(length)] for _ in range(count)]


STATE = {}


def decode(rows, steps):
    key = ("decode", rows)
    if key not in STATE:
        kv = manager(100_000)
        live = [request(p) for p in prompts(rows, 1000)]
        for i, r in enumerate(live):
            r.append_output_token_ids([0] * (i % SIZE))  # blocks fill at different steps
            admit(kv, r)
        STATE[key] = kv, live
    kv, live = STATE[key]
    seconds = []
    for step in range(steps):
        begin = now()
        for r in live:
            r.append_output_token_ids(step)
            kv.allocate_slots(r, 1)
            r.num_computed_tokens += 1
        seconds.append(now() - begin)
    return seconds


def cold(count):
    if "cold" not in STATE:
        STATE["cold"] = manager(20_000)
        cold_fill = STATE["cold"]
        for p in prompts(170, 2048, 1):
            r = request(p)
            admit(cold_fill, r)
            cold_fill.free(r)
    kv, seconds = STATE["cold"], []
    for p in prompts(count, 2048, random.random()):
        begin = now()
        r = request(p)
        admit(kv, r)
        seconds.append(now() - begin)
        kv.free(r)
    return seconds


def warm():
    if "warm" not in STATE:
        kv, prompt = manager(100_000), prompts(1, 2048, 2)[0]
        r = request(prompt)
        admit(kv, r)
        kv.free(r)
        STATE["warm"] = kv, prompt
    return STATE["warm"]


def lookup(count):
    kv, prompt = warm()
    seconds = []
    for _ in range(count):
        begin = now()
        r = request(prompt)
        _, cached, _ = kv.get_computed_blocks(r)
        seconds.append(now() - begin)
        assert cached == 2032
    return seconds


def hit(count):
    kv, prompt = warm()
    seconds = []
    for _ in range(count):
        begin = now()
        r = request(prompt)
        admit(kv, r)
        seconds.append(now() - begin)
        kv.free(r)
    return seconds


def free(count):
    kv, prompt = warm()
    seconds = []
    for _ in range(count):
        r = request(prompt)
        admit(kv, r)
        begin = now()
        kv.free(r)
        seconds.append(now() - begin)
    return seconds


def allocate(blocks, release):
    """Seconds per block: bulk, caching on, of free blocks."""
    if "pool" not in STATE:
        STATE["pool"] = BlockPool(100_000, True, SIZE)
    pool, seconds = STATE["pool"], []
    for _ in range(20):
        begin = now()
        got = pool.get_new_blocks(blocks)
        middle = now()
        pool.free_blocks(got)
        seconds.append(((now() - middle) if release else (middle - begin)) / blocks)
    return seconds


def export_hash(blocks):
    tokens, key = tuple(range(SIZE)), None
    begin = now()
    for _ in range(blocks):
        key = hash_block_tokens(sha256, key, tokens)
    return [(now() - begin) / blocks]


def construct():
    begin = now()
    manager(100_000)
    return [now() - begin]


def mixed(steps):
    """256 slots, 16 shared prefixes of 1024 tokens, suffixes and answers of random lengths."""
    if "mixed" not in STATE:
        STATE["mixed"] = manager(40_000), prompts(16, 1024, 3), random.Random(4), []
    kv, shared, rng, live = STATE["mixed"]
    seconds = []
    for _ in range(steps):
        fresh = [
            shared[rng.randrange(16)] + prompts(1, rng.randrange(16, 256), rng.random())[0]
            for _ in range(min(8, 256 - len(live)))
        ]
        ends = [rng.randrange(32, 512) for _ in fresh]
        begin = now()
        for prompt, end in zip(fresh, ends, strict=True):
            r = request(prompt)
            admit(kv, r)
            live.append((r, r.num_tokens + end))
        for r, _ in live:
            r.append_output_token_ids(7)
            kv.allocate_slots(r, 1)
            r.num_computed_tokens += 1
        done = [r for r, end in live if r.num_tokens >= end]
        for r in done:
            kv.free(r)
        live[:] = [(r, end) for r, end in live if r.num_tokens < end]
        seconds.append(now() - begin)
    return seconds


def trace(operations, num_blocks, window):
    """Hit lengths of a recorded trace: [op, name, tokens] with admit, grow, free."""
    kv, live, hits = manager(num_blocks, window), {}, []
    for op, name, tokens in operations:
        if op == "admit":
            live[name] = request(tokens)
            hits.append(admit(kv, live[name]))
            if hits[-1] is None:
                del live[name]
        elif name in live and op == "grow":
            r = live[name]
            for token in tokens:
                r.append_output_token_ids(token)
            if kv.allocate_slots(r, len(tokens)) is None:
                kv.free(live.pop(name))
            else:
                r.num_computed_tokens = r.num_tokens
        elif name in live:
            kv.free(live.pop(name))
    return hits


ROWS = {
    "decode": decode,
    "cold": cold,
    "lookup": lookup,
    "hit": hit,
    "free": free,
    "allocate": allocate,
    "export_hash": export_hash,
    "construct": construct,
    "mixed": mixed,
}


def main():
    print(json.dumps({"peer": f"vllm {vllm.__version__}"}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        row = asked.pop("row")
        if row == "trace":
            answer = {"hits": trace(**asked)}
        elif row in ROWS:
            answer = {"seconds": ROWS[row](**asked)}
        else:
            answer = {"missing": row}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
