"""Operation traces that a peer's KV cache manager answered: made, recorded, replayed.

``PYRUNTIME_VLLM_PYTHON=... python -m tests.kv_traces`` records them anew, as
``tests/data/kv/<peer>-<version>.json``. Tokens are ``[value, count]`` pairs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np

from pyruntime.kv import Admission, BlockPool, KvGroup

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data" / "kv"
SIZE = 16
# seed, blocks, values of a block, whether content is written twice, window. Only the first two have
# to evict: vLLM caches second copies, which take room, and releases what a window has left later.
CASES = [
    (1, 40, 3, False, 0),
    (2, 80, 3, False, 0),
    (3, 1000, 2, True, 0),
    (4, 1000, 2, True, 40),
    (5, 1000, 3, True, 64),
]


def make(seed, values, twice, operations=400):
    """Random prompts of whole blocks and a tail, answers, and ends, as ``[op, name, tokens]``."""
    rng = random.Random(seed)
    live, made, name = [], [], 0
    for _ in range(operations):
        kind = rng.random()
        if (kind < 0.4 and len(live) < 24) or not live:
            name += 1
            live.append(name)
            tokens = [[rng.randrange(values), SIZE] for _ in range(rng.randrange(9))]
            tail = rng.randrange(values) if twice else 1000 + name
            made.append(["admit", name, [*tokens, [tail, rng.randrange(1, 2 * SIZE)]]])
        elif kind < 0.75:
            one = rng.choice(live)
            value = rng.randrange(2) if twice else 2000 + one
            made.append(["grow", one, [[value, rng.randrange(1, SIZE + 1)]]])
        else:
            made.append(["free", live.pop(rng.randrange(len(live))), []])
    return made


def flat(tokens):
    return [value for value, count in tokens for _ in range(count)]


def replay(operations, num_blocks, window):
    """Hit lengths of our pool, None where an admission did not fit; what cannot grow ends."""
    pool = BlockPool(
        num_blocks,
        block_size=SIZE,
        groups=[KvGroup((0,), window, SIZE)],
        run_blocks=1,
        max_blocks=1000,
    )
    live, hits = {}, []
    for op, name, given in operations:
        tokens = np.array(flat(given), np.int32)
        if op == "admit":
            outcome = pool.step(admissions=[Admission(tokens)])
            hits.append(outcome.admitted[0][1] if outcome.fitted else None)
            if not outcome.fitted:
                continue
            live[name] = outcome.admitted[0][0], tokens
        elif name not in live:
            continue
        elif op == "free":
            pool.free(live.pop(name)[0])
            continue
        else:
            seq, before = live[name]
            live[name] = seq, np.append(before, tokens)
            if not pool.step(grows=[(seq, len(live[name][1]))]).fitted:
                pool.free(live.pop(name)[0])
                continue
        seq, tokens = live[name]
        pool.commit(seq, len(tokens), ids=tokens)
        pool.check()
    return hits


class Peer:
    """A peer's manager in an interpreter of its own; see ``bench/peers``."""

    def __init__(self, python, script):
        self.process = subprocess.Popen(
            [python, str(ROOT / "bench" / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{script} does not start under {python}")
        self.name = json.loads(line)["peer"]

    def hits(self, operations, num_blocks, window):
        given = [[op, name, flat(tokens)] for op, name, tokens in operations]
        asked = {"row": "trace", "operations": given, "num_blocks": num_blocks, "window": window}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["hits"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def main():
    peer = Peer(os.environ["PYRUNTIME_VLLM_PYTHON"], "vllm_kv.py")
    traces = []
    for seed, num_blocks, values, twice, window in CASES:
        operations = make(seed, values, twice)
        hits = peer.hits(operations, num_blocks, window)
        traces.append(
            {"num_blocks": num_blocks, "window": window, "operations": operations, "hits": hits}
        )
    peer.close()
    DATA.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(trace, separators=(",", ":")) for trace in traces)
    (DATA / f"{peer.name.replace(' ', '-')}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
