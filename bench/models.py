"""Random-weight models of given shapes, for benchmarks."""

import json

import numpy as np
from safetensors.numpy import save_file


def random_model(directory, hidden=1024, layers=6, experts=16, ffn=512, vocab=8192, top_k=4):
    """Write a Qwen3-MoE checkpoint with random float32 weights and return its directory."""
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
