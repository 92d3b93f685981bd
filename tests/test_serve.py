"""The server as its users meet it: a process, the `openai` package, curl, and rough handling."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from pyruntime.models import shipped
from pyruntime.serve.keys import ApiKeys
from tests.serving import Server

KEYS = ["alpha:tenant-a:3", "beta"]


@pytest.fixture(scope="module")
def server():
    running = Server("--max-running", 64, "--max-queued", 64)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def post(server, path, body, **options):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **options)


def test_curl_completion(server):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": "The list is", "max_tokens": 8, "temperature": 0})
    done = subprocess.run(
        [
            curl,
            "-s",
            f"{server.url}/v1/completions",
            "-H",
            "content-type: application/json",
            "-d",
            body,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["object"] == "text_completion" and answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 8


def test_openai_completions(client):
    plain = client.completions.create(
        model="tiny-moe", prompt="The list is", max_tokens=12, temperature=0, logprobs=3
    )
    choice = plain.choices[0]
    assert choice.finish_reason == "length" and plain.usage.completion_tokens == 12
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(len(top) <= 3 for top in choice.logprobs.top_logprobs)
    stream = client.completions.create(
        model="tiny-moe", prompt="The list is", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in stream) == choice.text
    echoed = client.completions.create(
        model="tiny-moe", prompt="The list is", max_tokens=12, temperature=0, echo=True
    )
    assert echoed.choices[0].text == "The list is" + choice.text
    tokens = client.completions.create(
        model="tiny-moe", prompt=[[5, 6], [7, 8]], max_tokens=3, n=2, seed=1
    )
    assert [c.index for c in tokens.choices] == [0, 1, 2, 3]
    assert tokens.usage.prompt_tokens == 4


def test_openai_chat(client):
    messages = [{"role": "user", "content": "What is a list?"}]
    plain = client.chat.completions.create(model="tiny-moe", messages=messages, temperature=0)
    assert plain.choices[0].finish_reason == "stop"
    text = plain.choices[0].message.content
    assert text and plain.choices[0].message.role == "assistant"
    stream = list(
        client.chat.completions.create(
            model="tiny-moe",
            messages=[{"role": "user", "content": [{"type": "text", "text": "What is a list?"}]}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == text
    assert stream[-2].choices[0].finish_reason == "stop"
    assert stream[-1].usage == plain.usage
    logged = client.chat.completions.create(
        model="tiny-moe", messages=messages, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = logged.choices[0].logprobs.content
    assert len(content) == 4 and all(len(entry.top_logprobs) == 2 for entry in content)


def test_stop_strings_seeds_and_choices(client):
    options = {"model": "tiny-moe", "prompt": "import os\n", "max_tokens": 30}
    text = client.completions.create(**options, temperature=0).choices[0].text
    stop = text[9:12]
    cut = client.completions.create(**options, temperature=0, stop=[stop]).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    first, second = (
        client.completions.create(**options, n=3, seed=9, temperature=1.0) for _ in range(2)
    )
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == 3
    streamed = {}
    for part in client.completions.create(**options, n=3, seed=9, stream=True, temperature=1.0):
        for c in part.choices:
            streamed[c.index] = streamed.get(c.index, "") + c.text
    assert [streamed[i] for i in range(3)] == [c.text for c in first.choices]


def test_models_health_metrics_status(server, client):
    client.completions.create(model="tiny-moe", prompt="import os", max_tokens=2)
    assert [model.id for model in client.models.list()] == ["tiny-moe"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert re.search(r"pyruntime_engine_generated_tokens_total \d", metrics)
    assert "pyruntime_serve_ttft_seconds_bucket" in metrics
    status = server.idle()
    assert status["latency"]["ttft_s"] and len(status["experts"]) == 4
    with httpx.stream("GET", f"{server.url}/status/events") as stream:
        line = next(stream.iter_lines())
        assert json.loads(line.removeprefix("data: "))["model"] == "tiny-moe"


HOSTILE = [
    ("/v1/completions", b"", 400),
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[" * 100_000, 400),
    ("/v1/completions", b"\xff\xfe{}", 400),
    ("/v1/completions", b"null", 400),
    ("/v1/completions", b"{}", 400),
    ("/v1/completions", b'{"prompt": 7}', 400),
    ("/v1/completions", b'{"prompt": []}', 400),
    ("/v1/completions", b'{"prompt": ""}', 400),
    ("/v1/completions", b'{"prompt": [99999]}', 400),
    ("/v1/completions", b'{"prompt": [-1]}', 400),
    ("/v1/completions", b'{"prompt": [1e400]}', 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": "many"}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 1000}', 400),
    ("/v1/completions", b'{"prompt": "a", "best_of": 4}', 400),
    ("/v1/completions", b'{"prompt": "a", "suffix": "b"}', 400),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', 400),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"99999": 1}}', 400),
    ("/v1/completions", b'{"prompt": "a", "stop": [""]}', 400),
    ("/v1/completions", b'{"prompt": "a", "deadline_s": -1}', 400),
    ("/v1/completions", b'{"prompt": "a", "model": "gpt-17"}', 404),
    ("/v1/chat/completions", b'{"messages": []}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "alien", "content": "x"}]}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "tools": [{}]}', 400),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        400,
    ),
    ("/v1/nothing", b"{}", 404),
]


@pytest.mark.parametrize("path, body, status", HOSTILE)
def test_malformed_and_hostile_bodies(server, path, body, status):
    answer = httpx.post(
        f"{server.url}{path}", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_bodies_that_are_too_long(server):
    answer = post(server, "/v1/completions", {"prompt": "x" * (5 << 20)})
    assert answer.status_code == 413

    def parts():
        for _ in range(100):
            yield b" " * (1 << 16)

    answer = httpx.post(f"{server.url}/v1/completions", content=parts())
    assert answer.status_code == 413


def test_prompts_longer_than_the_context(server):
    answer = post(server, "/v1/completions", {"prompt": [5] * 2048})
    assert answer.status_code == 400 and "2048" in answer.text
    answer = post(server, "/v1/completions", {"prompt": [5] * 2040, "max_tokens": 100})
    assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer.json()["usage"]["completion_tokens"] <= 8


def test_deadlines(server):
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "deadline_s": 0.2}
    choice = post(server, "/v1/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "deadline"


def test_a_client_that_goes_away_frees_its_blocks(server):
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    before = server.status()["finished"].get("abort", 0)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=0.3)
    status = server.idle()
    assert status["finished"]["abort"] == before + 2


@pytest.mark.slow
def test_a_thousand_requests_over_the_limit(server):
    async def one(http):
        body = {"prompt": "a b c", "max_tokens": 4, "ignore_eos": True}
        answer = await http.post(f"{server.url}/v1/completions", json=body)
        return answer.status_code, answer.json()

    async def storm():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            return await asyncio.gather(*(one(http) for _ in range(1000)))

    answers = asyncio.run(storm())
    assert {code for code, _ in answers} <= {200, 429}
    good = [body for code, body in answers if code == 200]
    assert len(good) >= 64  # the queue alone; how many begin meanwhile is a matter of speed
    assert all(body["choices"][0]["finish_reason"] == "length" for body in good)
    server.idle()
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_logs_hold_no_prompts(server):
    secret = "xyzzy-secret-prompt"
    post(server, "/v1/completions", {"prompt": secret, "max_tokens": 2})
    post(server, "/v1/completions", {"prompt": secret, "max_tokens": -2})
    for _ in range(100):
        if server.requests():
            break
        time.sleep(0.05)
    assert server.requests()[-1]["route"] == "/v1/completions"
    assert secret not in "".join(server.log)


@pytest.mark.parametrize("workers", [1, 2])
def test_api_keys_and_drain_under_load(workers):
    keys = ("--api-key", KEYS[0], "--api-key", KEYS[1])
    server = Server(*keys, "--grace-s", "1", "--workers", workers)
    try:
        body = {"prompt": "a", "max_tokens": 2, "priority": 50}
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic alpha"}):
            assert post(server, "/v1/completions", body, headers=headers).status_code == 401
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
        good = {"authorization": "Bearer alpha"}
        assert post(server, "/v1/completions", body, headers=good).status_code == 200
        long = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
        before = server.status()["prompt_tokens"]

        def follow():
            headers = {"authorization": "Bearer beta"}
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=long, headers=headers, timeout=30
            ) as stream:
                return [line for line in stream.iter_lines() if line]

        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(follow) for _ in range(8)]
            while server.status()["prompt_tokens"] < before + 8:  # all are accepted
                time.sleep(0.02)
            assert server.stop() == 0
            for stream in streams:
                lines = stream.result()
                assert lines[-1] == "data: [DONE]"
                last = json.loads(lines[-2].removeprefix("data: "))["choices"][0]
                assert last["finish_reason"] in ("abort", "length")
        tenants = {line["tenant"] for line in server.requests()}
        assert "tenant-a" in tenants and len(tenants) == 2
        assert not any("alpha" in line or "beta" in line for line in server.log)
    finally:
        server.process.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_drain_lets_short_requests_finish(workers):
    server = Server("--grace-s", "20", "--workers", workers)
    try:
        body = {"prompt": [5], "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(post, server, "/v1/completions", body) for _ in range(4)]
            while server.status()["prompt_tokens"] < 4:  # all are accepted
                time.sleep(0.01)
            assert server.stop() == 0
            for answer in answers:
                assert answer.result().json()["choices"][0]["finish_reason"] == "length"
    finally:
        server.process.kill()


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "pyruntime", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_bad_checkpoints_end_with_one_line(tmp_path):
    missing = run("serve", tmp_path)
    assert missing.returncode == 1 and "tokenizer.json" in missing.stderr
    shutil.copytree(shipped(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    truncated = run("serve", tmp_path / "model")
    assert truncated.returncode == 1 and "model.safetensors" in truncated.stderr
    assert "Traceback" not in missing.stderr + truncated.stderr


def test_generate_command():
    first = run("generate", "The list is", "--max-tokens", 10)
    assert first.returncode == 0 and first.stdout.strip()
    chat = run("generate", "What is a list?", "--chat", "--max-tokens", 30)
    assert chat.returncode == 0 and chat.stdout.strip()
    assert run("generate").returncode == 2
    assert run("serve", "--policy", "nope").returncode == 1


def test_keys_are_kept_as_digests():
    keys = ApiKeys(KEYS)
    assert keys.tenant("Bearer alpha").name == "tenant-a"
    assert keys.tenant("Bearer alpha").max_priority == 3
    assert keys.tenant("bearer beta").max_priority == 0
    assert keys.tenant("Bearer alpha:tenant-a:3") is None
    assert keys.tenant(None) is None and keys.tenant("Bearer \udc80") is None
    assert "alpha" not in repr(vars(keys))
    assert ApiKeys().tenant(None).name == ""
