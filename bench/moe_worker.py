"""A quantized model of ours in a process of its own, so that it can be limited or started cold.

``python -m bench.moe_worker DIRECTORY OPTIONS``: `OPTIONS` are those of `make_loop` as JSON. Then
it answers one JSON line per command, as ``peers/llama_moe.py`` does.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams


def resident_bytes(field="VmRSS"):
    """Return this process's resident size, or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) << 10


def run(loop, prompt, tokens, seed):
    """Run one request; return seconds to the first token, and from there to the last."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, loop.engine.config.vocab_size, prompt).tolist()
    begin = time.perf_counter()
    first = None
    loop.submit(
        Submit("x", ids, SamplingParams(temperature=1.0, seed=seed), tokens, ignore_eos=True)
    )
    while loop.busy:
        for _ in loop.step():
            first = first or time.perf_counter()
    return first - begin, time.perf_counter() - first


def main(directory, options):
    """Answer commands until the input ends."""
    before = resident_bytes()
    begin = time.perf_counter()
    loop = make_loop(directory, max_running=1, **options)
    print(json.dumps({"version": "pyruntime", "load_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prefill, decode = run(loop, command["prompt"], command["tokens"], command.get("seed", 1))
        answer = {
            "prefill_s": prefill,
            "decode_s": decode,
            "peak_bytes": resident_bytes("VmHWM") - before,
            "experts": loop.snapshot()["expert_memory"],
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
