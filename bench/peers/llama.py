"""llama.cpp on a Qwen3-MoE checkpoint of ours: run by bench_engine.py under its own interpreter.

Writes the checkpoint as a float32 model file with the `gguf` package, then answers commands.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


def read(directory):
    """Return config and float32 tensors of a one-file checkpoint."""
    raw = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(raw[low:high], np.float32).reshape(entry["shape"])
    return json.loads((directory / "config.json").read_text()), tensors


def convert(directory, target):
    """Write the model file."""
    c, t = read(directory)
    w = gguf.GGUFWriter(target, "qwen3moe")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(c["head_dim"])
    w.add_value_length(c["head_dim"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c.get("rope_theta", 10000.0))
    w.add_expert_count(c["num_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    w.add_tensor("token_embd.weight", t["model.embed_tokens.weight"])
    w.add_tensor("output_norm.weight", t["model.norm.weight"])
    for i in range(c["num_hidden_layers"]):
        at, to = f"model.layers.{i}", f"blk.{i}"
        for ours, theirs in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate", "ffn_gate_inp"),
        ):
            w.add_tensor(f"{to}.{theirs}.weight", t[f"{at}.{ours}.weight"])
        for kind in ("gate", "up", "down"):
            stacked = np.stack(
                [t[f"{at}.mlp.experts.{e}.{kind}_proj.weight"] for e in range(c["num_experts"])]
            )
            w.add_tensor(f"{to}.ffn_{kind}_exps.weight", stacked)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main(directory, threads):
    """Answer commands until the input ends."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "model.gguf"
        convert(Path(directory), path)
        model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        print(json.dumps({"version": f"llama-cpp-python {llama_cpp.__version__}"}), flush=True)
        rng = np.random.default_rng(1)
        for line in sys.stdin:
            command = json.loads(line)
            ids = rng.integers(0, model.n_vocab(), command["prompt"]).tolist()
            model.reset()
            begin = time.perf_counter()
            model.eval(ids)
            first = time.perf_counter()
            for token in rng.integers(0, model.n_vocab(), command["tokens"] - 1).tolist():
                model.eval([token])
            end = time.perf_counter()
            print(json.dumps({"prefill_s": first - begin, "decode_s": end - first}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
