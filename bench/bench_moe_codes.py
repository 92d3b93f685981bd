"""What the nested code loses and takes: beside llama.cpp's types, beside codes of one width.

Errors are squared and relative, on the experts of the model that ships and on normal weights.
llama.cpp: PYRUNTIME_LLAMA_PYTHON as for bench_moe.py, with `gguf`; without it its errors are left
out.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench.support import size
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.loader import Checkpoint
from pyruntime.models import shipped
from pyruntime.moe import NestedMatrix

PEER = Path(__file__).parent / "peers" / "llama_error.py"
NESTED = [2, 4, 6, 8]
# by width: our layout and level, and the peer's type that has about as many bits a weight
BESIDE = {
    2: (NESTED, 0, "Q2_K"),
    4: ([4, 6, 8], 0, "Q4_K"),
    6: ([4, 6, 8], 1, "Q6_K"),
    8: ([4, 6, 8], 2, "Q8_0"),
}
SEARCH = 16


def experts(count):
    """Return the experts of the first `count` layers of the model that ships, below each other."""
    config, checkpoint = ModelConfig.load(shipped()), Checkpoint(shipped())
    shape = {"gate": 0, "up": 0, "down": 1}
    sizes = (config.expert_ffn, config.hidden)
    return np.concatenate(
        [
            checkpoint.read(
                f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight",
                sizes if axis == 0 else sizes[::-1],
            )
            for layer in range(count)
            for expert in range(config.num_experts)
            for name, axis in shape.items()
        ]
    ).astype(np.float32)


def weights_of(kind, benchmark):
    if kind == "experts":
        return experts(size(benchmark, 4, 1))
    rows = size(benchmark, 8192, 64)
    return np.random.default_rng(0).standard_normal((rows, 256), np.float32) * np.float32(0.02)


def error(weights, matrix, level=None):
    lost = matrix.dequantize(level).astype(np.float64) - weights
    return float((lost**2).sum() / (weights.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("kind", ["experts", "normal"])
def test_error_beside_llama_cpp(benchmark, tmp_path, kind):
    weights = weights_of(kind, benchmark)
    theirs = {}
    if python := os.environ.get("PYRUNTIME_LLAMA_PYTHON"):
        np.save(tmp_path / "weights.npy", weights)
        command = [python, str(PEER), str(tmp_path / "weights.npy")]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    benchmark.extra_info["peer"] = theirs
    for width, (layout, level, peer) in BESIDE.items():
        nested = NestedMatrix.quantize(weights, layout, search=SEARCH)
        stored = sum(plane.nbytes for plane in nested.planes[: level + 1])
        row = {
            "bits_per_weight": round(8 * stored / weights.size, 3),
            "error": error(weights, nested, level),
        }
        if theirs:
            row["over_" + peer] = round(row["error"] / theirs[peer]["error"], 3)
        benchmark.extra_info[f"{width} bits"] = row
    benchmark.pedantic(NestedMatrix.quantize, (weights, NESTED), {"search": SEARCH}, rounds=1)


@pytest.mark.parametrize("kind", ["experts", "normal"])
def test_cost_of_nesting(benchmark, kind):
    """Errors over those of a code of that width alone, and bytes over those of three such codes."""
    weights = weights_of(kind, benchmark)
    nested = benchmark.pedantic(
        NestedMatrix.quantize, (weights, NESTED), {"search": SEARCH}, rounds=1
    )
    apart = 0
    for level, width in enumerate(NESTED):
        if width == 6:  # no code of one plane
            continue
        alone = NestedMatrix.quantize(weights, [width], search=SEARCH)
        apart += alone.nbytes
        ratio = error(weights, nested, level) / error(weights, alone)
        benchmark.extra_info[f"{width} bits over alone"] = round(ratio, 3)
    benchmark.extra_info["bytes over 2, 4 and 8 apart"] = round(nested.nbytes / apart, 3)
