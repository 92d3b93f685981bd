"""Train the model that ships, on a CPU, in plain PyTorch.

Usage: ``python train.py CORPUS_DIRECTORY WORK_DIRECTORY [--steps N] [--threads N]``.

Needs torch, numpy, tokenizers and safetensors. A run is seeded and its batches depend on the step
alone, so that a stopped run continues from ``WORK_DIRECTORY/state.pt`` as if it had not stopped.
The result, in Hugging Face layout, is ``WORK_DIRECTORY/export``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm on every head of q and k."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv, self.dim = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        d = c["hidden_size"]
        self.q_proj = nn.Linear(d, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, d, bias=False)
        self.q_norm = nn.RMSNorm(self.dim, c["rms_norm_eps"])
        self.k_norm = nn.RMSNorm(self.dim, c["rms_norm_eps"])

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, self.heads, self.dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, self.kv, self.dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)

        def rotate(y):
            low, high = y.chunk(2, -1)
            return (y * cos + torch.cat((-high, low), -1) * sin).to(v.dtype)

        repeat = self.heads // self.kv
        y = F.scaled_dot_product_attention(
            rotate(q),
            rotate(k).repeat_interleave(repeat, 1),
            v.repeat_interleave(repeat, 1),
            is_causal=True,
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Experts(nn.Module):
    """Top-k routed experts: tokens are sorted by expert, then one matmul per expert."""

    def __init__(self, c):
        super().__init__()
        e, d, f = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.top_k = c["num_experts_per_tok"]
        self.gate = nn.Linear(d, e, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(e, f, d))
        self.up_proj = nn.Parameter(torch.empty(e, f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            probability = F.linear(flat.float(), self.gate.weight).softmax(-1)
        weight, chosen = probability.topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        experts = self.gate.out_features
        order = chosen.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=experts)
        rows = order // self.top_k
        pieces = flat[rows].split(counts.tolist())
        outputs = [
            F.linear(F.silu(F.linear(piece, gate)) * F.linear(piece, up), down)
            for piece, gate, up, down in zip(
                pieces,
                self.gate_proj.unbind(0),
                self.up_proj.unbind(0),
                self.down_proj.unbind(0),
                strict=True,
            )
        ]
        scaled = torch.cat(outputs) * weight.reshape(-1)[order, None].to(outputs[0].dtype)
        out = torch.zeros_like(flat, dtype=scaled.dtype).index_add(0, rows, scaled)
        share = counts.float() / counts.sum()
        balance = experts * (share * probability.mean(0)).sum()
        return out.view(x.shape), balance, counts


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Experts(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, balance, counts = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance, counts


class Model(nn.Module):
    """The decoder, with tied embeddings."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=c["initializer_range"])

    def forward(self, tokens):
        c = self.config
        steps = torch.arange(0, c["head_dim"], 2, dtype=torch.float32) / c["head_dim"]
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), c["rope_theta"] ** -steps)
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        x, balance, counts = self.embed_tokens(tokens), 0.0, []
        for layer in self.layers:
            x, layer_balance, layer_counts = layer(x, cos, sin)
            balance = balance + layer_balance
            counts.append(layer_counts)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return logits, balance / len(self.layers), torch.stack(counts)


def orthogonalise(g):
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a batch of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for hidden matrices."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                state["m"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(state["m"], group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * 0.01).add_(update, alpha=-group["lr"] * scale)


def make_tokenizer(corpus, path, vocab_size):
    """Train a byte-level BPE tokenizer, or load the one that an earlier run trained."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (corpus / "train.txt").read_text().split(SPECIAL[0])
    tokenizer.train_from_iterator(documents[::3], trainer)
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer, source, target):
    """Tokenise a file once; later runs map the result."""
    if not target.exists():
        documents = [text + SPECIAL[0] for text in source.read_text().split(SPECIAL[0]) if text]
        ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(documents)]
        np.save(target, np.concatenate(ids))
    return np.load(target, mmap_mode="r")


@torch.no_grad()
def evaluate(model, tokens, num_bytes, length=2048):
    """Return bits per byte, nats per token, and the tokens each expert got, per layer."""
    total, counts = 0.0, 0
    for first in range(0, len(tokens) - 1, length):
        piece = torch.from_numpy(tokens[first : first + length + 1].astype(np.int64))[None]
        with torch.autocast("cpu", torch.bfloat16):
            logits, _, layer_counts = model(piece[:, :-1])
        total += F.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum").item()
        counts = counts + layer_counts
    return total / math.log(2) / num_bytes, total / (len(tokens) - 1), counts


def export(model, tokenizer, target):
    """Write the Hugging Face directory under Qwen3-MoE tensor names."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().bfloat16()
        if name.endswith(("gate_proj", "up_proj", "down_proj")) and value.dim() == 3:
            stem, kind = name.rsplit(".", 1)
            for expert in range(value.shape[0]):
                tensors[f"model.{stem}.experts.{expert}.{kind}.weight"] = value[expert].clone()
        else:
            tensors[f"model.{name}"] = value.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main():
    """Train, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(options.corpus, work / "tokenizer.json", CONFIG["vocab_size"])
    train = encode(tokenizer, options.corpus / "train.txt", work / "train.npy")
    held = encode(tokenizer, options.corpus / "held_out.txt", work / "held_out.npy")
    held_text = (options.corpus / "held_out.txt").read_text().replace(SPECIAL[0], "")
    held_bytes = len(held_text.encode())

    model = Model(CONFIG)
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() > 1 and "embed" not in name and "mlp.gate.weight" not in name
        (matrices if hidden else others).append(parameter)
    optimizers = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, spent, state_path = 0, 0.0, work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path)
        start, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    log = (work / "log.txt").open("a")

    def say(text):
        print(text, file=log, flush=True)

    clock = time.perf_counter()
    for step in range(start, options.steps):
        progress = step / options.steps
        rate = min(1.0, (step + 1) / 40) * min(1.0, (1 - progress) / 0.5)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        length = 512 if progress < 0.85 else CONFIG["max_position_embeddings"]
        generator = np.random.default_rng((options.seed, step))
        starts = generator.integers(0, len(train) - length - 1, options.batch_tokens // length)
        batch = np.stack([train[first : first + length + 1] for first in starts]).astype(np.int64)
        tokens = torch.from_numpy(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits, balance, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == options.steps - 1:
            seconds = spent + time.perf_counter() - clock
            say(f"step {step} loss {loss:.4f} balance {balance:.3f} seconds {seconds:.0f}")
        if (step + 1) % 100 == 0 or step == options.steps - 1:
            state = {
                "step": step + 1,
                "seconds": spent + time.perf_counter() - clock,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)
    bits, nats, counts = evaluate(model, held, held_bytes)
    say(f"held out: {bits:.4f} bits/byte, {nats:.4f} nats/token, {len(held)} tokens")
    say(f"tokens per expert: {counts.tolist()}")
    export(model, tokenizer, work / "export")


if __name__ == "__main__":
    main()
