"""The model that ships is whole, beats simple models of text, and its experts specialise."""

import inspect
import json
import math
import textwrap
from pydoc_data import topics

import numpy as np
import pytest

from pyruntime import LLM
from pyruntime.engine.sampling import SamplingParams
from pyruntime.kv import ReferenceBlockPool
from pyruntime.models import shipped
from pyruntime.sched import make_plan


@pytest.fixture(scope="module")
def llm():
    return LLM()


def prose():
    return "".join(topics.topics[name] for name in sorted(topics.topics)[:8])


def code():
    return "".join(inspect.getsource(module) for module in (textwrap, json.decoder))


def routed(llm, text):
    """Return the share of tokens per expert, [layers, experts]."""
    engine = llm.loop.engine
    tokens = np.array(llm.tokenizer.encode(text)[:1500], np.int32)
    pool = ReferenceBlockPool(128, 16, 4)
    engine.add(0, tokens, SamplingParams())
    pool.admit(0, tokens)
    tables = pool.step([(0, len(tokens))])
    result = engine.run(make_plan(-1, [], [(0, 0, len(tokens), 0, 4)], []), tables)
    engine.remove(0)
    counts = result.expert_tokens
    return counts / counts.sum(1, keepdims=True)


def test_layout():
    config = json.loads((shipped() / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    for key in ("hidden_size", "moe_intermediate_size"):
        assert config[key] % 256 == 0
    assert config["max_position_embeddings"] >= 2048
    assert 14e6 < (shipped() / "model.safetensors").stat().st_size < 16e6


def test_it_predicts_text_it_has_learnt(llm):
    text = prose()[:2000] + code()[:2000]
    bits = 0.0
    tokens = llm.tokenizer.encode(text)
    # Teacher forcing through logit bias: force each next token and read its log-probability.
    for first in range(0, len(tokens) - 1, 200):
        piece = tokens[first : first + 200]
        for at in range(20, len(piece), 20):
            params = SamplingParams(logit_bias={piece[at]: 100.0}, logprobs=0)
            done = llm.generate([piece[:at]], params, max_tokens=1)[0]
            assert done.tokens == [piece[at]]
            bits -= done.logprobs[0].logprob / math.log(2)
    measured = sum(len(range(20, len(tokens[f : f + 200]), 20)) for f in range(0, len(tokens), 200))
    per_byte = bits / (measured * len(text.encode()) / len(tokens))
    assert per_byte < 1.5  # the 5-gram model of the recipe needs 1.53 on the held-out text


def test_experts_specialise(llm):
    shares = [routed(llm, text) for text in (prose(), code())]
    for share in shares:
        assert share.max() < 0.5  # no layer has collapsed onto one expert
    distance = 0.5 * np.abs(shares[0] - shares[1]).sum(1)
    assert distance.max() > 0.15  # prose and code go different ways


def test_chat_ends_by_itself(llm):
    prompt = llm.tokenizer.chat([{"role": "user", "content": "What is a list?"}])
    done = llm.generate([prompt], max_tokens=400)[0]
    assert done.finish_reason == "stop" and len(done.text) > 10
