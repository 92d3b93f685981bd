"""Model configurations: from a Hugging Face ``config.json`` to what the forward pass computes.

Anything that changes the mathematics and is not implemented is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import (
    CorruptDataError,
    Error,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)

__all__ = ["ARCHITECTURES", "ModelConfig", "Rope"]

ARCHITECTURES = (
    "OlmoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# What is made for each layer, head dimension or position, before any tensor is looked at, must not
# take the machine's memory because a file says so.
LIMITS = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "max_position_embeddings": 1 << 22,
}

# Keys that are read below, for any architecture.
_READ = {
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "intermediate_size",
    "norm_topk_prob",
    "clip_qkv",
    "attention_bias",
    "qkv_bias",
    "mlp_only_layers",
    "decoder_sparse_step",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "shared_expert_intermediate_size",
    "hidden_act",
    "eos_token_id",
}
# Keys that do not change what a trained model computes.
_IGNORED = {
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "pretraining_tp",
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `inv_freq` is float32 [half], `scale` multiplies cosine and sine."""

    inv_freq: NDArray[np.float32]
    scale: float


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass of a decoder with sparse experts needs to know."""

    architecture: str
    vocab_size: int
    hidden: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: Rope
    max_len: int
    tied: bool
    num_experts: int
    top_k: int
    expert_ffn: int
    dense_ffn: int
    shared_ffn: int
    """Width of the shared expert, 0 without one."""
    normalise: bool
    """Whether the chosen experts' scores are divided by their sum."""
    qk_norm: str
    """RMSNorm of queries and keys: "none", "head" or "full" (before the split into heads)."""
    qkv_bias: bool
    out_bias: bool
    clip_qkv: float
    """Limit of queries, keys and values; 0 for none."""
    sparse: tuple[bool, ...]
    """Per layer: experts, or a dense network of width `dense_ffn`."""
    windows: tuple[int, ...]
    """Per layer: sliding window in tokens, 0 for none."""
    eos: tuple[int, ...]

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Read ``config.json`` (and the end tokens of ``generation_config.json``).

        Raises
        ------
        pyruntime.errors.NotFoundError
            There is no ``config.json``.
        pyruntime.errors.CorruptDataError
            It is not a JSON object.
        pyruntime.errors.UnsupportedError
            The architecture, or a key that changes the mathematics, is not implemented.
        pyruntime.errors.InvalidArgumentError
            A value is missing or makes no sense.
        """
        directory = Path(directory)
        given = _read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        if generation.exists():
            eos = _read_json(generation).get("eos_token_id")
            if eos is not None:
                given = {**given, "eos_token_id": eos}
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> ModelConfig:
        """Interpret a configuration; errors as in `load`."""
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                config = cls._interpret(given)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            if isinstance(error, Error):
                raise
            text = f"the configuration makes no sense: {type(error).__name__}: {error}"
            raise InvalidArgumentError(text) from None
        rope = config.rope
        if not (np.isfinite(rope.inv_freq).all() and math.isfinite(rope.scale)):
            raise InvalidArgumentError("the rope parameters give frequencies that are not finite")
        if not 0 <= config.eps < 1 or not 0 <= config.clip_qkv < math.inf:
            raise InvalidArgumentError(f"rms_norm_eps {config.eps} or clip_qkv makes no sense")
        return config

    @classmethod
    def _interpret(cls, given: dict[str, Any]) -> ModelConfig:
        names = given.get("architectures") or [None]
        architecture = names[0]
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture {architecture!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}"
            )
        for key, value in given.items():
            if key in _READ or key in _IGNORED or value is None or value is False:
                continue
            raise UnsupportedError(
                f"config key {key!r} = {value!r} is not implemented for {architecture}; remove it "
                "if it does not change what the model computes"
            )
        if given.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(
                f"hidden_act {given['hidden_act']!r} is not supported; supported is 'silu'"
            )
        number = _Reader(given, architecture)
        hidden, heads = number("hidden_size"), number("num_attention_heads")
        kv_heads = number("num_key_value_heads", heads)
        layers = number("num_hidden_layers")
        head_dim = number("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise InvalidArgumentError(
                f"{heads} heads over {kv_heads} KV heads of {head_dim} cannot be split evenly"
            )
        max_len = number("max_position_embeddings")
        mixtral = architecture == "MixtralForCausalLM"
        qwen = architecture.startswith("Qwen")
        experts = number("num_local_experts", number("num_experts", -1))
        top_k = number("num_experts_per_tok")
        if not 1 <= top_k <= experts <= 4096:
            raise InvalidArgumentError(
                f"num_experts_per_tok is {top_k} of {experts} experts; at most 4096 are supported"
            )
        dense = number("intermediate_size")
        only_dense = set(given.get("mlp_only_layers") or ())
        stride = number("decoder_sparse_step", 1)
        qwen2 = architecture == "Qwen2MoeForCausalLM"
        # OLMoE's attention_bias covers all four projections, Qwen2-MoE's qkv_bias three.
        attention_bias = bool(given.get("attention_bias", False))
        eos = given.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=number("vocab_size"),
            hidden=hidden,
            num_layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=float(given.get("rms_norm_eps", 1e-5)),
            rope=_rope(given, head_dim, max_len, 1e6 if mixtral else 1e4),
            max_len=max_len,
            tied=bool(given.get("tie_word_embeddings", False)),
            num_experts=experts,
            top_k=top_k,
            expert_ffn=number("moe_intermediate_size") if qwen else dense,
            dense_ffn=dense,
            shared_ffn=number("shared_expert_intermediate_size") if qwen2 else 0,
            normalise=mixtral or bool(given.get("norm_topk_prob", False)),
            qk_norm={"OlmoeForCausalLM": "full", "Qwen3MoeForCausalLM": "head"}.get(
                architecture, "none"
            ),
            qkv_bias=bool(given.get("qkv_bias", True)) if qwen2 else attention_bias,
            out_bias=attention_bias and not qwen2,
            clip_qkv=float(given.get("clip_qkv") or 0.0),
            sparse=tuple(
                not qwen or (i not in only_dense and (i + 1) % stride == 0) for i in range(layers)
            ),
            windows=_windows(given, layers, mixtral),
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        )


class _Reader:
    """Reads positive integers, naming what is missing or wrong."""

    def __init__(self, given: dict[str, Any], architecture: str) -> None:
        self._given = given
        self._architecture = architecture

    def __call__(self, key: str, default: int | None = None) -> int:
        limit = LIMITS.get(key, 2**31)
        value = self._given.get(key)
        if value is None:
            if default is None:
                raise InvalidArgumentError(f"{self._architecture} needs config key {key!r}")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < limit:
            raise InvalidArgumentError(
                f"config key {key!r} is {value!r}; it must be positive and less than {limit}"
            )
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotFoundError(
            f"{path} does not exist; a Hugging Face model directory has it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{path} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise CorruptDataError(f"{path} must hold a JSON object")
    return given


def _windows(given: dict[str, Any], layers: int, mixtral: bool) -> tuple[int, ...]:
    window = given.get("sliding_window")
    if not window or not (mixtral or given.get("use_sliding_window", False)):
        return (0,) * layers
    kinds = given.get("layer_types")
    if kinds is None:
        first = 0 if mixtral else given.get("max_window_layers", layers)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise UnsupportedError(
            f"layer_types {sorted(set(kinds))} are not supported; supported are "
            "full_attention and sliding_attention, one per layer"
        )
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(given: dict[str, Any], head_dim: int, max_len: int, theta: float) -> Rope:
    """Interpret both spellings: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``."""
    scaling: dict[str, Any] = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    base = float(scaling.pop("rope_theta", None) or given.get("rope_theta") or theta)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = scaling.pop("partial_rotary_factor", None)
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {partial} is not supported; supported is 1")
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = base**-exponent

    def take(key: str, default: float | None = None) -> float:
        value = scaling.pop(key, None)
        if value is None:
            if default is None:
                raise InvalidArgumentError(f"rope type {kind!r} needs {key!r}")
            return default
        return float(value)

    scale = 1.0
    if kind == "linear":
        frequency = frequency / take("factor")
    elif kind == "llama3":
        factor, low, high = take("factor"), take("low_freq_factor"), take("high_freq_factor")
        original = take("original_max_position_embeddings")
        wavelength = 2 * math.pi / frequency
        blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        frequency = (1 - blend) * frequency / factor + blend * frequency
    elif kind == "yarn":
        frequency, scale = _yarn(take, scaling, frequency, head_dim, base, max_len)
    else:
        scaling.pop("factor", None)
    if unknown := {key for key, value in scaling.items() if value is not None}:
        raise UnsupportedError(
            f"rope parameters {sorted(unknown)} are not implemented for rope type {kind!r}"
        )
    return Rope(frequency.astype(np.float32), scale)


def _yarn(
    take: Any,
    scaling: dict[str, Any],
    frequency: NDArray[np.float64],
    head_dim: int,
    base: float,
    max_len: int,
) -> tuple[NDArray[np.float64], float]:
    """YaRN (Peng et al. 2023), section 3.2 and 3.4."""
    original = take("original_max_position_embeddings", max_len)
    factor = take("factor")
    fast, slow = take("beta_fast", 32.0), take("beta_slow", 1.0)
    mscale, mscale_all = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    truncate = scaling.pop("truncate", True)

    def attention(amount: float, weight: float = 1.0) -> float:
        return 1.0 if amount <= 1 else 0.1 * weight * math.log(amount) + 1.0

    if mscale and mscale_all:
        default = attention(factor, mscale) / attention(factor, mscale_all)
    else:
        default = attention(factor)
    scale = take("attention_factor", default)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequency * (1 - ramp) + frequency / factor * ramp, scale
