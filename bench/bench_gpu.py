"""Copies on a GPU beside what one would write with cupy, in alternating rounds; needs a device.

Times are CUDA events on one stream. `extra_info` has GB/s (bytes copied, once), the peers' best
times and the ratio (above 1: we are faster).
"""

import numpy as np
import pytest

from pyruntime import gpu
from pyruntime.kv import device
from pyruntime.pool import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.available(), reason="no CUDA device, or built without CUDA"),
]
ROUNDS = 30


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def compare(benchmark, cp, num_bytes, ours, **peers):
    """Device seconds of ours and of the peers."""
    stream = cp.cuda.get_current_stream()

    def seconds(work):
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return cp.cuda.get_elapsed_time(begin, end) / 1e3

    times = {name: [] for name in ("ours", *peers)}
    for _ in range(ROUNDS):
        for name, work in (("ours", ours), *peers.items()):
            times[name].append(seconds(work))
    best = {name: min(values[3:]) for name, values in times.items()}
    benchmark.pedantic(lambda: seconds(ours), rounds=5)
    benchmark.extra_info["gb_per_s"] = round(num_bytes / best["ours"] / 1e9, 1)
    for name in peers:
        benchmark.extra_info[f"{name}_us"] = round(1e6 * best[name], 1)
        benchmark.extra_info[f"ratio_{name}"] = round(best[name] / best["ours"], 2)


LAYERS, BLOCKS, BLOCK = 32, 2048, (16, 8, 128)  # 32 KiB per part of a block and layer, float16


@pytest.mark.parametrize("length", [1, 4, 16, 60])
@pytest.mark.parametrize("pinned", [False, True], ids=["device", "pinned"])
def test_kv_gather(benchmark, cp, length, pinned):
    total = 120
    cache = cp.zeros((LAYERS, 2, BLOCKS, *BLOCK), cp.float16)
    shape = (total, LAYERS, 2, *BLOCK)
    if pinned:
        import cupyx

        buffer = cupyx.zeros_pinned(shape, np.float16)
    else:
        buffer = cp.zeros(shape, cp.float16)
    starts = np.random.default_rng(0).permutation(BLOCKS // length)[: total // length] * length
    runs = [(int(start), i * length, length) for i, start in enumerate(starts)]
    on_device = cp.asarray(device.runs_of(runs))
    piece = int(np.prod(BLOCK)) * 2
    base, to = cache.data.ptr, buffer.ctypes.data if pinned else buffer.data.ptr
    stream = cp.cuda.get_current_stream()

    def memcpy_per_run():
        kind = cp.cuda.runtime.memcpyDefault
        for start, place, count in runs:
            for layer in range(LAYERS):
                for part in range(2):
                    # The buffer's rows of one part are a block apart: a strided copy per run.
                    cp.cuda.runtime.memcpy2DAsync(
                        to + (place * LAYERS * 2 + layer * 2 + part) * piece,
                        LAYERS * 2 * piece,
                        base + ((layer * 2 + part) * BLOCKS + start) * piece,
                        piece,
                        piece,
                        count,
                        kind,
                        stream.ptr,
                    )

    compare(
        benchmark,
        cp,
        total * LAYERS * 2 * piece,
        lambda: device.gather(cache, buffer, on_device, stream=stream),
        memcpy=memcpy_per_run,
    )


@pytest.mark.parametrize("object_bytes", [256, 2048, 65536])
def test_pool_read(benchmark, cp, object_bytes):
    n = (64 << 20) // object_bytes
    with Pool(object_bytes, 2 * n) as pool:
        pool.pin()
        where = np.random.default_rng(0).permutation(2 * n)[:n].astype(np.uint32)
        indices = cp.asarray(where)
        out = cp.empty((n, object_bytes), cp.uint8)
        staged = np.empty((n, object_bytes), np.uint8)

        def through_the_host():
            pool.read(where, staged)
            out.set(staged)

        compare(
            benchmark,
            cp,
            n * object_bytes,
            lambda: pool.read_async(indices, out, stream=cp.cuda.get_current_stream()),
            through_the_host=through_the_host,
        )
