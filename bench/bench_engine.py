"""The engine end to end: time to first token, time between tokens, tokens per second, memory.

The model is random, OLMoE-like in shape but smaller. If `PYRUNTIME_LLAMA_PYTHON` names an
interpreter with `llama-cpp-python` and `gguf`, llama.cpp runs on the same weights in float32, in a
process of its own, in rounds that alternate with ours.
"""

import json
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from bench.models import random_model
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.sched import PRESETS

PEER = os.environ.get("PYRUNTIME_LLAMA_PYTHON")
SHAPE = {"hidden": 1024, "layers": 8, "experts": 32, "ffn": 512, "vocab": 8192, "top_k": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"), **SHAPE)


def serve(loop, count, prompt, tokens):
    """Run `count` requests; return first-token and between-token times, and the whole time."""
    rng = np.random.default_rng(1)
    begin = time.perf_counter()
    last, first, between = {}, [], []
    for i in range(count):
        ids = rng.integers(0, SHAPE["vocab"], prompt).tolist()
        sampling = SamplingParams(temperature=1.0, seed=i)
        loop.submit(Submit(str(i), ids, sampling, tokens, ignore_eos=True))
    while loop.busy:
        for delta in loop.step():
            now = time.perf_counter()
            if delta.id in last:
                between.append(now - last[delta.id])
            else:
                first.append(now - begin)
            last[delta.id] = now
    return first, between, time.perf_counter() - begin


@pytest.mark.parametrize("policy", sorted(PRESETS))
@pytest.mark.parametrize("count", [1, 8])
def test_requests(benchmark, model, policy, count):
    loop = make_loop(model, policy=policy, max_running=8)
    serve(loop, 1, 32, 4)
    rounds = []
    benchmark.pedantic(lambda: rounds.append(serve(loop, count, 256, 32)), rounds=3, iterations=1)
    first, between, seconds = rounds[1]
    stats = loop.stats
    benchmark.extra_info |= {
        "ttft_ms": round(1000 * float(np.mean(first)), 1),
        "tbt_p50_ms": round(1000 * float(np.percentile(between, 50)), 2),
        "tbt_p99_ms": round(1000 * float(np.percentile(between, 99)), 2),
        "tokens_per_s": round(count * 32 / seconds, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "weights_mb": sum(p.stat().st_size for p in model.iterdir()) >> 20,
        "scheduler_us_per_step": round(1e6 * stats.seconds["schedule"] / stats.steps, 1),
        "engine_us_per_step": round(1e6 * stats.seconds["engine"] / stats.steps, 1),
    }


class Llama:
    """llama.cpp in a process of its own, answering one JSON line per command."""

    def __init__(self, model):
        script = Path(__file__).parent / "peers" / "llama_cpp.py"
        self.process = subprocess.Popen(
            [PEER, str(script), str(model), str(len(os.sched_getaffinity(0)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = json.loads(self.process.stdout.readline())["version"]

    def run(self, prompt, tokens):
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.mark.skipif(not PEER, reason="PYRUNTIME_LLAMA_PYTHON is not set")
def test_beside_llama_cpp(benchmark, model):
    loop = make_loop(model, max_running=1)
    peer = Llama(model)
    ours, theirs = [], []

    def round_():
        first, _, seconds = serve(loop, 1, 256, 32)
        ours.append((256 / first[0], 31 / (seconds - first[0])))
        answer = peer.run(256, 32)
        theirs.append((256 / answer["prefill_s"], 31 / answer["decode_s"]))

    try:
        round_()
        del ours[:], theirs[:]
        benchmark.pedantic(round_, rounds=5, iterations=1)
    finally:
        peer.close()
    for index, name in enumerate(("prefill", "decode")):
        mine, other = (sorted(r[index] for r in rows)[2] for rows in (ours, theirs))
        benchmark.extra_info |= {
            f"{name}_tokens_per_s": round(mine, 1),
            f"{name}_llama_cpp": round(other, 1),
            f"{name}_ratio": round(mine / other, 2),
        }
    benchmark.extra_info["peer"] = peer.version
