"""Random-weight models of given shapes, for benchmarks."""

import json

import numpy as np
from safetensors.numpy import save_file

SHAPE_DEFAULTS = {
    "hidden": 1024,
    "layers": 6,
    "experts": 16,
    "ffn": 512,
    "vocab": 8192,
    "top_k": 4,
}


def random_model(directory, **shape):
    """Write a Qwen3-MoE checkpoint with random float32 weights and return its directory."""
    full = {**SHAPE_DEFAULTS, **shape}
    hidden, layers, experts = full["hidden"], full["layers"], full["experts"]
    ffn, vocab, top_k = full["ffn"], full["vocab"], full["top_k"]
    directory.mkdir(parents=True, exist_ok=True)
    heads, kv_heads, head_dim = hidden // 64, max(1, hidden // 256), 64
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": ffn,
        "intermediate_size": ffn,
        "norm_topk_prob": True,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns), np.float32) * columns**-0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{at}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{at}.self_attn.q_norm.weight": np.ones(head_dim, np.float32),
            f"{at}.self_attn.k_norm.weight": np.ones(head_dim, np.float32),
            f"{at}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{at}.mlp.gate.weight": matrix(experts, hidden),
        }
        for expert in range(experts):
            e = f"{at}.mlp.experts.{expert}"
            tensors |= {
                f"{e}.gate_proj.weight": matrix(ffn, hidden),
                f"{e}.up_proj.weight": matrix(ffn, hidden),
                f"{e}.down_proj.weight": matrix(hidden, ffn),
            }
    save_file(tensors, directory / "model.safetensors")
    return directory


def quantized_model(directory, bits=(4, 6, 8), attention_bits=8, distinct=2, **shape):
    """Write a quantized model of random weights and return its directory.

    As `random_model` and then `pyruntime quantize`, but the float weights never exist: `distinct`
    experts are quantized and stand for all. Speed and bytes do not depend on the values. The head
    has 8 bits.
    """
    from pyruntime.engine.config import ModelConfig
    from pyruntime.engine.loader import DENSE, HEAD
    from pyruntime.engine.stored import STORE_NAME, model_hash
    from pyruntime.moe import NestedMatrix, StoreWriter

    full = {**SHAPE_DEFAULTS, **shape}
    tiny = random_model(directory, **{**full, "experts": 1, "layers": 1, "ffn": 32, "top_k": 1})
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "num_hidden_layers": full["layers"],
        "num_experts": full["experts"],
        "num_experts_per_tok": full["top_k"],
        "moe_intermediate_size": full["ffn"],
        "intermediate_size": full["ffn"],
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    d, heads, head_dim = full["hidden"], config["num_attention_heads"], config["head_dim"]
    kv = config["num_key_value_heads"] * head_dim

    def nested(rows, columns, widths):
        weights = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        return NestedMatrix.quantize(weights, list(widths), search=1)

    norms = {"model.norm.weight": np.ones(d, np.float32)}
    for layer in range(full["layers"]):
        at = f"model.layers.{layer}"
        norms |= {
            f"{at}.input_layernorm.weight": np.ones(d, np.float32),
            f"{at}.post_attention_layernorm.weight": np.ones(d, np.float32),
            f"{at}.self_attn.q_norm.weight": np.ones(head_dim, np.float32),
            f"{at}.self_attn.k_norm.weight": np.ones(head_dim, np.float32),
            f"{at}.mlp.gate.weight": rng.standard_normal((full["experts"], d), np.float32)
            * np.float32(d**-0.5),
        }
    vocab = rng.standard_normal((full["vocab"], d), np.float32) * np.float32(d**-0.5)
    save_file(norms | {"model.embed_tokens.weight": vocab}, directory / "model.safetensors")
    experts = [
        [nested(full["ffn"], d, bits), nested(full["ffn"], d, bits), nested(d, full["ffn"], bits)]
        for _ in range(distinct)
    ]
    c = ModelConfig.load(directory)
    with StoreWriter(
        directory / STORE_NAME,
        num_layers=c.num_layers,
        num_experts=c.num_experts,
        hidden=c.hidden,
        ffn=c.expert_ffn,
        bits=[list(bits)] * 3,
        model_hash=model_hash(directory),
    ) as writer:
        qkv, out = (
            nested(heads * head_dim + 2 * kv, d, [attention_bits]),
            nested(d, heads * head_dim, [attention_bits]),
        )
        writer.add_dense(0, HEAD, nested(full["vocab"], d, [8]))
        for layer in range(full["layers"]):
            writer.add_dense(layer, DENSE["qkv"], qkv)
            writer.add_dense(layer, DENSE["out"], out)
            writer.add_layer(layer, [experts[e % distinct] for e in range(full["experts"])])
        writer.commit()
    return directory
