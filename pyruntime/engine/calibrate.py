"""Mean squares of the experts' activations, found by running the engine over text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import Tokenizer
from pyruntime.errors import InvalidArgumentError
from pyruntime.moe import ReferenceExperts

__all__ = ["Importance", "calibrate"]

Floats = NDArray[np.float32]

_PRIOR = 16.0
"""Tokens' worth of the layer's mean that an expert starts from: few are routed to some."""


class Importance:
    """Mean squares of what reaches gate and up (per layer) and down (per expert)."""

    def __init__(self) -> None:
        self._inputs: dict[int, Floats] = {}
        self._inner: dict[int, Floats] = {}

    def set(self, layer: int, inputs: Floats, inner: Floats) -> None:
        """Set a layer's [hidden] and [experts, ffn]."""
        self._inputs[layer], self._inner[layer] = inputs, inner

    def of(self, layer: int, expert: int, matrix: int) -> Floats | None:
        """Return those of a matrix's columns; None for a layer that saw nothing."""
        if layer not in self._inputs:
            return None
        row = self._inner[layer][expert] if matrix == 2 else self._inputs[layer]
        return np.ascontiguousarray(row, np.float32)


class _Recorder(ReferenceExperts):
    """Float experts that also sum up the squares of what they see."""

    def __init__(self, layers: dict[int, tuple[Floats, Floats, Floats]]) -> None:
        super().__init__(layers)
        self.inputs = {i: np.zeros(part[0].shape[2]) for i, part in layers.items()}
        self.tokens = dict.fromkeys(layers, 0)
        self.inner = {i: np.zeros(part[0].shape[:2]) for i, part in layers.items()}
        self.routed = {i: np.zeros(len(part[0])) for i, part in layers.items()}

    def ffn(
        self, layer: int, x: Floats, ids: NDArray[np.int32], weights: Floats, out: Floats
    ) -> NDArray[np.uint8]:
        self.inputs[layer] += np.square(x, dtype=np.float64).sum(axis=0)
        self.tokens[layer] += len(x)
        gate, up, _ = self._layers[layer]
        for expert in np.unique(ids[ids >= 0]).tolist():
            rows = np.ascontiguousarray(x[(ids == expert).any(axis=1)])
            hidden = ops.linear(rows, gate[expert])
            ops.silu_mul(hidden, ops.linear(rows, up[expert]), hidden)
            self.inner[layer][expert] += np.square(hidden, dtype=np.float64).sum(axis=0)
            self.routed[layer][expert] += len(rows)
        return super().ffn(layer, x, ids, weights, out)


def calibrate(
    model: str | Path, text: str | Path, *, num_tokens: int = 8192, window: int = 512
) -> Importance:
    """Run a float model over text and measure what its experts see.

    Parameters
    ----------
    model : path
        A Hugging Face model directory; all of it is loaded as float32.
    text : path
        A text file.
    num_tokens : int, default 8192
        Tokens used at most, in windows of `window`.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        The text is too short to tell anything (under 32 tokens).
    """
    from pyruntime.engine.llm import LLM

    tokens = Tokenizer(model).encode(Path(text).read_text(errors="replace"))[:num_tokens]
    if len(tokens) < 32:
        raise InvalidArgumentError(f"{text} has {len(tokens)} tokens; calibration needs 32 or more")
    with LLM(model, kv_bytes=256 << 20, max_running=8) as llm:
        engine: Any = llm.loop.engine
        window = min(window, engine.config.max_len - 1)
        recorder = _Recorder(engine.weights.experts)
        engine.experts = engine._layers.experts = recorder
        parts = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        llm.generate(parts, SamplingParams(), max_tokens=1, ignore_eos=True)
    importance = Importance()
    for layer, count in recorder.tokens.items():
        if count == 0:
            continue
        routed = recorder.routed[layer][:, None]
        mean = recorder.inner[layer].sum(axis=0) / max(1.0, routed.sum())
        inner = (recorder.inner[layer] + _PRIOR * mean) / (routed + _PRIOR)
        importance.set(
            layer,
            (recorder.inputs[layer] / count).astype(np.float32),
            inner.astype(np.float32),
        )
    return importance
