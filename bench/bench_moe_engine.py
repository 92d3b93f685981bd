"""Quantized experts end to end, beside llama.cpp: all in memory, and in less memory than they need.

The models are random, of OLMoE's shape (16 layers, 64 experts of 1024, 8 used, hidden 2048); with
random weights routing is nearly uniform, which is the worst case for a cache. llama.cpp runs where
PYRUNTIME_LLAMA_PYTHON names an interpreter with `llama-cpp-python` and `gguf`. Every runner is a
process of its own; rounds alternate. Memory limits are cgroups where those are writable.
Files (18 GB at full shape) go to PYRUNTIME_BENCH_DIR, by default a temporary folder, and are used
again if they are there.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.models import quantized_model
from bench.support import middle, size
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.models import shipped
from pyruntime.moe import ExpertStore, makespan, plan_loads
from pyruntime.sched import ChunkedPrefill, LayeredPrefill, Policy

PEER = os.environ.get("PYRUNTIME_LLAMA_PYTHON")
SHAPE = {"hidden": 2048, "layers": 16, "experts": 64, "ffn": 1024, "vocab": 8192, "top_k": 8}
SMALL = {"hidden": 256, "layers": 2, "experts": 4, "ffn": 64, "vocab": 512, "top_k": 2}
CGROUP = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20


class Setting:
    """Shape and folder of the models, and how much to run."""

    def __init__(self, folder, disabled):
        self.disabled = disabled
        self.shape = SMALL if disabled else SHAPE
        given = os.environ.get("PYRUNTIME_BENCH_DIR")
        self.folder = Path(given) if given and not disabled else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.made("pyruntime")
        self.store = ExpertStore(self.model / "experts.mxs")
        self.experts = sum(e.bytes for e in self.store.extents if not e.dense)

    def made(self, name, **options):
        directory = self.folder / name
        if not (directory / "experts.mxs").exists():
            quantized_model(directory, **options, **self.shape)
        return directory

    def ours(self, limit=None, model=None, **options):
        model = str(model or self.model)
        command = [sys.executable, "-m", "bench.moe_worker", model, json.dumps(options)]
        return Runner(command, limit)

    def theirs(self, kind, limit=None):
        if not PEER:
            return None
        script = Path(__file__).parent / "peers" / "llama_moe.py"
        file = self.folder / f"{kind}.gguf"
        threads = str(len(os.sched_getaffinity(0)))
        return Runner([PEER, str(script), str(file), json.dumps(self.shape), kind, threads], limit)

    def forget(self):
        """Drop the models' pages from the page cache."""
        for path in (*self.folder.glob("*/experts.mxs"), *self.folder.glob("*.gguf")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Runner:
    """A process that answers commands, perhaps under a memory limit."""

    count = 0

    def __init__(self, command, limit=None):
        self.group = None
        if limit is not None:
            Runner.count += 1
            self.group = CGROUP / f"pyruntime-bench-{os.getpid()}-{Runner.count}"
            self.group.mkdir()
            (self.group / "memory.limit_in_bytes").write_text(str(limit))
            command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', self.group, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        line = self.process.stdout.readline()
        self.hello = json.loads(line) if line else None

    def run(self, prompt, tokens, seed=1):
        command = {"prompt": prompt, "tokens": tokens, "seed": seed}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        answer["prefill"] = prompt / answer["prefill_s"]
        answer["decode"] = (tokens - 1) / answer["decode_s"]
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        if self.group is not None:
            self.group.rmdir()


@pytest.fixture(scope="module")
def setting(request, tmp_path_factory):
    disabled = request.config.getoption("benchmark_disable")
    return Setting(tmp_path_factory.mktemp("models"), disabled)


def summary(answers, key):
    return round(middle([answer[key] for answer in answers]), 2)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("prompt", [32, 512])
@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_all_in_memory(benchmark, setting, bits, kind, prompt):
    """Decode and prefill speed with every expert in memory; attention has the experts' width.

    Decoding after a long prompt reads its keys and values too: both keep them in 16 bits.
    """
    prompt, tokens = (16, 3) if setting.disabled else (prompt, 33)
    model = setting.made(f"pyruntime-{bits}", bits=(bits,), attention_bits=bits)
    ours, theirs = setting.ours(model=model, kv_dtype="float16"), setting.theirs(kind)
    mine, other, seeds = [], [], itertools.count()

    def round_():
        seed = next(seeds)  # another prompt each time: ours would find the last one in memory
        mine.append(ours.run(prompt, tokens, seed))
        if theirs is not None:
            other.append(theirs.run(prompt, tokens, seed))

    round_()
    del mine[:], other[:]
    benchmark.pedantic(round_, rounds=1 if setting.disabled else 5, iterations=1)
    info = {f"{key}_tokens_per_s": summary(mine, key) for key in ("prefill", "decode")}
    if theirs is not None:
        for key in ("prefill", "decode"):
            info[f"{key}_llama_cpp_{kind}"] = summary(other, key)
            pairs = [a[key] / b[key] for a, b in zip(mine, other, strict=True)]
            info[f"{key}_ratio"] = round(middle(pairs), 2)
        info["peer"] = theirs.hello["version"]
        theirs.close()
    ours.close()
    benchmark.extra_info |= info


RUNS = {
    "8 bits": {"bit_policy": "fixed:8"},
    "4 bits": {"bit_policy": "fixed:4"},
    "4.2 bits": {"bit_policy": "average:4.2"},
    "rank 8,6,4": {"bit_policy": "rank:8,6,4"},
    "rank 8,6,4, what is there": {"bit_policy": "rank:8,6,4", "deterministic": False},
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.75, 1.0])
def test_less_memory_than_experts(benchmark, setting, share):
    """Cold start and decode under a memory limit of a share of the experts at 8 bits."""
    prompt, tokens = (16, 3) if setting.disabled else (32, 17)
    kv = 4 * MIB if setting.disabled else 64 * MIB
    dense = sum(e.bytes for e in setting.store.extents if e.dense)
    dense += (setting.model / "model.safetensors").stat().st_size
    slack = 40 * MIB if setting.disabled else 160 * MIB
    budget = int(share * setting.experts) + dense + 2 * kv + slack
    # What the interpreter and its libraries take is not in the budget, but in a limit.
    limit = budget + 256 * MIB if os.access(CGROUP, os.W_OK) else None
    info = {"budget_mb": budget >> 20, "limit": "none" if limit is None else "memory cgroup"}

    def run():
        for name, options in list(RUNS.items())[: 1 if setting.disabled else None]:
            setting.forget()
            ours = setting.ours(limit, memory_budget=budget, kv_bytes=kv, **options)
            answers = [ours.run(prompt, tokens, seed) for seed in (1, 2, 3)]
            ours.close()
            last = answers[-1]["experts"]
            info[name] = {
                "first_token_s": round(ours.hello["load_s"] + answers[0]["prefill_s"], 3),
                "decode_tokens_per_s": summary(answers[1:], "decode"),
                "peak_over_budget": round(answers[-1]["peak_bytes"] / budget, 3),
                "read_mb": last["bytes_read"] >> 20,
                "prefetch_useful_mb": last["prefetch_useful_bytes"] >> 20,
                "prefetch_wasted_mb": last["prefetch_wasted_bytes"] >> 20,
            }
        setting.forget()
        peer = setting.theirs("Q8_0", limit)
        if peer is None or peer.hello is None:
            return
        answers = [peer.run(prompt, tokens, seed) for seed in (1, 2, 3)]
        peer.close()
        info["llama.cpp mmap Q8_0"] = {
            "first_token_s": round(peer.hello["load_s"] + answers[0]["prefill_s"], 3),
            "decode_tokens_per_s": summary(answers[1:], "decode"),
        }

    benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info |= info


@pytest.mark.timeout(3600)
def test_first_token_of_a_cold_store(benchmark, setting):
    """Seconds from nothing to the first token, loading all of a 4-bit store or what is needed.

    The prompt has 8 tokens; nothing of the file is in memory before.
    """
    model = setting.made("pyruntime-4", bits=(4,), attention_bits=4)
    budget = (64 if setting.disabled else 8192) * MIB
    kv = (4 if setting.disabled else 64) * MIB
    ways = {
        "all at once": {"bits": 4, "kv_bytes": kv},
        "as needed": {"memory_budget": budget, "kv_bytes": kv},
    }
    taken = {name: [] for name in ways}

    def once():
        for name, options in ways.items():
            setting.forget()
            runner = setting.ours(model=model, **options)
            taken[name].append(runner.hello["load_s"] + runner.run(8, 2)["prefill_s"])
            runner.close()

    benchmark.pedantic(once, rounds=1 if setting.disabled else 3, iterations=1)
    seconds = {name: round(middle(each), 2) for name, each in taken.items()}
    pairs = zip(taken["as needed"], taken["all at once"], strict=True)
    benchmark.extra_info |= {
        "store_mb": (model / "experts.mxs").stat().st_size >> 20,
        "seconds": seconds,
        "ratio": round(middle([a / b for a, b in pairs]), 3),
        "target": 0.25,
    }


def test_expert_bytes_of_layered_prefill(benchmark):
    """Expert bytes of a long prompt, cut along layers or along tokens, on the model that ships."""
    tokens = size(benchmark, 2000, 300)
    rng = np.random.default_rng(5)
    prompt = rng.integers(5, 1000, tokens).tolist()
    read = {}

    def once():
        for name, partition in (
            ("chunks of 256", ChunkedPrefill(256)),
            ("layers", LayeredPrefill(256, 8192, 256)),
        ):
            loop = make_loop(shipped(), max_running=1, policy="layered")
            loop.scheduler.policy = Policy(name, partition=partition)
            loop.submit(Submit("x", prompt, SamplingParams(), 1, ignore_eos=True))
            while loop.busy:
                loop.step()
            read[name] = loop.stats.expert_bytes

    benchmark.pedantic(once, rounds=1, iterations=1)
    chunked, layered = read.values()
    benchmark.extra_info |= {
        "prompt": tokens,
        "expert_mb": {name: round(each / 1e6, 1) for name, each in read.items()},
        "ratio": round(layered / chunked, 3),
        "target": 0.65,
    }


def test_order_of_loads(benchmark):
    """Time until a layer is computed, by the order of its loads, over that of the best order.

    Up to six experts at random widths and counts of tokens, at most seven planes missing; a plane
    takes its bytes to load, and a token three hundredths of that to compute.
    """
    rng = np.random.default_rng(2)
    load, compute = np.array([1.0, 0.5, 0.5]), np.array([0.03, 0.04, 0.05])
    ratios = {order: [] for order in ("hebf", "johnson", "id")}

    def once():
        while len(ratios["id"]) < size(benchmark, 300, 5):
            experts = int(rng.integers(2, 7))
            counts = rng.geometric(0.1, (experts, 3)) * (rng.random((experts, 3)) < 0.4)
            resident = rng.integers(0, 3, experts).astype(np.int32)
            wanted = [max(np.flatnonzero(c), default=-1) + 1 for c in counts]
            missing = {e: w - int(r) for e, (w, r) in enumerate(zip(wanted, resident, strict=True))}
            missing = {e: n for e, n in missing.items() if n > 0}
            if not 2 <= sum(missing.values()) <= 7:
                continue
            least = min(
                makespan(counts, resident, load, compute, planes)
                for planes in orders([], missing, resident)
            )
            for order, each in ratios.items():
                each.append(plan_loads(counts, resident, load, compute, order)[1] / least)

    benchmark.pedantic(once, rounds=1, iterations=1)
    mean = {order: float(np.mean(each)) for order, each in ratios.items()}
    benchmark.extra_info |= {f"{order} over the best": round(m, 3) for order, m in mean.items()}
    benchmark.extra_info |= {
        "hebf over id": round(mean["hebf"] / mean["id"], 3),
        "target over id": 0.9,
        "target over the best": 1.1,
    }


def orders(begun, missing, resident):
    """Yield every order of the missing planes in which an expert's come one after the other."""
    if not missing:
        yield begun
    for expert, left in missing.items():
        plane = (expert, int(resident[expert]) + sum(e == expert for e, _ in begun))
        rest = {e: n - (e == expert) for e, n in missing.items() if e != expert or left > 1}
        yield from orders([*begun, plane], rest, resident)
