"""Model directories that lie: configurations, tokenisers and templates end in typed errors."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyruntime import errors
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.llm import make_loop
from pyruntime.engine.messages import Submit
from pyruntime.engine.text import Tokenizer
from pyruntime.models import shipped

TYPED = (errors.Error,)
USER = [{"role": "user", "content": "x"}]


@pytest.fixture
def model(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(shipped(), target)
    return target


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"architectures": "Qwen3MoeForCausalLM"}',
        b'{"architectures": [7]}',
        b'{"architectures": [{}]}',
        b'{"architectures": ["Qwen3MoeForCausalLM"]}',
    ],
)
def test_configurations_that_are_none(model, data):
    (model / "config.json").write_bytes(data)
    with pytest.raises(TYPED):
        ModelConfig.load(model)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.integers(-2, 2)),
)
KEYS = sorted(json.loads((shipped() / "config.json").read_text()))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(
        st.sampled_from([*KEYS, "rope_scaling", "rope_parameters", "sliding_window"]),
        VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_configurations_with_any_values_load_or_are_refused(changes):
    given_ = json.loads((shipped() / "config.json").read_text())
    try:
        config = ModelConfig.from_dict({**given_, **changes})
    except TYPED:
        return
    assert config.num_layers > 0 and len(config.windows) == config.num_layers


def test_a_configuration_that_asks_for_too_much_is_refused_before_allocating(model):
    given_ = json.loads((model / "config.json").read_text())
    for changes in (
        {"vocab_size": 2**40},
        {"hidden_size": 2**33},
        {"num_experts": 2**31},
        {"moe_intermediate_size": 2**40},
        {"num_hidden_layers": 10**7},
    ):
        (model / "config.json").write_text(json.dumps({**given_, **changes}))
        with pytest.raises(TYPED):
            make_loop(model, kv_bytes=1 << 20)


@pytest.mark.parametrize(
    "name, data",
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": 7}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
        ("tokenizer_config.json", b'{"chat_template": [7]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"a": 1}}'),
        ("chat_template.jinja", b"\xff\xfe\x00"),
        ("chat_template.jinja", b"{% for %}"),
        ("chat_template.jinja", b"{{ " * 5000),
    ],
)
def test_tokenisers_and_templates_that_are_none(model, name, data):
    (model / name).write_bytes(data)
    with pytest.raises(TYPED):
        Tokenizer(model)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(7) }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages[0]['content'] / 0 }}",
        "{{ 1 / 0 }}",
        "{{ 'x' * messages }}",
        "{{ undefined.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no system prompts') }}",
        "{% include 'other' %}",
        "{% import 'os' as os %}{{ os.system('true') }}",
    ],
)
def test_templates_that_misbehave_refuse_the_messages(model, template):
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(errors.InvalidArgumentError):
        Tokenizer(model).chat(USER)


def test_a_tokeniser_with_more_tokens_than_the_model(model):
    """Tokens that the model has no row for are the request's fault, not a crash."""
    loop = make_loop(model)
    size = loop.engine.config.vocab_size
    for tokens in ([size], [2**31 - 1], [2**31], [2**70], [-1]):
        delta = loop.submit(Submit(f"{tokens}", tokens))
        assert (delta.finish_reason, delta.error_kind) == ("error", "invalid")
    assert not loop.busy
