"""Expert kernels beside llama.cpp's at each width.

llama.cpp: set PYRUNTIME_LLAMA_PYTHON to an interpreter that has `llama-cpp-python`; without it its
rows are skipped. Both run one thread, in turns, over matrices that together exceed the caches; so
does a plain read of as many bytes, which is what memory gives one thread.
"""

import os
import subprocess
import time
from pathlib import Path

import numba
import numpy as np
import pytest

import pyruntime
from pyruntime.moe import NestedMatrix, isa

PEER = Path(__file__).parent / "peers" / "llama_matvec.py"
ROWS, COLUMNS = 4096, 2048
# our layout and level, and llama.cpp's types of about the same bytes, by nominal width
WIDTHS = {
    2: ([2], ("Q2_K",)),
    4: ([4], ("Q4_0", "Q4_K")),
    6: ([4, 6], ("Q6_K",)),
    8: ([4, 8], ("Q8_0",)),
}


class Ours:
    """Matrix-vector products over copies of one matrix, more than the caches hold."""

    def __init__(self, bits, copies, rows=ROWS):
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)
        first = NestedMatrix.quantize(weights, bits)
        # One block, which numpy asks huge pages for, as the cache of experts does.
        sizes = [-(-plane.nbytes // 64) * 64 for plane in first.planes]
        self.memory = np.zeros(copies * sum(sizes) + 64, np.uint8)
        at = -self.memory.ctypes.data % 64
        self.matrices = []
        for _ in range(copies):
            planes = []
            for plane, size in zip(first.planes, sizes, strict=True):
                planes.append(self.memory[at : at + plane.nbytes])
                planes[-1][:] = plane
                at += size
            self.matrices.append(
                NestedMatrix(rows, COLUMNS, bits, planes, 1.0, first.error, 1.0, first.level)
            )
        self.x = rng.standard_normal((1, COLUMNS), np.float32)
        self.weights = copies * rows * COLUMNS
        self.bits_per_weight = 8 * first.nbytes / rows / COLUMNS

    def run(self):
        for matrix in self.matrices:
            matrix.linear(self.x)

    def rate(self):
        """10^9 weights per second of this thread's CPU time."""
        begin = time.thread_time()
        self.run()
        return self.weights / (time.thread_time() - begin) / 1e9


@numba.njit(fastmath=True)
def read(words):
    """Read four streams side by side: faster than one on every machine we tried."""
    part = len(words) // 4
    a = b = c = d = np.uint64(0)
    for i in range(part):
        a += words[i]
        b += words[part + i]
        c += words[2 * part + i]
        d += words[3 * part + i]
    return a + b + c + d


def read_rate(memory):
    """10^9 bytes per second of this thread's CPU time."""
    words = memory[: memory.nbytes // 32 * 32].view(np.uint64)
    begin = time.thread_time()
    read(words)
    return words.nbytes / (time.thread_time() - begin) / 1e9


class Peer:
    """llama.cpp's dot products on one type, in a process of its own."""

    def __init__(self, kind, copies, rows=ROWS):
        python = os.environ.get("PYRUNTIME_LLAMA_PYTHON")
        if not python:
            pytest.skip("set PYRUNTIME_LLAMA_PYTHON to compare with llama.cpp")
        self.process = subprocess.Popen(
            [python, str(PEER), kind, str(rows), str(COLUMNS), str(copies)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if "ready" not in self.process.stdout.readline():
            pytest.skip(f"the peer cannot run {kind}")

    def rate(self):
        print("go", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture
def one_thread():
    threads = pyruntime._ext._native.threads_size()
    pyruntime.set_num_threads(1)
    yield
    pyruntime.set_num_threads(threads)


def size_for(benchmark, copies=24):
    """Copies and rows: small when nothing is timed."""
    return (copies, ROWS) if benchmark.enabled else (1, 64)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("where", ["memory", "cache"])
def test_matvec(benchmark, one_thread, bits, where):
    ours = Ours(WIDTHS[bits][0], *size_for(benchmark, 24 if where == "memory" else 1))
    benchmark.group = f"matvec {ROWS}x{COLUMNS} {bits} bits, {where}"
    benchmark.extra_info |= {
        "isa": isa(),
        "bits_per_weight": ours.bits_per_weight,
        "Gw/s": round(max(ours.rate() for _ in range(3)), 2),
    }
    benchmark(ours.run)


@pytest.mark.parametrize("bits", WIDTHS)
def test_matvec_beside_llama_cpp(benchmark, one_thread, bits):
    rounds = 15 if benchmark.enabled else 1
    size = size_for(benchmark)
    ours = Ours(WIDTHS[bits][0], *size)
    benchmark.group = f"matvec {ROWS}x{COLUMNS} {bits} bits beside llama.cpp"
    read_rate(ours.memory)  # compiles it
    shares = []
    for kind in WIDTHS[bits][1]:
        peer = Peer(kind, *size)
        pairs = []
        for _ in range(rounds):
            pairs.append((ours.rate(), peer.rate()))
            used = pairs[-1][0] * ours.bits_per_weight / 8
            shares.append(used / read_rate(ours.memory))
        peer.close()
        mine, theirs = (float(np.median(column)) for column in zip(*pairs, strict=True))
        ratio = float(np.median([a / b for a, b in pairs]))
        benchmark.extra_info[kind] = {"ours": mine, "theirs": theirs, "ratio": ratio}
    benchmark.extra_info["share of a plain read"] = round(float(np.median(shares)), 3)
    benchmark(ours.run)


@pytest.mark.parametrize("tokens", [1, 4, 64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_tokens(benchmark, bits, tokens):
    ours = Ours(WIDTHS[bits][0], *size_for(benchmark, 1))
    ours.x = np.repeat(ours.x, tokens, axis=0)
    benchmark.group = f"{tokens} tokens, {bits} bits"
    benchmark(ours.run)
