"""From a Hugging Face model to a quantized one, a layer at a time.

The result is a directory as `pyruntime.engine.stored` describes it. It is built under another name
and gets its own only when all of it is on disk, so an interrupted run leaves nothing that looks
complete. Memory holds one layer's experts in their code and one float expert at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.engine.calibrate import Importance
from pyruntime.engine.config import ModelConfig
from pyruntime.engine.loader import DENSE, HEAD, Checkpoint, Progress, expert_tensors
from pyruntime.engine.stored import STORE_NAME, model_hash
from pyruntime.errors import InvalidArgumentError, NotFoundError
from pyruntime.moe import NestedMatrix, StoreWriter, schemes

__all__ = ["LAYOUTS", "Report", "compare_schemes", "quantize"]

Floats = NDArray[np.float32]

LAYOUTS: dict[str, list[list[int]]] = {
    "2222": [[2, 4, 6, 8], [2, 4, 6, 8], [4, 4, 6, 8]],
    "422": [[4, 6, 8], [4, 6, 8], [4, 6, 8]],
    "44": [[4, 8], [4, 8], [4, 8]],
}
"""Widths of gate, up and down at each level; at the lowest, down has a plane more."""

GAIN = {2: 1.0}
"""By width: how much of the gain that least squares takes is given back."""

SEARCH = 8
"""Places tried for each end of a group's range, unless told otherwise."""

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass
class Report:
    """What a quantization did.

    `error` and `energy` are [layers, levels, 3] and [layers, 3]: sums over experts of squared
    errors and weights of gate, up and down (weighted by the activations if calibrated).
    """

    bits: list[list[int]]
    bytes_per_level: list[int]
    """Of all experts, cumulative: what is read to run at that level."""
    weights: int
    """Number of expert weights."""
    layers: list[int] = field(default_factory=list)
    error: list[list[list[float]]] = field(default_factory=list)
    energy: list[list[float]] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the dense matrices, by name (weighted too if calibrated)."""
    calibrated: bool = False

    def bits_per_weight(self, level: int) -> float:
        """Bits read per expert weight at a level, metadata included."""
        return 8 * self.bytes_per_level[level] / max(1, self.weights)

    def relative_error(self, level: int, layer: int | None = None) -> float:
        """Squared error over squared weights, of one layer (by position) or of all."""
        rows = range(len(self.layers)) if layer is None else (layer,)
        error = sum(sum(self.error[i][level]) for i in rows)
        return error / max(sum(sum(self.energy[i]) for i in rows), 1e-300)

    def as_text(self) -> str:
        """Return a table: a row per layer, a column per level."""
        levels = range(len(self.bits[0]))
        head = "".join(f"{'/'.join(str(row[i]) for row in self.bits):>12}" for i in levels)
        lines = [
            f"relative squared error by layer and width (gate/up/down bits)\n{'layer':>7}{head}"
        ]
        for at, layer in enumerate(self.layers):
            row = "".join(f"{self.relative_error(i, at):12.3e}" for i in levels)
            lines.append(f"{layer:>7}{row}")
        lines.append(f"{'all':>7}" + "".join(f"{self.relative_error(i):12.3e}" for i in levels))
        bits = "".join(f"{self.bits_per_weight(i):12.3f}" for i in levels)
        lines.append(f"{'b/w':>7}{bits}")
        lines.extend(f"dense {name}: {error:.3e}" for name, error in self.dense.items())
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        levels = range(len(self.bits[0]))
        return {
            "bits": self.bits,
            "bits_per_weight": [self.bits_per_weight(i) for i in levels],
            "relative_error": [self.relative_error(i) for i in levels],
            "layers": self.layers,
            "error": self.error,
            "energy": self.energy,
            "dense": self.dense,
            "calibrated": self.calibrated,
        }

    def as_svg(self) -> str:
        """Return a plot of relative error against bits per weight, a line per layer."""
        levels = range(len(self.bits[0]))
        xs = [self.bits_per_weight(i) for i in levels]
        rows = [[self.relative_error(i, at) for i in levels] for at in range(len(self.layers))]
        ys = [np.log10(max(v, 1e-12)) for row in rows for v in row] or [0.0]
        low, high = np.floor(min(ys)), np.ceil(max(ys))
        high = max(high, low + 1)

        def point(x: float, y: float) -> str:
            left = 60 + 520 * x / 10
            top = 20 + 300 * (high - np.log10(max(y, 1e-12))) / (high - low)
            return f"{left:.1f},{top:.1f}"

        parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="370" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="600" height="370" fill="white"/>',
            '<text x="300" y="360" text-anchor="middle">bits per expert weight</text>',
            '<text x="14" y="170" transform="rotate(-90 14 170)" text-anchor="middle">'
            "relative squared error</text>",
        ]
        for decade in range(int(low), int(high) + 1):
            _, top = point(0, 10.0**decade).split(",")
            parts.append(f'<line x1="60" x2="580" y1="{top}" y2="{top}" stroke="#ddd"/>')
            parts.append(f'<text x="55" y="{top}" text-anchor="end">1e{decade}</text>')
        for x in range(0, 11, 2):
            left, _ = point(x, 10.0**low).split(",")
            parts.append(f'<text x="{left}" y="336" text-anchor="middle">{x}</text>')
        for at, row in enumerate(rows):
            hue = 360 * at // max(1, len(rows))
            line = " ".join(point(x, y) for x, y in zip(xs, row, strict=True))
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="hsl({hue},60%,45%)">'
                f"<title>layer {self.layers[at]}</title></polyline>"
            )
        return "\n".join([*parts, "</svg>"])


def quantize(
    directory: str | Path,
    out: str | Path,
    *,
    layout: str = "2222",
    dense_bits: int | None = None,
    importance: Importance | None = None,
    search: int = SEARCH,
    gain: Mapping[int, float] = GAIN,
    progress: Progress | None = None,
) -> Report:
    """Quantize a Hugging Face model directory into `out`.

    Parameters
    ----------
    directory : path
    out : path
        Must not exist.
    layout : {"2222", "422", "44"}
        Which planes; see `LAYOUTS`.
    dense_bits : {4, 8}, optional
        Width of attention, dense networks and an untied head; they stay as they are by default.
        Router, norms and embedding always do.
    importance : Importance, optional
        Activations' mean squares, from `pyruntime.engine.calibrate.calibrate`.
    search : int, default 8
        Places tried for each end of a group's range, 1..16; 1 takes the whole range, in less
        than half the time.
    gain : mapping of int to float
        See `pyruntime.moe.NestedMatrix.quantize`, by width.
    progress : callable, optional
        Called with (layers done, layers).

    Returns
    -------
    Report
        Also written to ``quantization.json`` and ``quantization.svg`` in `out`.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        `out` exists, or a weight is not finite (the message names tensor and place).
    pyruntime.errors.CorruptDataError, NotFoundError, UnsupportedError
        See `pyruntime.engine.loader.Checkpoint`.
    """
    directory, out = Path(directory), Path(out)
    if layout not in LAYOUTS:
        raise InvalidArgumentError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if dense_bits not in (None, 4, 8):
        raise InvalidArgumentError(f"dense_bits is {dense_bits}; it must be 4 or 8")
    if out.exists():
        raise InvalidArgumentError(f"{out} exists; remove it or choose another name")
    config = ModelConfig.load(directory)
    checkpoint = Checkpoint(directory)
    if not out.parent.is_dir():
        raise NotFoundError(f"{out.parent} is not a directory")
    work = out.with_name(f"{out.name}.part-{os.getpid()}")
    work.mkdir()
    try:
        task = _Task(config, checkpoint, LAYOUTS[layout], dense_bits, importance, search, gain)
        report = task.run(directory, work, progress)
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return report


def compare_schemes(directory: str | Path) -> dict[str, dict[int, float]]:
    """Return relative squared errors by scheme and width, on one expert of the first sparse layer.

    ``nested`` is ours; ``binary from 2`` and ``binary from 4`` are `pyruntime.moe.schemes`.
    """
    config, checkpoint = ModelConfig.load(directory), Checkpoint(directory)
    layer = config.sparse.index(True)
    parts = [checkpoint.read(*tensor).ravel() for tensor in expert_tensors(config, layer, 0)[:2]]
    weights = np.concatenate(parts).reshape(-1, config.hidden)
    widths = (2, 4, 6, 8)
    nested = NestedMatrix.quantize(weights, widths)
    found = {
        "nested": {b: e / nested.energy for b, e in zip(widths, nested.error, strict=True)},
    }
    for base in (2, 4):
        planes = schemes.binary_planes(weights, [b for b in widths if b >= base])
        found[f"binary from {base}"] = schemes.relative_errors(weights, planes)
    return found


@dataclass
class _Task:
    config: ModelConfig
    checkpoint: Checkpoint
    bits: list[list[int]]
    dense_bits: int | None
    importance: Importance | None
    search: int
    gain: Mapping[int, float]

    def run(self, directory: Path, work: Path, progress: Progress | None) -> Report:
        c = self.config
        dense = dict(self._dense())
        done = {name for parts, _ in dense.values() for name, _ in parts}
        for layer in range(c.num_layers):
            if c.sparse[layer]:
                for expert in range(c.num_experts):
                    done |= {name for name, _ in expert_tensors(c, layer, expert)}
        for name in _COPIED:
            if (directory / name).exists():
                shutil.copyfile(directory / name, work / name)
        self._write_floats(work / "model.safetensors", done)
        levels = range(len(self.bits[0]))
        report = Report(self.bits, [0 for _ in levels], 0)
        report.calibrated = self.importance is not None
        with StoreWriter(
            work / STORE_NAME,
            num_layers=c.num_layers,
            num_experts=c.num_experts if any(c.sparse) else 0,
            hidden=c.hidden,
            ffn=c.expert_ffn if any(c.sparse) else 0,
            bits=self.bits,
            model_hash=model_hash(work),
        ) as writer:
            for layer in range(c.num_layers):
                if c.sparse[layer]:
                    self._experts(layer, writer, report)
                for (at, number), (parts, columns) in dense.items():
                    if at == layer:
                        self._dense_matrix(at, number, parts, columns, writer, report)
                if progress is not None:
                    progress(layer + 1, c.num_layers)
            writer.commit()
        (work / "quantization.json").write_text(json.dumps(report.as_dict()))
        (work / "quantization.svg").write_text(report.as_svg())
        return report

    def _nested(
        self, name: str, weights: Floats, bits: list[int], importance: Floats | None
    ) -> NestedMatrix:
        gain = [self.gain.get(b, 0.0) for b in bits]
        try:
            return NestedMatrix.quantize(
                weights, bits, importance=importance, gain=gain, search=self.search
            )
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{name}: {error}") from None

    def _experts(self, layer: int, writer: StoreWriter, report: Report) -> None:
        c, levels = self.config, range(len(self.bits[0]))
        error, energy = np.zeros((len(levels), 3)), np.zeros(3)
        experts = []
        for expert in range(c.num_experts):
            parts = []
            for i, (name, shape) in enumerate(expert_tensors(c, layer, expert)):
                weighing = self.importance.of(layer, expert, i) if self.importance else None
                part = self._nested(name, self.checkpoint.read(name, shape), self.bits[i], weighing)
                error[:, i] += part.error
                energy[i] += part.energy
                report.weights += part.rows * part.columns
                for level in levels:
                    size = sum(plane.nbytes for plane in part.planes[: level + 1])
                    report.bytes_per_level[level] += size
                parts.append(part)
            experts.append(parts)
        writer.add_layer(layer, experts)
        report.layers.append(layer)
        report.error.append(error.tolist())
        report.energy.append(energy.tolist())

    def _dense(self) -> Iterator[tuple[tuple[int, int], tuple[list[tuple[str, int]], int]]]:
        """Yield (layer, number), then ((tensor, rows), columns) of each dense matrix."""
        c = self.config
        if self.dense_bits is None:
            return
        d, q, kv = c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim
        if not c.tied:
            yield (0, HEAD), ([("lm_head.weight", c.vocab_size)], d)
        for layer in range(c.num_layers):
            at = f"model.layers.{layer}"
            qkv = [
                (f"{at}.self_attn.{n}_proj.weight", r) for n, r in (("q", q), ("k", kv), ("v", kv))
            ]
            yield (layer, DENSE["qkv"]), (qkv, d)
            yield (layer, DENSE["out"]), ([(f"{at}.self_attn.o_proj.weight", d)], q)
            f = c.shared_ffn if c.sparse[layer] else c.dense_ffn
            if f == 0:
                continue
            mlp = f"{at}.mlp.shared_expert" if c.sparse[layer] else f"{at}.mlp"
            yield (layer, DENSE["gate"]), ([(f"{mlp}.gate_proj.weight", f)], d)
            yield (layer, DENSE["up"]), ([(f"{mlp}.up_proj.weight", f)], d)
            yield (layer, DENSE["down"]), ([(f"{mlp}.down_proj.weight", d)], f)

    def _dense_matrix(
        self,
        layer: int,
        number: int,
        parts: list[tuple[str, int]],
        columns: int,
        writer: StoreWriter,
        report: Report,
    ) -> None:
        assert self.dense_bits is not None
        whole = np.concatenate(
            [self.checkpoint.read(name, (rows, columns)) for name, rows in parts]
        )
        weighing = self.importance.of_dense(layer, number) if self.importance else None
        matrix = self._nested(parts[0][0], whole, [self.dense_bits], weighing)
        writer.add_dense(layer, number, matrix)
        report.dense[parts[0][0]] = matrix.error[-1] / max(matrix.energy, 1e-300)

    def _write_floats(self, path: Path, left_out: set[str]) -> None:
        """Write the tensors that stay, byte for byte, one at a time."""
        header: dict[str, Any] = {}
        names = [name for name in self.checkpoint.names if name not in left_out]
        at = 0
        for name in names:
            dtype, shape = self.checkpoint.entry(name)
            size = int(np.prod(shape, dtype=np.int64)) * _DTYPE_BYTES.get(dtype, 0)
            if dtype not in _DTYPE_BYTES:
                continue  # nothing of ours is in another type
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                file.write(self.checkpoint.raw(name))
            file.flush()
            os.fsync(file.fileno())
