"""Mean squares of what matrices are multiplied with, found by running the engine over text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.loader import DENSE, HEAD, Weights
from pyruntime.engine.sampling import SamplingParams
from pyruntime.engine.text import Tokenizer
from pyruntime.errors import InvalidArgumentError
from pyruntime.moe import ReferenceExperts

__all__ = ["Importance", "calibrate"]

Floats = NDArray[np.float32]

_PRIOR = 16.0
"""Tokens' worth of the layer's mean that an expert starts from: few are routed to some."""


class Importance:
    """Mean squares of what reaches gate and up (per layer), down (per expert), dense matrices."""

    def __init__(self) -> None:
        self._dense: dict[tuple[int, int], Floats] = {}
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

    def set_dense(self, layer: int, number: int, inputs: Floats) -> None:
        """Set those of a dense matrix's columns.

        Parameters
        ----------
        layer : int
        number : int
            A value of `pyruntime.engine.loader.DENSE`, or ``HEAD``.
        inputs : ndarray of float32, shape (columns,)
        """
        self._dense[layer, number] = np.ascontiguousarray(inputs, np.float32)

    def of_dense(self, layer: int, number: int) -> Floats | None:
        """Return those of a dense matrix's columns; None if nothing reached it."""
        return self._dense.get((layer, number))


class _Watched:
    """A float matrix that also sums up the squares of what it is multiplied with."""

    def __init__(self, weight: Floats) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes
        self.squares = np.zeros(weight.shape[1])
        self.tokens = 0

    def linear(self, x: Floats, out: Floats | None = None) -> Floats:
        """As `NestedMatrix.linear`."""
        self.squares += np.square(x, dtype=np.float64).sum(axis=0)
        self.tokens += len(x)
        return ops.linear(x, self.weight, out=out)


def _watch(weights: Weights, tied: bool) -> dict[tuple[int, int], _Watched]:
    """Put watched matrices in place of the dense ones; return them by layer and number."""
    found: dict[tuple[int, int], _Watched] = {}

    def watched(layer: int, number: int, weight: Any) -> Any:
        found[layer, number] = _Watched(weight)
        return found[layer, number]

    if not tied:
        weights.head = watched(0, HEAD, weights.head)
    for layer, w in enumerate(weights.layers):
        w.qkv = watched(layer, DENSE["qkv"], w.qkv)
        w.out = watched(layer, DENSE["out"], w.out)
        if w.dense is not None:
            gate, up, down = (
                watched(layer, DENSE[name], part)
                for name, part in zip(("gate", "up", "down"), w.dense, strict=True)
            )
            w.dense = gate, up, down
    return found


def _measured(
    importance: Importance, found: dict[tuple[int, int], _Watched], norm: NDArray[np.float64]
) -> None:
    """Set what watched matrices have seen; `norm` is the squared weight of the last norm."""
    for (layer, number), matrix in found.items():
        squares, seen = matrix.squares, float(matrix.tokens)
        if number == HEAD:  # it sees one row of each window: its norm says what to expect
            squares, seen = squares + _PRIOR * norm, seen + _PRIOR
        if seen > 0:
            importance.set_dense(layer, number, (squares / seen).astype(np.float32))


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
    """Run a float model over text and measure what its experts and dense matrices see.

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
        dense = _watch(engine.weights, engine.config.tied)
        norm = np.square(engine.weights.norm, dtype=np.float64)
        parts = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        llm.generate(parts, SamplingParams(), max_tokens=1, ignore_eos=True)
    importance = Importance()
    _measured(importance, dense, norm)
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
