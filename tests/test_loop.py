"""The serving loop, its thread, the library use, and text handling."""

import asyncio
import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime import LLM, errors
from pyruntime.engine.client import ThreadClient
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import StopStrings, Tokenizer
from pyruntime.models import shipped
from pyruntime.sched import LayeredPrefill, Policy

TEXT = "The list is a list of values. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(shipped())


def fresh(**options):
    return make_loop(shipped(), **options)


def drive(loop, submits):
    """Serve requests to their end; return tokens and finish reasons by id."""
    tokens, ends = {}, {}
    for submit in submits:
        delta = loop.submit(submit)
        tokens[submit.id] = []
        if delta.finish_reason:
            ends[submit.id] = delta
    for _ in range(5000):
        if not loop.busy:
            break
        for delta in loop.step():
            tokens[delta.id] += delta.tokens
            if delta.finish_reason:
                assert delta.id not in ends, "ended twice"
                ends[delta.id] = delta
    loop.pool.check()
    assert loop.pool.num_free == loop.pool.num_blocks
    return tokens, ends


def submits(tokenizer, count=6, size=40, **sampling):
    ids = tokenizer.encode(TEXT)
    return [
        Submit(f"r{i}", ids[i : i + 20 + 9 * i], SamplingParams(**sampling), size, ignore_eos=True)
        for i in range(count)
    ]


def test_greedy_text_does_not_depend_on_scheduling(tokenizer):
    wanted, _ = drive(fresh(max_running=1), submits(tokenizer))
    small = Policy("layers", partition=LayeredPrefill(16, 400, 20))
    loops = [fresh(), fresh(policy="layered"), fresh(kv_bytes=8 * 16 * 4096)]
    loops[1].scheduler.policy = small
    for loop in loops:
        got, ends = drive(loop, submits(tokenizer))
        assert got == wanted
        assert {delta.finish_reason for delta in ends.values()} == {"length"}
    assert loops[2].stats.preemptions > 0  # 8 blocks for 6 requests: memory ran out


@pytest.mark.parametrize(("dtype", "token"), [("float32", 4096), ("float16", 2048)])
def test_swapped_requests_continue_without_recompute(tokenizer, dtype, token):
    wanted, _ = drive(fresh(max_running=1, kv_dtype=dtype), submits(tokenizer))
    small = 8 * 16 * token
    roomy, tight = (
        fresh(policy="swap", kv_bytes=small, swap_bytes=size, kv_dtype=dtype)
        for size in (small, 2 * 16 * token)
    )
    for loop in (roomy, tight):
        got, ends = drive(loop, submits(tokenizer))
        assert got == wanted
        assert {delta.finish_reason for delta in ends.values()} == {"length"}
        assert loop.pool.num_swapped == 0
    assert roomy.stats.swaps > 0
    assert roomy.snapshot()["kv"]["swap_bytes"] > 0
    assert tight.stats.preemptions > tight.stats.swaps  # no room on the host: recomputed


def test_halves_are_half_the_memory():
    floats, halves = (fresh(kv_bytes=4 << 20, kv_dtype=t) for t in ("float32", "float16"))
    assert halves.pool.num_blocks == 2 * floats.pool.num_blocks
    assert halves.engine.kv_bytes == floats.engine.kv_bytes
    with pytest.raises(errors.InvalidArgumentError, match="float8"):
        fresh(kv_dtype="float8")


def test_a_failed_step_repeats_its_swaps(tokenizer, monkeypatch):
    wanted, _ = drive(fresh(max_running=1), submits(tokenizer))
    loop = fresh(policy="swap", kv_bytes=8 * 16 * 4096, swap_bytes=8 * 16 * 4096)
    real, failed = loop.engine.run, []

    def run(plan, *rest):
        if len(plan.swap_in) and len(failed) < 1:
            failed.append(plan.id)
            raise OSError("injected")
        return real(plan, *rest)

    monkeypatch.setattr(loop.engine, "run", run)
    got, _ = drive(loop, submits(tokenizer))
    assert failed and got == wanted


def test_hidden_states_count_in_the_memory_budget(tokenizer):
    chunks, layers = (fresh(kv_bytes=4 << 20, policy=p) for p in ("fcfs", "layered"))
    budget = layers.engine.hidden_budget
    assert budget > 0 and chunks.engine.hidden_budget == 0
    assert layers.engine.kv_bytes + budget <= 4 << 20
    assert layers.pool.num_blocks < chunks.pool.num_blocks
    long = [Submit("a", (tokenizer.encode(TEXT) * 20)[:300], max_tokens=2)]
    assert drive(layers, long)[0] == drive(chunks, long)[0]


def test_seeded_sampling_does_not_depend_on_scheduling(tokenizer):
    options = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
    alone, _ = drive(fresh(max_running=1), submits(tokenizer, **options))
    together, _ = drive(fresh(), submits(tokenizer, **options))
    assert alone == together
    assert len(set(map(tuple, alone.values()))) == 6


def test_every_refusal_has_its_kind(tokenizer):
    loop = fresh(max_queued=1)
    prompt = tokenizer.encode("a b")
    for submit, message in [
        (Submit("a", []), "prompt"),
        (Submit("b", [5000]), "tokens"),
        (Submit("c", [2**40]), ""),
        (Submit("d", prompt * 2000), "prompt"),
        (Submit("e", prompt, SamplingParams(top_p=7)), "top_p"),
        (Submit("f", prompt, max_tokens=0), "output"),
    ]:
        delta = loop.submit(submit)
        assert (delta.finish_reason, delta.error_kind) == ("error", "invalid")
        assert message in delta.error
    assert loop.submit(Submit("g", prompt)).finish_reason is None
    assert loop.submit(Submit("g", prompt)).error_kind == "invalid"
    assert loop.submit(Submit("h", prompt)).error_kind == "full"
    assert loop.num_live == 1 and len(loop.engine._sequences) == 1


def test_abort_deadline_and_stop_tokens(tokenizer):
    clock = [0.0]
    loop = fresh()
    loop._clock = lambda: clock[0]
    prompt = tokenizer.encode(TEXT)
    greedy = loop.engine.config.vocab_size
    loop.submit(Submit("late", prompt, max_tokens=500, deadline_s=5.0))
    loop.submit(Submit("gone", prompt, max_tokens=500))
    every = list(range(greedy))
    loop.submit(Submit("stops", prompt, max_tokens=500, stop_tokens=every))
    ends = {}
    for step in range(30):
        if step == 8:
            assert loop.abort("gone").finish_reason == "abort"
            assert loop.abort("gone") is None
        clock[0] += 0.4
        ends.update({d.id: d.finish_reason for d in loop.step() if d.finish_reason})
    assert ends == {"late": "deadline", "stops": "stop"}
    assert not loop.busy and loop.pool.num_free == loop.pool.num_blocks


def test_an_exception_in_a_step_ends_only_the_poisonous_request(tokenizer, monkeypatch, caplog):
    loop = fresh()
    real = loop.engine.run
    secret = tokenizer.encode(TEXT)

    def run(plan, *rest):
        handle = loop._handles.get("r3")
        if handle in plan.requests() and len(loop.engine.tokens(handle)) > 60:
            raise ValueError("injected")
        return real(plan, *rest)

    monkeypatch.setattr(loop.engine, "run", run)
    tokens, ends = drive(loop, submits(tokenizer))
    assert ends.pop("r3").finish_reason == "error"
    assert {delta.finish_reason for delta in ends.values()} == {"length"}
    assert all(len(tokens[name]) == 40 for name in ends)
    assert loop.stats.step_errors <= 8
    assert str(secret[:5]) not in caplog.text  # no prompt in a log


def test_layered_prefill_loads_each_expert_once_per_group(tokenizer):
    """Expert bytes of one long prompt: a pass per layer group against a pass per chunk."""
    prompt = (tokenizer.encode(TEXT) * 20)[:1900]
    read = {}
    for policy in ("fcfs", "layered"):
        loop = fresh(policy=policy)
        drive(loop, [Submit("a", prompt, max_tokens=1)])
        read[policy] = loop.stats.expert_bytes
    assert read["layered"] < 0.5 * read["fcfs"]


# The engine thread


def collect(client, submit):
    async def run():
        return [delta async for delta in client.submit(submit)]

    return run()


def test_thread_client_streams_and_explains(tokenizer):
    client = ThreadClient(fresh())

    async def main():
        return await asyncio.gather(*(collect(client, s) for s in submits(tokenizer)))

    try:
        streams = asyncio.run(main())
        wanted, _ = drive(fresh(), submits(tokenizer))
        for index, stream in enumerate(streams):
            assert [t for d in stream for t in d.tokens] == wanted[f"r{index}"]
            assert stream[0].tokens == [] and stream[-1].finish_reason == "length"
        assert client.stats()["generated_tokens"] == 240
        assert client.explain("r0") is None
    finally:
        client.close()
    assert threading.active_count() >= 1 and not client._thread.is_alive()


def test_leaving_a_stream_aborts_its_request(tokenizer):
    loop = fresh()
    client = ThreadClient(loop)

    async def main():
        async for delta in client.submit(submits(tokenizer, size=1500)[0]):
            if delta.tokens:
                break
        assert await client.drain(10)

    try:
        asyncio.run(main())
        assert loop.stats.finished["abort"] == 1 and loop.stats.generated_tokens < 1400
    finally:
        client.close()


def test_close_ends_every_stream_and_refuses_new_ones(tokenizer):
    client = ThreadClient(fresh())

    async def main():
        tasks = [asyncio.create_task(collect(client, s)) for s in submits(tokenizer, size=1500)]
        while client.stats()["generated_tokens"] < 20:
            await asyncio.sleep(0.01)
        assert not await client.drain(0.05)
        await asyncio.to_thread(client.close)
        ends = [stream[-1].finish_reason for stream in await asyncio.gather(*tasks)]
        assert ends == ["abort"] * 6
        with pytest.raises(errors.ClosedError):
            await collect(client, Submit("x", [5]))

    asyncio.run(main())


def test_a_bug_in_the_loop_ends_its_requests_and_serving_goes_on(tokenizer, monkeypatch):
    loop = fresh()
    client = ThreadClient(loop)
    real = loop.step
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return real()

    monkeypatch.setattr(loop, "step", step)

    async def main():
        first = await collect(client, submits(tokenizer)[0])
        second = await collect(client, submits(tokenizer)[1])
        return first[-1], second[-1]

    try:
        first, second = asyncio.run(main())
        assert (first.finish_reason, first.error_kind) == ("error", "internal")
        assert second.finish_reason == "length"
    finally:
        client.close()


# Library use


def test_llm_generates_in_order_and_stops_at_strings():
    llm = LLM()
    params = SamplingParams(logprobs=2)
    done = llm.generate(["The list is", "import os\n"], params, max_tokens=20)
    assert [len(c.tokens) for c in done] == [20, 20]
    assert all(len(c.logprobs) == 20 and len(c.logprobs[0].top) == 2 for c in done)
    best = [entry.top[0][0] for entry in done[0].logprobs]
    assert best == done[0].tokens  # greedy
    text = done[0].text
    stop = text[8:11]
    cut = llm.generate("The list is", max_tokens=20, stop=[stop])[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    with pytest.raises(errors.InvalidArgumentError):
        llm.generate(["fine", ""])
    assert not llm.loop.busy


def test_llm_plans_the_prefixes_of_a_batch():
    prefixes = [[5 + i] * 96 for i in range(8)]
    prompts = [prefixes[i % 8] + [100 + i] for i in range(32)]  # in memory: two of the eight
    llm = LLM(max_running=1, kv_bytes=16 * 16 * 4096)
    done = llm.generate(prompts, max_tokens=2, ignore_eos=True)
    assert llm.loop.stats.cached_tokens == (32 - 8) * 96
    one_by_one = [llm.generate([p], max_tokens=2, ignore_eos=True)[0].tokens for p in prompts]
    assert [c.tokens for c in done] == one_by_one


def test_llm_streams():
    async def main(llm):
        pieces = [piece async for piece in llm.stream("The list is", max_tokens=20)]
        return "".join(pieces), len(pieces)

    with LLM() as llm:
        wanted = llm.generate("The list is", max_tokens=20)[0].text
        text, pieces = asyncio.run(main(llm))
        assert text == wanted and pieces > 5
        with pytest.raises(errors.InvalidArgumentError, match="stream"):
            llm.generate("x")


def test_more_prompts_than_the_queue_holds():
    llm = LLM(max_running=2)
    done = llm.generate([f"value {i}" for i in range(40)], max_tokens=3, ignore_eos=True)
    assert [len(c.tokens) for c in done] == [3] * 40


# Text


def test_streamed_text_equals_decoded_text(tokenizer):
    text = "naïve 日本語 🙂 text\n\tdef f(x): return 'é'"
    tokens = tokenizer.encode(text)
    decoder = tokenizer.detokenizer()
    pieces = [decoder.feed([token]) for token in tokens]
    assert "".join(pieces) == text == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
def test_stop_strings_equal_a_search_in_the_whole_text(text, stops, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    checker = StopStrings(stops)
    shown, stopped = "", False
    for low, high in itertools.pairwise(edges):
        if not stopped:
            piece, stopped = checker.feed(text[low:high])
            shown += piece
    if not stopped:
        shown += checker.flush()
    # The first place where a stop string is complete ends the text, as in a token by token search.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert shown == text[: len(shown)] and any(text[len(shown) :].startswith(s) for s in stops)


def test_chat_template_is_sandboxed(tmp_path, tokenizer):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shipped() / name).read_bytes())
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(errors.InvalidArgumentError):
            Tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(errors.CorruptDataError):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.CorruptDataError):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(errors.NotFoundError):
        Tokenizer(tmp_path)
    tokens = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.token_text(tokens[0]) == "<|im_start|>"
