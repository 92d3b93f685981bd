"""An engine in a process of its own: same answers as a thread, and it may be killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyruntime import errors
from pyruntime.engine.client import ThreadClient
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Delta, Submit, TokenLogprobs
from pyruntime.engine.process import ProcessClient, pack_delta, unpack_delta
from pyruntime.engine.sampling import SamplingParams
from pyruntime.models import shipped

PROMPT = list(range(20, 60))
DEADLINE_S = 60


def submits(count=4, size=24):
    options = {"temperature": 0.8, "logprobs": 2, "logit_bias": {30: 2.5}}
    return [
        Submit(
            f"r{i}",
            PROMPT[: 10 + 5 * i],
            SamplingParams(seed=2**63 + i, **options),
            size,
            ignore_eos=True,
        )
        for i in range(count)
    ]


async def collect(client, submit):
    return [delta async for delta in client.submit(submit)]


async def all_of(client, requests):
    tasks = (collect(client, request) for request in requests)
    return await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)


@pytest.fixture
def client():
    made = ProcessClient(str(shipped()), {"max_running": 8}, threads=1)
    yield made
    made.close()
    assert not made.alive


def test_deltas_survive_the_wire():
    for delta in (
        Delta("a"),
        Delta("b", [1, 2], [TokenLogprobs(1, -0.5, [(1, -0.5), (7, -2.0)])]),
        Delta("c", finish_reason="error", error="no", error_kind="invalid"),
        Delta("d", cached_tokens=32),
    ):
        assert unpack_delta(pack_delta(delta)) == delta


def test_a_process_answers_as_a_thread_does(client):
    streams = asyncio.run(all_of(client, submits()))
    thread = ThreadClient(make_loop(shipped()))
    try:
        wanted = asyncio.run(all_of(thread, submits()))
    finally:
        thread.close()
    for got, same in zip(streams, wanted, strict=True):
        assert [t for d in got for t in d.tokens] == [t for d in same for t in d.tokens]
        assert [d.logprobs for d in got] == [d.logprobs for d in same]
        assert got[-1].finish_reason == "length" and got[0].tokens == []
    assert client.about["max_len"] == 2048
    refused = asyncio.run(all_of(client, [Submit("x", [10**6]), Submit("y", [])]))
    assert [s[0].error_kind for s in refused] == ["invalid", "invalid"]


def test_aborts_explanations_and_stats_cross_the_process(client):
    async def main():
        stream = client.submit(Submit("long", PROMPT, max_tokens=1500, ignore_eos=True))
        async for delta in stream:
            if delta.tokens:
                break
        found = await asyncio.to_thread(client.explain, "long")
        assert found["state"] == "decode"
        assert await asyncio.to_thread(client.explain, "nobody") is None
        await stream.aclose()  # leaving aborts
        assert await client.drain(DEADLINE_S)
        with pytest.raises(errors.ClosedError):
            await collect(client, Submit("late", [5]))
        for _ in range(600):
            stats = client.stats()
            if stats["finished"].get("abort") and stats["kv_free_blocks"] == stats["kv_blocks"]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(stats)

    asyncio.run(main())


def test_a_killed_process_is_told_to_every_stream(client):
    ended = []
    client._on_end = lambda: ended.append(1)

    async def main():
        tasks = [asyncio.create_task(collect(client, s)) for s in submits(size=1500)]
        first = client.submit(Submit("probe", PROMPT, max_tokens=1500, ignore_eos=True))
        async for delta in first:
            if delta.tokens:
                break
        os.kill(client.process.pid, signal.SIGKILL)
        streams = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        last = [delta async for delta in first][-1]
        for delta in [last, *(stream[-1] for stream in streams)]:
            assert (delta.finish_reason, delta.error_kind) == ("error", "lost")
            assert "-9" in delta.error
        with pytest.raises(errors.ClosedError, match="-9"):
            await collect(client, Submit("late", [5]))
        assert client.stats()["failing"] and not client.alive
        assert await asyncio.to_thread(client.explain, "probe") is None

    asyncio.run(main())
    client._reader.join(DEADLINE_S)
    assert ended == [1]


def test_an_engine_that_cannot_start_says_why(tmp_path):
    with pytest.raises(errors.NotFoundError, match="config"):
        ProcessClient(str(tmp_path))
    with pytest.raises(errors.NotFoundError, match="policy"):
        ProcessClient(str(shipped()), {"policy": "nope"})


def test_close_ends_what_runs():
    client = ProcessClient(str(shipped()), threads=1)

    async def main():
        task = asyncio.create_task(collect(client, submits(1, 1500)[0]))
        while client.num_streams == 0:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(client.close)
        return (await asyncio.wait_for(task, DEADLINE_S))[-1]

    assert asyncio.run(main()).finish_reason in ("abort", "error")


ORPHAN = """
import sys, time
from pyruntime.engine.process import ProcessClient
from pyruntime.models import shipped
client = ProcessClient(str(shipped()), threads=1)
print(client.process.pid, flush=True)
time.sleep(600)
"""


def test_an_engine_does_not_outlive_its_client():
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    try:
        engine = int(parent.stdout.readline())
        assert running(engine)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + DEADLINE_S
    while running(engine):
        assert time.monotonic() < deadline, "the engine's process is still there"
        time.sleep(0.05)


def running(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
