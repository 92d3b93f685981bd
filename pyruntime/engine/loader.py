"""Weights: Hugging Face ``safetensors`` files, sharded or not, into float32 arrays.

Every tensor's shape is checked against the configuration before it is read, and a file's header
against its length, so that a truncated or lying checkpoint is refused with the name of what is
wrong. The library's numpy reader has no bfloat16, so it gives the places and we read the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from pyruntime.engine.config import ModelConfig
from pyruntime.engine.linear import Matrix
from pyruntime.errors import CorruptDataError, NotFoundError, UnsupportedError
from pyruntime.moe import ExpertStore, NestedMatrix

__all__ = [
    "DENSE",
    "HEAD",
    "Checkpoint",
    "LayerWeights",
    "Weights",
    "dense_bytes",
    "expert_tensors",
    "load_weights",
]

Floats = NDArray[np.float32]
Progress = Callable[[int, int], None]

DENSE = {"qkv": 0, "out": 1, "gate": 2, "up": 3, "down": 4}
"""Numbers of a layer's dense matrices in a store."""
HEAD = 16
"""Number of the output head, in layer 0."""

_PIECE = 1 << 20
"""Bytes that are read at a time."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Checkpoint:
    """The tensors of a model directory by name; a tensor is read when it is asked for.

    Parameters
    ----------
    directory : path
        Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises
    ------
    pyruntime.errors.NotFoundError
        There is no such file.
    pyruntime.errors.CorruptDataError
        A file is not valid or not whole.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        self._entries: dict[str, _Entry] = {}
        if index.exists():
            try:
                names: dict[str, str] = json.loads(index.read_text())["weight_map"]
                shards = sorted(set(names.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptDataError(f"{index} is not a shard index: {error}") from None
            for shard in shards:
                if Path(shard).name != shard:
                    raise CorruptDataError(f"{index} names a shard outside its folder: {shard!r}")
                self._read_header(directory / shard)
            if missing := [name for name in names if name not in self._entries]:
                raise CorruptDataError(f"{index} promises {missing[0]!r}, which no shard holds")
        elif single.exists():
            self._read_header(single)
        else:
            raise NotFoundError(f"{directory} holds no model.safetensors and no shard index")

    def _read_header(self, path: Path) -> None:
        if not path.exists():
            raise NotFoundError(f"{path} does not exist")
        try:
            # The library validates the header: sizes, order, no gaps, the file's length.
            with safetensors.safe_open(path, framework="numpy") as file, path.open("rb") as raw:
                offset = 8 + int.from_bytes(raw.read(8), "little")
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    size = math.prod(shape) * _BITS[dtype] // 8
                    self._entries[name] = _Entry(path, dtype, shape, offset, size)
                    offset += size
        except (safetensors.SafetensorError, KeyError, OSError) as error:
            raise CorruptDataError(f"{path} is not a whole safetensors file: {error}") from None

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype and shape as the file says."""
        return self._entries[name].dtype, self._entries[name].shape

    def raw(self, name: str) -> bytes:
        """Return a tensor's bytes as they are in the file."""
        return b"".join(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[bytes]:
        entry = self._entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            for first in range(0, entry.size, _PIECE):
                size = min(_PIECE, entry.size - first)
                data = file.read(size)
                if len(data) != size:
                    raise CorruptDataError(f"{entry.path} shrank while {name!r} was read")
                yield data

    def read(self, name: str, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        """Read one tensor as float32.

        Raises
        ------
        pyruntime.errors.CorruptDataError
            It is missing, has another shape, or could not be read whole.
        pyruntime.errors.UnsupportedError
            Its dtype is not F32, F16 or BF16.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CorruptDataError(f"the checkpoint has no tensor {name!r}")
        if entry.shape != shape:
            raise CorruptDataError(
                f"{entry.path}: {name!r} has shape {list(entry.shape)}; the config says "
                f"{list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{entry.path}: {name!r} is {entry.dtype}; supported are {', '.join(_DTYPES)}"
            )
        if out is None:
            out = np.empty(shape, np.float32)
        flat, first = out.reshape(-1), 0
        for piece in self._pieces(name):  # never the whole tensor twice
            raw = np.frombuffer(piece, _DTYPES[entry.dtype])
            part = flat[first : first + len(raw)]
            if entry.dtype == "BF16":
                np.left_shift(raw, 16, out=part.view(np.uint32), dtype=np.uint32, casting="unsafe")
            else:
                part[...] = raw
            first += len(raw)
        return out


@dataclass(slots=True)
class LayerWeights:
    """Dense weights of one layer; the experts belong to the expert backend."""

    attention_norm: Floats
    ffn_norm: Floats
    qkv: Matrix
    """[(heads + 2 * kv_heads) * head_dim, hidden]"""
    qkv_bias: Floats | None
    out: Matrix
    out_bias: Floats | None
    q_norm: Floats | None
    k_norm: Floats | None
    router: Floats | None
    """None in a dense layer."""
    dense: tuple[Matrix, Matrix, Matrix] | None
    """Gate, up and down of a dense layer, or of the shared expert."""
    shared_gate: Floats | None


@dataclass(slots=True)
class Weights:
    """All weights of a model."""

    embedding: Floats
    norm: Floats
    head: Matrix
    layers: list[LayerWeights]
    experts: dict[int, tuple[Floats, Floats, Floats]]

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but the experts."""
        parts: list[Any] = [self.embedding, self.norm]
        if self.head is not self.embedding:
            parts.append(self.head)
        for layer in self.layers:
            for name in LayerWeights.__slots__:
                value = getattr(layer, name)
                parts.extend(value if isinstance(value, tuple) else [value])
        return sum(part.nbytes for part in parts if part is not None)


def dense_bytes(directory: str | Path, store: ExpertStore) -> int:
    """Return the bytes of a quantized model's weights but for its experts; reads none of them.

    Raises
    ------
    pyruntime.errors.CorruptDataError, NotFoundError
        See `Checkpoint`.
    """
    checkpoint = Checkpoint(directory)
    floats = sum(math.prod(checkpoint.entry(name)[1]) for name in checkpoint.names)
    return floats * 4 + sum(extent.bytes for extent in store.extents if extent.dense)


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    progress: Progress | None = None,
    store: ExpertStore | None = None,
) -> Weights:
    """Load a model's weights.

    Parameters
    ----------
    directory : path
    config : ModelConfig
    progress : callable, optional
        Called with (layers done, layers) after each layer.
    store : ExpertStore, optional
        Holds the experts, which are then left out here, and perhaps dense matrices.

    Raises
    ------
    pyruntime.errors.CorruptDataError, NotFoundError, UnsupportedError
        See `Checkpoint`.
    """
    checkpoint = Checkpoint(directory)
    c = config
    d = c.hidden
    embedding = checkpoint.read("model.embed_tokens.weight", (c.vocab_size, d))
    head: Matrix = embedding
    stored = store.read_dense(0, HEAD) if store is not None else None
    if stored is not None:
        head = _checked("head", stored, (c.vocab_size, d))
    elif not c.tied:
        head = checkpoint.read("lm_head.weight", (c.vocab_size, d))
    layers: list[LayerWeights] = []
    experts: dict[int, tuple[Floats, Floats, Floats]] = {}
    for index in range(c.num_layers):
        layers.append(_layer(checkpoint, c, index, store))
        if c.sparse[index] and store is None:
            experts[index] = _experts(checkpoint, c, index)
        if progress is not None:
            progress(index + 1, c.num_layers)
    norm = checkpoint.read("model.norm.weight", (d,))
    return Weights(embedding, norm, head, layers, experts)


def _checked(name: str, matrix: NestedMatrix, shape: tuple[int, int]) -> NestedMatrix:
    if (matrix.rows, matrix.columns) != shape:
        raise CorruptDataError(
            f"the store's {name} is {matrix.rows} x {matrix.columns}; the config says "
            f"{shape[0]} x {shape[1]}"
        )
    return matrix


def _layer(
    checkpoint: Checkpoint, c: ModelConfig, index: int, store: ExpertStore | None
) -> LayerWeights:
    prefix, d = f"model.layers.{index}", c.hidden
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = f"{prefix}.self_attn"

    def matrix(name: str, shape: tuple[int, int], *parts: tuple[str, int]) -> Matrix:
        stored = store.read_dense(index, DENSE[name]) if store is not None else None
        if stored is not None:
            return _checked(f"{name} of layer {index}", stored, shape)
        whole, first = np.empty(shape, np.float32), 0
        for part, rows in parts:
            checkpoint.read(part, (rows, shape[1]), whole[first : first + rows])
            first += rows
        return whole

    def mlp_of(at: str, f: int) -> tuple[Matrix, Matrix, Matrix]:
        return (
            matrix("gate", (f, d), (f"{at}.gate_proj.weight", f)),
            matrix("up", (f, d), (f"{at}.up_proj.weight", f)),
            matrix("down", (d, f), (f"{at}.down_proj.weight", d)),
        )

    sizes = (("q", q), ("k", kv), ("v", kv))
    qkv = matrix(
        "qkv", (q + 2 * kv, d), *((f"{attention}.{name}_proj.weight", rows) for name, rows in sizes)
    )
    bias = None
    if c.qkv_bias:
        bias = np.concatenate(
            [checkpoint.read(f"{attention}.{name}_proj.bias", (rows,)) for name, rows in sizes]
        )
    q_norm = k_norm = None
    if c.qk_norm != "none":
        full = c.qk_norm == "full"
        q_norm = checkpoint.read(f"{attention}.q_norm.weight", (q if full else c.head_dim,))
        k_norm = checkpoint.read(f"{attention}.k_norm.weight", (kv if full else c.head_dim,))
    mlp = f"{prefix}.{'block_sparse_moe' if c.architecture.startswith('Mixtral') else 'mlp'}"
    dense = shared_gate = router = None
    if c.sparse[index]:
        router = checkpoint.read(f"{mlp}.gate.weight", (c.num_experts, d))
        if c.shared_ffn:
            dense = mlp_of(f"{mlp}.shared_expert", c.shared_ffn)
            shared_gate = checkpoint.read(f"{mlp}.shared_expert_gate.weight", (1, d))
    else:
        dense = mlp_of(mlp, c.dense_ffn)
    return LayerWeights(
        checkpoint.read(f"{prefix}.input_layernorm.weight", (d,)),
        checkpoint.read(f"{prefix}.post_attention_layernorm.weight", (d,)),
        qkv,
        bias,
        matrix("out", (d, q), (f"{attention}.o_proj.weight", d)),
        checkpoint.read(f"{attention}.o_proj.bias", (d,)) if c.out_bias else None,
        q_norm,
        k_norm,
        router,
        dense,
        shared_gate,
    )


def expert_tensors(c: ModelConfig, layer: int, expert: int) -> list[tuple[str, tuple[int, int]]]:
    """Return names and shapes of an expert's gate, up and down."""
    d, f = c.hidden, c.expert_ffn
    mixtral = c.architecture.startswith("Mixtral")
    at = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}.experts.{expert}"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shapes = ((f, d), (f, d), (d, f))
    return [(f"{at}.{name}.weight", shape) for name, shape in zip(names, shapes, strict=True)]


def _experts(checkpoint: Checkpoint, c: ModelConfig, index: int) -> tuple[Floats, Floats, Floats]:
    e, d, f = c.num_experts, c.hidden, c.expert_ffn
    parts = [np.empty((e, *shape), np.float32) for shape in ((f, d), (f, d), (d, f))]
    for expert in range(e):
        for (name, shape), part in zip(expert_tensors(c, index, expert), parts, strict=True):
            checkpoint.read(name, shape, part[expert])
    return parts[0], parts[1], parts[2]
