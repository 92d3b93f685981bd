"""Keys and values of served text on disk: the same text, less to compute, also after a restart."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest

from pyruntime import LLM, errors
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.process import ProcessClient
from pyruntime.kv import DiskCache, DiskTier, KvGroup, KvStorage, ServingPool
from pyruntime.models import shipped
from tests.serving import Server

DISK = 64 << 20
PROMPT = list(range(30, 130))


def fresh(path=None, **options):
    if path is not None:
        options |= {"disk_cache": path, "disk_bytes": DISK}
    return make_loop(shipped(), **options)


def serve(loop, *prompts, tenant="", size=20):
    """Return tokens and cached tokens of each prompt, served one after the other."""
    found = []
    for number, prompt in enumerate(prompts):
        loop.submit(Submit(f"{number}", prompt, max_tokens=size, ignore_eos=True, tenant=tenant))
        tokens, cached = [], 0
        while loop.busy:
            for delta in loop.step():
                tokens += delta.tokens
                cached += delta.cached_tokens
                assert not delta.error
        found.append((tokens, cached))
    loop.pool.check()
    assert loop.pool.num_free == loop.pool.num_blocks
    return found


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("fcfs", "float32"), ("layered", "float32"), ("swap", "float32"), ("fcfs", "float16")],
)
def test_text_is_the_same_after_a_restart(tmp_path, policy, dtype):
    options = {"policy": policy, "kv_dtype": dtype}
    [(wanted, none)] = serve(fresh(**options), PROMPT)
    assert none == 0
    first = fresh(tmp_path / "kv", **options)
    assert serve(first, PROMPT) == [(wanted, 0)]
    assert serve(first, PROMPT) == [(wanted, 96)]  # from memory
    assert first.pool.stats()["disk_found"] == 0
    first.close()
    second = fresh(tmp_path / "kv", **options)
    assert serve(second, PROMPT) == [(wanted, 96)]
    second.close()
    second.close()
    serve(second, PROMPT)  # goes on without
    turn = [*PROMPT, *wanted, 5, 6]
    third = fresh(tmp_path / "kv", **options)
    assert serve(third, turn) == [(serve(fresh(**options), turn)[0][0], 112)]
    stats = third.snapshot()["kv"]
    assert stats["disk_asked_blocks|found"] == 7  # one of the answer as well
    assert stats["disk_blocks"] >= 7 and stats["disk_failures"] == 0
    assert stats["disk_bytes|read"] == 7 * third.pool._disk.tier.item_bytes
    third.close()


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_disk_cache import *\n"
        f"loop = fresh({str(tmp_path / 'kv')!r})\n"
        "serve(loop, PROMPT)\n"
        "assert loop.pool._disk.flush(60)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    loop = fresh(tmp_path / "kv")
    assert serve(loop, PROMPT) == [(serve(fresh(), PROMPT)[0][0], 96)]
    loop.close()


def test_tenants_never_share(tmp_path):
    loop = fresh(tmp_path / "kv")
    serve(loop, PROMPT, tenant="a")
    loop.close()
    loop = fresh(tmp_path / "kv")
    [(_, other)] = serve(loop, PROMPT, tenant="b")
    [(_, nobody)] = serve(loop, PROMPT)
    [(_, same)] = serve(loop, PROMPT, tenant="a")
    assert (other, nobody, same) == (0, 0, 96)
    loop.close()


def test_damaged_blocks_are_computed(tmp_path):
    path = tmp_path / "kv"
    [(wanted, _)] = serve(fresh(), PROMPT)
    loop = fresh(path)
    serve(loop, PROMPT)
    item_bytes = loop.pool._disk.tier.item_bytes
    assert item_bytes % 4096 == 0
    loop.close()
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[40:48], "little")  # of slot 0
    for at in range(offset + 2 * item_bytes + 99, len(data), item_bytes):
        data[at] ^= 1
    path.write_bytes(data)
    loop = fresh(path)
    [(tokens, cached)] = serve(loop, PROMPT)
    assert tokens == wanted and cached == 32
    assert loop.pool.stats()["disk_corrupt"] == 4
    assert serve(loop, PROMPT) == [(wanted, 96)]
    loop.close()


def test_failing_disks_are_misses(tmp_path, caplog):
    [(wanted, _)] = serve(fresh(), PROMPT)
    loop = fresh(tmp_path / "kv")
    serve(loop, PROMPT)
    loop.close()
    loop = fresh(tmp_path / "kv")
    core = loop.pool._disk.tier._open
    core.fail_io(1, 3)  # a read
    assert serve(loop, PROMPT) == [(wanted, 0)]
    core.fail_io(1, 2)  # nothing can be written any more
    assert serve(loop, PROMPT[1:]) == serve(fresh(), PROMPT[1:])
    assert loop.pool._disk.flush(60)
    stats = loop.pool.stats()
    assert stats["disk_failures"] >= 2 and stats["disk_write_failures"] >= 1
    assert "reading KV blocks from disk failed" in caplog.text
    assert "writing KV blocks to disk failed" in caplog.text
    loop.close()


def test_other_models_files_are_refused(tmp_path):
    loop = fresh(tmp_path / "kv")
    with pytest.raises(errors.StateError, match="in use"):
        fresh(tmp_path / "kv")
    loop.close()
    other = shutil.copytree(shipped(), tmp_path / "model")
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    with pytest.raises(errors.InvalidArgumentError, match="has blocks of"):
        make_loop(other, disk_cache=tmp_path / "kv", disk_bytes=DISK)
    with pytest.raises(errors.InvalidArgumentError, match="slots"):
        make_loop(shipped(), disk_cache=tmp_path / "kv", disk_bytes=2 * DISK)


@pytest.mark.parametrize("policy", ["fcfs", "swap"])
def test_a_small_pool_takes_what_fits(tmp_path, policy):
    """Prompts of many requests at a time, more than memory holds, come back from disk."""
    prompts = [[i, *PROMPT] for i in range(20, 32)]
    wanted = serve(fresh(), *prompts)
    options = {"kv_bytes": 24 << 20, "max_running": 4, "policy": policy, "swap_bytes": 4 << 20}
    loop = fresh(tmp_path / "kv", **options)
    per_block = loop.pool._disk.tier.item_bytes
    loop.close()
    options["kv_bytes"] = 20 * per_block  # two prompts and their answers
    os.unlink(tmp_path / "kv")
    for _ in range(2):
        loop = fresh(tmp_path / "kv", **options)
        found = {}
        for i, prompt in enumerate(prompts):
            loop.submit(Submit(f"{i}", prompt, max_tokens=20, ignore_eos=True))
        while loop.busy:
            for delta in loop.step():
                found.setdefault(int(delta.id), []).extend(delta.tokens)
        assert [found[i] for i in range(len(prompts))] == [tokens for tokens, _ in wanted]
        loop.pool.check()
        loop.close()
    assert loop.stats.cached_tokens >= 96 * len(prompts)


def test_the_library_and_a_process(tmp_path):
    options = {"disk_cache": str(tmp_path / "kv"), "disk_bytes": DISK}
    with LLM(**options) as llm:
        [wanted] = llm.generate([PROMPT], max_tokens=8)
    with LLM(**options) as llm:
        assert llm.generate([PROMPT], max_tokens=8)[0].tokens == wanted.tokens
        assert llm.loop.stats.cached_tokens == 96
    client = ProcessClient(str(shipped()), options, threads=1)

    async def ask():
        request = Submit("a", PROMPT, max_tokens=8)
        return [delta async for delta in client.submit(request)]

    try:
        deltas = asyncio.run(asyncio.wait_for(ask(), 60))
        assert [t for delta in deltas for t in delta.tokens] == wanted.tokens
        assert sum(delta.cached_tokens for delta in deltas) == 96
    finally:
        client.close()


def metric(server, name):
    text = httpx.get(f"{server.url}/metrics").text
    [value] = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
    return float(value)


def test_a_server_finds_them_after_it_was_stopped_and_killed(tmp_path):
    options = ("--disk-cache", tmp_path / "kv", "--disk-memory", 64)
    keys = ("--api-key", "one:a", "--api-key", "two:b")
    texts, found, cached = [], [], []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        server = Server(*options, *keys)
        for key in ("one", "two") if end == signal.SIGKILL else ("one",):
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": "tiny-moe", "prompt": PROMPT, "max_tokens": 8, "temperature": 0},
                headers={"Authorization": f"Bearer {key}"},
                timeout=60,
            ).json()
            texts.append(answer["choices"][0]["text"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        found.append(metric(server, 'pyruntime_kv_disk_asked_blocks_total{result="found"}'))
        assert "disk_blocks" in server.status()["kv"]
        server.stop(end)
    assert len(set(texts)) == 1
    assert found == [0, 6, 6]
    assert cached == [0, 96, 0, 96]  # the second tenant computes


def pool_with_disk(path, groups, **options):
    storage = KvStorage.allocate(groups, 16, 2, 8)
    item = DiskCache.item_bytes(storage)
    tier = DiskTier(path, item_bytes=item, capacity_bytes=64 * (item + 8192))
    cache = DiskCache(tier, storage, 4, **options)
    layers = len(storage.keys)
    return ServingPool(16, 4, layers, groups, storage=storage, disk=cache), storage, cache


def compute(pool, storage, request, tokens, first, end):
    """Give tokens first..end keys and values that tell token and layer, as a model would."""
    tables = pool.step([(request, end)])
    for layer, (keys, values) in enumerate(zip(storage.keys, storage.values, strict=True)):
        row = tables.groups[storage.group_of[layer]].tables[tables.row_of[request]]
        for t in range(first, end):
            keys[row[t // 4], t % 4] = 1000 * layer + tokens[t]
            values[row[t // 4], t % 4] = 1000 * layer - tokens[t]
    pool.commit(request, end, len(storage.keys), tokens)


@pytest.mark.parametrize("blocks", [64, 9, 4, 1])
def test_windows_and_groups(tmp_path, blocks):
    groups = [KvGroup((0, 2), 0, 4), KvGroup((1,), 6, 4)]
    tokens = np.arange(40, dtype=np.int32)
    pool, storage, _ = pool_with_disk(tmp_path / "kv", groups)
    assert pool.admit(1, tokens) == 0
    for first, end in ((0, 10), (10, 11), (11, 30), (30, 40)):
        compute(pool, storage, 1, tokens, first, end)
    pool.close()
    item = DiskCache.item_bytes(storage)
    pool, storage, cache = pool_with_disk(tmp_path / "kv", groups, queue_bytes=blocks * item)
    sizes, load = [], cache.load
    cache.load = lambda keys: sizes.append(len(keys)) or load(keys)
    assert pool.admit(1, tokens) == 36
    assert cache.stats()["found"] == sum(sizes) == 9
    assert max(sizes) <= blocks
    tables = pool.step([(1, 40)])
    for layer in range(3):
        row = tables.groups[storage.group_of[layer]].tables[0]
        seen = range(36) if layer != 1 else range(32, 36)
        for t in seen:
            assert (storage.keys[layer][row[t // 4], t % 4] == 1000 * layer + t).all()
            assert (storage.values[layer][row[t // 4], t % 4] == 1000 * layer - t).all()
    pool.check()
    pool.close()


def test_a_full_queue_drops_what_it_never_takes(tmp_path):
    groups = [KvGroup((0,), 0, 4)]
    tokens = np.arange(48, dtype=np.int32)
    options = {"queue_bytes": 6 * 512}
    pool, storage, cache = pool_with_disk(tmp_path / "kv", groups, **options)
    with cache._wake:  # holds the writer
        pool.admit(1, tokens)
        compute(pool, storage, 1, tokens, 0, 16)
        compute(pool, storage, 1, tokens, 16, 40)
        assert cache.stats()["queued"] == 6 and cache.stats()["dropped"] == 0
    assert cache.flush(60)
    compute(pool, storage, 1, tokens, 40, 44)  # what was not taken is tried again
    assert cache.flush(60) and cache.tier.stats()["items"] == 11
    pool.free(1)
    pool.admit(2, tokens[::-1].copy())
    with cache._wake:
        compute(pool, storage, 2, tokens[::-1].copy(), 0, 40)
        pool.free(2)
    pool.close()
    assert cache.stats()["dropped"] == 4
    pool, storage, cache = pool_with_disk(tmp_path / "kv", groups, **options)
    assert pool.admit(1, tokens) == 44
    assert pool.admit(2, tokens[::-1].copy()) == 0  # 11 of 16 blocks are taken
    pool.check()
    pool.free(1)
    pool.free(2)
    assert pool.admit(2, tokens[::-1].copy()) == 24
    pool.check()
    pool.close()
