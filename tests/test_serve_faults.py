"""Faults behind the server: each has its status code, ends alone, and leaks no block."""

import asyncio
import json

import httpx
import pytest

from pyruntime.engine.client import ThreadClient
from pyruntime.engine.llm import make_loop
from pyruntime.engine.text import Tokenizer
from pyruntime.models import shipped
from pyruntime.serve.app import ServerConfig, create_app

BLOCK_BYTES = 16 * 4096
DEADLINE_S = 60


class InProcess:
    """The application over an engine thread, without a socket."""

    def __init__(self, **options):
        self.loop = make_loop(shipped(), **options)
        self.client = ThreadClient(self.loop)
        self.app = create_app(self.client, Tokenizer(shipped()), ServerConfig("m", 2048))

    def post(self, *bodies):
        async def main():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://m", timeout=DEADLINE_S
            ) as http:
                posts = (http.post("/v1/completions", json=body) for body in bodies)
                return await asyncio.gather(*posts)

        return asyncio.run(main())

    def idle(self):
        """Wait until all has ended, then check that no block is lost."""
        self.client._idle.wait(DEADLINE_S)
        self.loop.pool.check()
        assert self.loop.pool.num_free == self.loop.pool.num_blocks
        assert self.loop.engine.hidden_bytes == 0 and not self.loop.engine._sequences


@pytest.fixture
def served():
    made = []

    def make(**options):
        made.append(InProcess(**options))
        return made[-1]

    yield make
    for each in made:
        each.client.close()


def body(prompt, tokens=8, **fields):
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **fields}


def test_prompts_and_outputs_larger_than_kv_memory(served):
    server = served(kv_bytes=8 * BLOCK_BYTES)  # 128 tokens
    long, exact, output = server.post(
        body([5] * 400), body([5] * 128), body([5] * 100, tokens=1000)
    )
    assert long.status_code == exact.status_code == 400
    assert "never fit in KV memory" in long.json()["error"]["message"]
    assert output.status_code == 200
    assert output.json()["choices"][0]["finish_reason"] == "length"
    assert output.json()["usage"]["completion_tokens"] == 28
    server.idle()


def test_requests_that_fill_memory_together_all_finish(served):
    server = served(kv_bytes=8 * BLOCK_BYTES)
    answers = server.post(*(body([i + 5] * 40, tokens=60) for i in range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {a.json()["choices"][0]["finish_reason"] for a in answers} == {"length"}
    assert server.loop.stats.preemptions > 0
    server.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_in_a_step_is_one_requests_error(served, monkeypatch, stream):
    server = served()
    real = server.loop.engine.run

    def run(plan, *rest):
        for request in plan.requests():
            tokens = server.loop.engine.tokens(request)
            if tokens[0] == 13 and len(tokens) > 24:
                raise ValueError("injected")
        return real(plan, *rest)

    monkeypatch.setattr(server.loop.engine, "run", run)
    poison = body([13] * 20, tokens=30, stream=stream)
    bad, *good = server.post(poison, *(body([i + 20] * 20, tokens=30) for i in range(5)))
    assert [answer.json()["usage"]["completion_tokens"] for answer in good] == [30] * 5
    if stream:
        last = json.loads(bad.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == 500 and last["error"]["type"] == "server_error"
    else:
        assert bad.status_code == 500 and "injected" not in bad.text
    assert server.post(body([5] * 20))[0].status_code == 200  # and the server goes on
    server.idle()


def test_logits_that_are_not_finite_are_an_error(served):
    server = served()
    weights = server.loop.engine.weights
    object.__setattr__(weights, "head", weights.head.copy())  # tied: or every request has a NaN
    object.__setattr__(weights, "embedding", weights.embedding.copy())
    weights.embedding[1500] = float("nan")
    bad, good = server.post(body([1500, 5]), body([6, 5]))
    assert bad.status_code == 500
    assert good.status_code == 200
    server.idle()


def test_an_engine_that_is_closed_or_full_says_so(served):
    server = served(max_running=1, max_queued=2)
    answers = server.post(*(body([5] * 10, tokens=40) for _ in range(20)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429} and codes.count(200) >= 2
    assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
    server.idle()
    server.client.close()
    assert server.post(body([5]))[0].status_code == 503
