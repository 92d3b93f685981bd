"""The disk tier: blocks in one file beside a file for each block, and prompts that come back.

A file for each block, named by its key, is what the file backends of other servers do. Both sides
are durable when a put returns; both are read through the page cache, which is warm here, so reads
compare what lies above the disk.
"""

import itertools
import os
import time

import numpy as np
import pytest

from bench.support import size
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.text import Tokenizer
from pyruntime.kv import DiskTier
from pyruntime.models import shipped

ITEM = 128 << 10
now = time.perf_counter


class Files:
    """A file for each block: written under another name, synced, renamed; no checksum."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def put(self, keys, data):
        for key, item in zip(keys, data, strict=True):
            path = self.folder / key.tobytes().hex()
            with open(f"{path}.part", "wb") as file:
                file.write(item)
                os.fsync(file.fileno())
            os.rename(f"{path}.part", path)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def get(self, keys, out):
        for key, item in zip(keys, out, strict=True):
            with open(self.folder / key.tobytes().hex(), "rb") as file:
                file.readinto(item)


@pytest.mark.parametrize("blocks", [1, 64])
def test_put_and_get(benchmark, tmp_path, blocks):
    """Milliseconds of calls with `blocks` blocks of 128 KiB."""
    rounds = size(benchmark, 15, 1)
    rng = np.random.default_rng(1)
    tier = DiskTier(tmp_path / "kv", item_bytes=ITEM, capacity_bytes=(blocks * 20 + 80) * 2 * ITEM)
    sides = {"one file": tier, "a file each": Files(tmp_path / "files")}
    found = {f"{name}, {call}": [] for name in sides for call in ("put", "get")}

    def round_():
        keys = rng.integers(0, 256, (blocks, 32), np.uint8)
        data = rng.integers(0, 256, (blocks, ITEM), np.uint8)
        out = np.empty_like(data)
        for name, side in sides.items():
            begin = now()
            side.put(keys, data)
            found[f"{name}, put"].append(now() - begin)
            begin = now()
            side.get(keys, out)
            found[f"{name}, get"].append(now() - begin)
            assert (out == data).all()

    benchmark.pedantic(round_, rounds=rounds, iterations=1)
    benchmark.extra_info |= {
        name: round(1e3 * float(np.median(values)), 3) for name, values in found.items()
    }
    tier.close()


@pytest.mark.parametrize("tokens", [128, 480])
def test_time_to_first_token_after_a_restart(benchmark, tmp_path, tokens):
    """Of a prompt that must be computed, and one whose blocks an earlier process left."""
    ids = Tokenizer(shipped()).encode("The list is a list of values. " * 200)[:tokens]
    names, found = map(str, itertools.count()), {"recompute": [], "from disk": []}
    options = {"disk_cache": tmp_path / "kv", "disk_bytes": 64 << 20, "kv_bytes": 64 << 20}

    def first_token(loop, tenant):
        begin = now()
        loop.submit(Submit(next(names), ids, max_tokens=1, ignore_eos=True, tenant=tenant))
        while not any(delta.tokens for delta in loop.step()):
            pass
        return now() - begin

    def round_():
        tenant = next(names)
        loop = make_loop(shipped(), **options)
        first_token(loop, "")  # the first step of a loop is slower
        found["recompute"].append(first_token(loop, tenant))
        loop.close()
        loop = make_loop(shipped(), **options)
        first_token(loop, next(names))
        found["from disk"].append(first_token(loop, tenant))
        assert loop.pool.stats()["disk_found"] > 0
        loop.close()

    benchmark.pedantic(round_, rounds=size(benchmark, 9, 1), iterations=1)
    middle = {name: float(np.median(values)) for name, values in found.items()}
    benchmark.extra_info |= {
        "tokens": len(ids),
        **{f"{name}, ms": round(1e3 * value, 3) for name, value in middle.items()},
        "recompute / from disk": round(middle["recompute"] / middle["from disk"], 2),
    }
