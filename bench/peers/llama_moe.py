"""llama.cpp on a random-weight MoE of a given shape: run by bench_moe_engine.py.

``python llama_moe.py FILE SHAPE TYPE THREADS``: writes FILE (if it is not there) with expert and
attention weights of TYPE ("Q4_0", "Q8_0"), then answers one JSON line per command.
"""

import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


def write(target, shape, kind):
    """Write a Qwen3-MoE model file; experts are copies of one, as in the other model."""
    d, f, layers = shape["hidden"], shape["ffn"], shape["layers"]
    heads, head_dim = d // 64, 64
    kv = max(1, d // 256) * head_dim
    rng = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]

    def matrix(rows, columns, as_type=quant):
        weights = (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        return gguf.quants.quantize(weights, as_type), as_type

    w = gguf.GGUFWriter(target, "qwen3moe")
    w.add_context_length(2048)
    w.add_embedding_length(d)
    w.add_block_count(layers)
    w.add_feed_forward_length(f)
    w.add_expert_feed_forward_length(f)
    w.add_head_count(heads)
    w.add_head_count_kv(kv // head_dim)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_expert_count(shape["experts"])
    w.add_expert_used_count(shape["top_k"])
    w.add_vocab_size(shape["vocab"])
    w.add_tokenizer_model("no_vocab")

    def add(name, pair):
        w.add_tensor(name, pair[0], raw_dtype=pair[1])

    ones = np.ones(d, np.float32)
    add("token_embd.weight", matrix(shape["vocab"], d, gguf.GGMLQuantizationType.Q8_0))
    add("output.weight", matrix(shape["vocab"], d, gguf.GGMLQuantizationType.Q8_0))
    w.add_tensor("output_norm.weight", ones)
    attention = {"q": matrix(d, d), "k": matrix(kv, d), "v": matrix(kv, d), "output": matrix(d, d)}
    experts = {"gate": matrix(f, d), "up": matrix(f, d), "down": matrix(d, f)}
    stacked = {
        name: (np.repeat(data[None], shape["experts"], 0), as_type)
        for name, (data, as_type) in experts.items()
    }
    for i in range(layers):
        to = f"blk.{i}"
        w.add_tensor(f"{to}.attn_norm.weight", ones)
        w.add_tensor(f"{to}.ffn_norm.weight", ones)
        w.add_tensor(f"{to}.attn_q_norm.weight", ones[:head_dim])
        w.add_tensor(f"{to}.attn_k_norm.weight", ones[:head_dim])
        for name, pair in attention.items():
            add(f"{to}.attn_{name}.weight", pair)
        router = rng.standard_normal((shape["experts"], d)) * d**-0.5
        w.add_tensor(f"{to}.ffn_gate_inp.weight", router.astype(np.float32))
        for name, pair in stacked.items():
            add(f"{to}.ffn_{name}_exps.weight", pair)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main(file, shape, kind, threads):
    """Answer commands until the input ends."""
    if not Path(file).exists():
        write(file + ".part", shape, kind)
        Path(file + ".part").rename(file)
    begin = time.perf_counter()
    model = llama_cpp.Llama(
        file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    version = f"llama-cpp-python {llama_cpp.__version__}"
    print(json.dumps({"version": version, "load_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        rng = np.random.default_rng(command.get("seed", 1))
        model.reset()
        begin = time.perf_counter()
        model.eval(rng.integers(0, shape["vocab"], command["prompt"]).tolist())
        first = time.perf_counter()
        for token in rng.integers(0, shape["vocab"], command["tokens"] - 1).tolist():
            model.eval([token])
        end = time.perf_counter()
        print(json.dumps({"prefill_s": first - begin, "decode_s": end - first}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
