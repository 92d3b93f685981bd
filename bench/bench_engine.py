"""The engine end to end: time to first token, time between tokens, tokens per second, memory.

The model is random, OLMoE-like in shape but smaller. If `PYRUNTIME_LLAMA_PYTHON` names an
interpreter with `llama-cpp-python` and `gguf`, llama.cpp runs on the same weights in float32, in a
process of its own, in rounds that alternate with ours.
"""

import itertools
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from bench.models import random_model
from bench.support import PeakMemory, middle, size
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.sched import PRESETS

PEER = os.environ.get("PYRUNTIME_LLAMA_PYTHON")
SHAPE = {"hidden": 1024, "layers": 8, "experts": 32, "ffn": 512, "vocab": 8192, "top_k": 4}
SEEDS = itertools.count()  # other prompts each time: the last ones would be found in memory
SMALL = {"hidden": 256, "layers": 2, "experts": 4, "ffn": 64, "vocab": 512, "top_k": 2}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    disabled = request.config.getoption("benchmark_disable")
    return random_model(tmp_path_factory.mktemp("model"), **(SMALL if disabled else SHAPE))


def serve(loop, count, prompt, tokens):
    """Run `count` requests; return first-token and between-token times, and the whole time."""
    rng = np.random.default_rng(next(SEEDS))
    begin = time.perf_counter()
    last, first, between = {}, [], []
    for i in range(count):
        ids = rng.integers(0, loop.engine.config.vocab_size, prompt).tolist()
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", sorted(PRESETS))
@pytest.mark.parametrize("count", [1, 8])
def test_requests(benchmark, model, policy, count):
    prompt, tokens = size(benchmark, (256, 32), (32, 4))
    memory = PeakMemory()
    loop = make_loop(model, policy=policy, max_running=8)
    serve(loop, 1, 32, 4)
    rounds = []
    benchmark.pedantic(
        lambda: rounds.append(serve(loop, count, prompt, tokens)), rounds=3, iterations=1
    )
    seconds = middle([whole for _, _, whole in rounds])
    first, between, _ = next(each for each in rounds if each[2] == seconds)
    stats = loop.stats
    benchmark.extra_info |= {
        "ttft_ms": round(1000 * float(np.mean(first)), 1),
        "tbt_p50_ms": round(1000 * float(np.percentile(between, 50)), 2),
        "tbt_p99_ms": round(1000 * float(np.percentile(between, 99)), 2),
        "tokens_per_s": round(count * tokens / seconds, 1),
        **memory.report(),
        "weights_mb": sum(p.stat().st_size for p in model.iterdir()) >> 20,
        "scheduler_us_per_step": round(1e6 * stats.seconds["schedule"] / stats.steps, 1),
        "engine_us_per_step": round(1e6 * stats.seconds["engine"] / stats.steps, 1),
    }


class Llama:
    """llama.cpp in a process of its own, answering one JSON line per command."""

    def __init__(self, model):
        script = Path(__file__).parent / "peers" / "llama.py"
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
    prompt, tokens = size(benchmark, (256, 32), (16, 3))
    loop = make_loop(model, max_running=1)
    peer = Llama(model)
    ours, theirs = [], []

    def round_():
        first, _, seconds = serve(loop, 1, prompt, tokens)
        ours.append((prompt / first[0], (tokens - 1) / (seconds - first[0])))
        answer = peer.run(prompt, tokens)
        theirs.append((prompt / answer["prefill_s"], (tokens - 1) / answer["decode_s"]))

    try:
        round_()
        del ours[:], theirs[:]
        benchmark.pedantic(round_, rounds=5, iterations=1)
    finally:
        peer.close()
    for index, name in enumerate(("prefill", "decode")):
        mine, other = (middle([r[index] for r in rows]) for rows in (ours, theirs))
        benchmark.extra_info |= {
            f"{name}_tokens_per_s": round(mine, 1),
            f"{name}_llama_cpp": round(other, 1),
            f"{name}_ratio": round(mine / other, 2),
        }
    benchmark.extra_info["peer"] = peer.version
