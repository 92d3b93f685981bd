"""How much the experts of a trained model differ, on held-out text.

Usage: ``python routing.py WORK_DIRECTORY``, after ``train.py``. Prints, per layer, the entropy of
the first expert and how much of it the input token explains; then the loss when every token's
experts are exchanged for their neighbours: without specialisation it would stay the same.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from train import CONFIG, Experts, Model


def losses(model, tokens):
    """Return nats per token over windows of 2048."""
    total = 0.0
    for first in range(0, len(tokens) - 2048, 2048):
        piece = torch.from_numpy(tokens[first : first + 2049].astype(np.int64))[None]
        with torch.no_grad():
            logits, _, _ = model(piece[:, :-1])
        total += F.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
    return total / (len(tokens) // 2048 * 2048)


def main(work):
    """Print the figures."""
    torch.set_num_threads(2)
    model = Model(CONFIG)
    model.load_state_dict(torch.load(work / "state.pt")["model"])
    tokens = np.load(work / "held_out.npy")[: 20 * 2048 + 1]
    first_experts = [[] for _ in model.layers]
    for layer, block in enumerate(model.layers):
        block.mlp.register_forward_pre_hook(
            lambda module, inputs, layer=layer: first_experts[layer].append(
                F.linear(inputs[0].reshape(-1, CONFIG["hidden_size"]), module.gate.weight).argmax(
                    -1
                )
            )
        )
    learnt = losses(model, tokens)
    ids = np.concatenate(
        [tokens[first : first + 2048] for first in range(0, len(tokens) - 2048, 2048)]
    )
    for layer, chosen in enumerate(first_experts):
        table = np.zeros((CONFIG["vocab_size"], CONFIG["num_experts"]))
        np.add.at(table, (ids, torch.cat(chosen).numpy()), 1)
        joint = table / table.sum()
        marginal = joint.sum(0)
        entropy = -(marginal * np.log2(marginal, where=marginal > 0)).sum()
        by_token = joint / joint.sum(1, keepdims=True).clip(1e-12)
        conditional = -(
            joint * np.log2(by_token, where=by_token > 0, out=np.zeros_like(joint))
        ).sum()
        print(
            f"layer {layer}: entropy of the first expert {entropy:.2f} bits of 3, "
            f"{1 - conditional / entropy:.0%} explained by the token"
        )
    plain = Experts.forward
    topk = torch.Tensor.topk

    def exchanged(self, x):
        def shifted(tensor, k, dim):
            values, chosen = topk(tensor, k, dim)
            return values, (chosen + 1) % CONFIG["num_experts"]

        torch.Tensor.topk = shifted
        try:
            return plain(self, x)
        finally:
            torch.Tensor.topk = topk

    Experts.forward = exchanged
    print(
        f"nats per token {learnt:.3f}; with neighbouring experts {losses(model, tokens):.3f}; "
        f"without knowledge {math.log(CONFIG['vocab_size']):.3f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
