"""Cost of serving: CPU per streamed token of server and scheduler, and HTTP against in-process.

The CPU figure excludes client and model: the server runs in its own process on an engine that
answers after 20 ms without computing. The ratios run a real engine both ways, in rounds that
alternate: tokens/s through HTTP over tokens/s of the loop itself.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bench.models import random_model
from bench.support import middle, size
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.models import shipped

ROOT = Path(__file__).resolve().parents[1]

SERVER = """
import sys, time
import numpy as np, uvicorn
from pyruntime import ops
from pyruntime.engine.client import ThreadClient
from pyruntime.engine.llm import make_loop
from pyruntime.engine.runner import StepResult
from pyruntime.engine.text import Tokenizer
from pyruntime.models import shipped
from pyruntime.serve.app import ServerConfig, create_app

model, port, null = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "null"
loop = make_loop(model, max_running=64)

def instant(plan, tables, stop=None, return_logits=False):
    time.sleep(0.02)
    known = loop.engine._sequences
    rows = [r for r in plan.decode.tolist()] + [
        r for r, _, high, _, last in plan.prefill.tolist() if high == known[r].size
    ]
    n = len(rows)
    for r in rows:
        known[r].append(300)
    sampled = ops.SampleResult(np.full(n, 300, np.int32), np.zeros(n, np.float32),
        np.zeros((n, 20), np.int32), np.zeros((n, 20), np.float32), np.zeros(n, np.uint8))
    return StepResult(plan.id, False, [], rows, sampled)

if null:
    loop.engine.run = instant
app = create_app(ThreadClient(loop), Tokenizer(shipped()), ServerConfig("m", 2048))
uvicorn.run(app, port=port, log_config=None, access_log=False)
"""


class Process:
    """The server in a process of its own."""

    def __init__(self, model, kind):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(model), str(port), kind], cwd=ROOT
        )
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError("the server did not start")

    def cpu_s(self):
        """User and system time so far, of all threads, to the nanosecond."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def close(self):
        self.process.kill()
        self.process.wait()


async def _stream(port, count, tokens):
    """Read `count` streams over plain sockets, so that the client costs little."""
    body = json.dumps(
        {
            "prompt": [5] * 16,
            "max_tokens": tokens,
            "temperature": 1,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    )

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        tail = b""
        while data := await reader.read(1 << 16):
            tail = (tail + data)[-1000:]
        writer.close()
        return int(re.search(rb'"completion_tokens": (\d+)', tail)[1])

    return sum(await asyncio.gather(*(one() for _ in range(count))))


def over_http(process, streams, tokens):
    """Return tokens per second and CPU seconds per token of the server's process."""
    port = int(process.url.rpartition(":")[2])
    cpu, begin = process.cpu_s(), time.perf_counter()
    received = asyncio.run(_stream(port, streams, tokens))
    seconds = time.perf_counter() - begin
    assert received == streams * tokens, "a stream was cut short"
    return streams * tokens / seconds, (process.cpu_s() - cpu) / (streams * tokens)


def in_process(loop, streams, tokens):
    """Return tokens per second of the loop."""
    for index in range(streams):
        sampling = SamplingParams(temperature=1.0, seed=index)  # or all choose the same experts
        loop.submit(Submit(f"{index}", [5] * 16, sampling, tokens, ignore_eos=True))
    begin = time.perf_counter()
    while loop.busy:
        loop.step()
    return streams * tokens / (time.perf_counter() - begin)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("streams", [8, 64])
def test_cpu_per_streamed_token(benchmark, streams):
    process = Process(shipped(), "null")
    tokens = size(benchmark, 100, 5)
    try:
        over_http(process, streams, tokens // 5)
        costs = []
        benchmark.pedantic(
            lambda: costs.append(over_http(process, streams, tokens)[1]), rounds=5, iterations=1
        )
        benchmark.extra_info["cpu_us_per_token"] = round(1e6 * middle(costs), 1)
    finally:
        process.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("streams", [8, 64])
@pytest.mark.parametrize("kind", ["random", "shipped"])
def test_http_against_in_process(benchmark, tmp_path, kind, streams):
    width = size(benchmark, 1280, 256)
    model = shipped()
    if kind == "random":
        model = random_model(tmp_path, hidden=width, ffn=width // 2)
    loop = make_loop(model, max_running=64)
    process = Process(model, "real")
    tokens = size(benchmark, 200 if streams == 8 else 100, 4)
    http, inside = [], []

    def round_():
        inside.append(in_process(loop, streams, tokens))
        http.append(over_http(process, streams, tokens)[0])

    try:
        round_()
        del http[:], inside[:]
        benchmark.pedantic(round_, rounds=3, iterations=1)
        steps = list(loop.recent)[-tokens // 2 :]
        benchmark.extra_info |= {
            "step_ms": round(1000 * middle([s.seconds for s in steps]), 2),
            "http_tokens_per_s": round(middle(http)),
            "in_process_tokens_per_s": round(middle(inside)),
            "ratio": round(middle([h / i for h, i in zip(http, inside, strict=True)]), 3),
        }
    finally:
        process.close()
