"""Make tiny random checkpoints and what `transformers` computes on them.

Usage: ``python tests/oracle/make_checkpoints.py [CASE...]`` (extra ``oracle``). Each case becomes
``tests/data/oracle/CASE/`` with a checkpoint in Hugging Face layout and ``reference.npz``: logits
of the prompt's last positions, greedy tokens, and the logits each was chosen from. A seed whose
greedy choice is ever closer than `MARGIN` is passed over, so that the tokens cannot depend on
rounding.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

OUT = Path(__file__).resolve().parents[1] / "data" / "oracle"
MARGIN = 2e-3
PROMPT, DECODE = 40, 64

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.25,
}
QWEN = {**BASE, "num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 40}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
OLMOE = {**BASE, "num_experts": 8, "intermediate_size": 24}
MIXTRAL = {**BASE, "num_local_experts": 4, "intermediate_size": 24}
# case -> (class, config, what the written config.json gets besides: old spellings)
CASES = {
    "olmoe": ("Olmoe", OLMOE, {}),
    "olmoe_clip": ("Olmoe", {**OLMOE, "clip_qkv": 1.5, "num_key_value_heads": 4}, {}),
    "qwen3moe": ("Qwen3Moe", {**QWEN, "head_dim": 16, "norm_topk_prob": True}, {}),
    "qwen3moe_mixed": (
        "Qwen3Moe",
        {**QWEN, "head_dim": 12, "mlp_only_layers": [0], "tie_word_embeddings": True},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
    ),
    "qwen3moe_yarn": ("Qwen3Moe", {**QWEN, "head_dim": 16, "rope_parameters": YARN}, {}),
    "qwen3moe_llama3": ("Qwen3Moe", {**QWEN, "head_dim": 16, "rope_parameters": LLAMA3}, {}),
    "qwen3moe_linear": ("Qwen3Moe", {**QWEN, "head_dim": 16, "rope_parameters": LINEAR}, {}),
    "qwen2moe": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
        {},
    ),
    "mixtral": ("Mixtral", MIXTRAL, {}),
    "mixtral_window": ("Mixtral", {**MIXTRAL, "sliding_window": 24}, {}),
}
SHARDED = {"olmoe"}
# Stored dtype, bfloat16 where not named; the reference computes in float32 on the stored values.
STORED = {"olmoe": torch.float32, "mixtral": torch.float16}


def greedy(model, prompt):
    """Return logits of all prompt positions, greedy tokens, and the logits of each."""
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        first = out.logits[0].numpy()
        tokens, rows, cache = [], [], out.past_key_values
        row = first[-1]
        for _ in range(DECODE):
            tokens.append(int(row.argmax()))
            rows.append(row)
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
            cache, row = out.past_key_values, out.logits[0, -1].numpy()
    return first, np.array(tokens, np.int32), np.stack(rows)


def make(case):
    """Write one case."""
    kind, values, rewrite = CASES[case]
    stored = STORED.get(case, torch.bfloat16)
    config_class = getattr(transformers, f"{kind}Config")
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    for seed in range(200):
        torch.manual_seed(seed)
        config = config_class(**values)
        config._attn_implementation = "eager"
        model = model_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
                parameter.copy_(parameter.to(stored))
        prompt = np.random.default_rng(seed).integers(2, values["vocab_size"], PROMPT)
        first, tokens, rows = greedy(model, prompt.tolist())
        best = np.sort(rows, axis=-1)
        varied = len(set(tokens.tolist()))
        if (best[:, -1] - best[:, -2]).min() > MARGIN and varied >= 5:
            break
    else:
        raise SystemExit(f"{case}: no seed with a clear margin")
    target = OUT / case
    target.mkdir(parents=True, exist_ok=True)
    model.to(stored).save_pretrained(target, max_shard_size="60KB" if case in SHARDED else "1GB")
    (target / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((target / "config.json").read_text())
    for key, value in rewrite.items():
        if value is None:
            written.pop(key, None)
        else:
            written[key] = value
    (target / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    np.savez_compressed(
        target / "reference.npz",
        prompt=prompt.astype(np.int32),
        prompt_logits=first[::8].astype(np.float32),
        tokens=tokens,
        logits=rows[::4].astype(np.float32),
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{case}: seed {seed}, {varied} distinct tokens, {size} bytes")


if __name__ == "__main__":
    print("transformers", transformers.__version__, "torch", torch.__version__)
    for case in sys.argv[1:] or CASES:
        make(case)
