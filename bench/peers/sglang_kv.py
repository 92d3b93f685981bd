"""SGLang's radix trees, Rust core and Python, for bench_kv.py: in an interpreter of their own.

Protocol as in vllm_kv.py. The Rust core is driven through its own binding, without the Python
adapter around it; tokens are the ``array('q')`` it asks for.
"""

import json
import os
import sys
import time
from array import array

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import random  # noqa: E402

import sglang  # noqa: E402
import torch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402

try:
    from sglang.srt.mem_cache.rust_tree_core.extension import bindings
except Exception as error:
    bindings, WHY = None, f"{type(error).__name__}: {error}"

FULL = 0  # ComponentType
now = time.perf_counter
STATE = {}


def tokens(rng, length=2048):
    return array("q", [rng.randrange(32000) for _ in range(length)])


class Rust:
    def __init__(self):
        params = bindings.TreeCoreInitParamsBinding(
            eviction_policy="lru", page_size=16, device="cpu"
        )
        self.core = bindings.RustUnifiedTreeCoreBinding(params, [FULL])

    def match(self, key):
        return self.core.match_prefix(bindings.MatchParamsBinding(key=key))

    def insert(self, key, value):
        self.core.begin_insert(bindings.InsertParamsBinding(key=key, value=value))
        while self.core.has_ongoing_insert():
            self.core.resume_insert()
        self.core.end_insert()

    def evict(self, count):
        self.core.evict_device_start(FULL, count)
        gone = 0
        while gone < count:
            step = self.core.evict_device_next_node(FULL, {FULL: gone})
            if step.node_id is None:
                break
            gone += self.core.evict_device_leaf(step.node_id).tracker[FULL]
        self.core.evict_device_end(FULL)

    def matched(self, result):
        return result.device_prefix_len


class Python:
    class Allocator:
        device = "cpu"

        def free(self, *indices, **where):
            pass

        free_segment = free

    def __init__(self):
        self.core = RadixCache.create_simulated(mock_allocator=self.Allocator(), page_size=16)

    def match(self, key):
        return self.core.match_prefix(MatchPrefixParams(key=RadixKey(key)))

    def insert(self, key, value):
        self.core.insert(InsertParams(key=RadixKey(key), value=value))

    def evict(self, count):
        self.core.evict(EvictParams(num_tokens=count))

    def matched(self, result):
        return result.device_prefix_len


TREES = {"python": Python, "rust": Rust}


def lookup(tree, count):
    """Full hit of 2048 tokens in one node."""
    if ("lookup", tree) not in STATE:
        made, key = TREES[tree](), tokens(random.Random(1))
        made.insert(key, torch.arange(2048))
        assert made.matched(made.match(key)) == 2048
        STATE["lookup", tree] = made, key
    made, key = STATE["lookup", tree]
    seconds = []
    for _ in range(count):
        begin = now()
        made.match(key)
        seconds.append(now() - begin)
    return seconds


def miss(tree, count):
    made, _ = STATE["lookup", tree]
    rng = random.Random(2)
    keys = [tokens(rng) for _ in range(count)]
    seconds = []
    for key in keys:
        begin = now()
        made.match(key)
        seconds.append(now() - begin)
    return seconds


def cold(tree, count):
    """Match and insert of 2048 tokens that are not there, by 40 prompts before."""
    if ("cold", tree) not in STATE:
        STATE["cold", tree] = TREES[tree](), random.Random(3)
    made, rng = STATE["cold", tree]
    keys = [tokens(rng) for _ in range(count)]
    value = torch.arange(2048)
    seconds = []
    for key in keys:
        begin = now()
        made.match(key)
        made.insert(key, value)
        seconds.append(now() - begin)
    return seconds


def evict(tree, leaves, count):
    """Evict 64 tokens among `leaves` leaves of 64."""
    if ("evict", tree, leaves) not in STATE:
        made, rng = TREES[tree](), random.Random(4)
        value = torch.arange(64)
        for _ in range(leaves):
            made.insert(tokens(rng, 64), value)
        STATE["evict", tree, leaves] = made, rng
    made, rng = STATE["evict", tree, leaves]
    seconds = []
    for _ in range(count):
        before = made.core.evictable_size()
        begin = now()
        made.evict(64)
        seconds.append(now() - begin)
        assert made.core.evictable_size() == before - 64, (before, made.core.evictable_size())
        made.insert(tokens(rng, 64), torch.arange(64))
    return seconds


ROWS = {"lookup": lookup, "miss": miss, "cold": cold, "evict": evict}


def main():
    about = {"peer": f"sglang {sglang.__version__}", "trees": ["python"]}
    if bindings is None:
        about["missing"] = WHY
    else:
        about["trees"].append("rust")
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        row = asked.pop("row")
        answer = {"seconds": ROWS[row](**asked)} if row in ROWS else {"missing": row}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
