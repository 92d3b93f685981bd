"""A quantized model's directory: a store of experts beside what stays in float.

``experts.mxs`` holds the experts (and perhaps dense matrices), ``model.safetensors`` all other
tensors, ``config.json`` and the tokenizer are those of the model. The store knows a hash of both,
so that files of different models do not run together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pyruntime.engine.config import ModelConfig
from pyruntime.errors import CorruptDataError, InvalidArgumentError
from pyruntime.moe import ExpertStore

__all__ = ["STORE_NAME", "content_hash", "model_hash", "need_store", "open_store"]

STORE_NAME = "experts.mxs"


def model_hash(directory: str | Path) -> bytes:
    """Return SHA-256 of the configuration and of the names and places of the float tensors."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with (directory / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(size, 100 << 20)))
    return digest.digest()


def content_hash(directory: str | Path) -> bytes:
    """Return SHA-256 of everything that a model computes with: its configuration and all weights.

    Reads every byte, so that no two models share what was computed by one of them.
    """
    directory = Path(directory)
    whole = hashlib.sha256()
    files = [*directory.glob("*.safetensors"), directory / STORE_NAME, directory / "config.json"]
    for path in sorted(files):
        if path.exists():
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.digest()


def open_store(directory: str | Path, config: ModelConfig) -> ExpertStore | None:
    """Open a model directory's store; None if it has none.

    Raises
    ------
    pyruntime.errors.CorruptDataError
        It is damaged, or of another model than the directory's configuration and tensors.
    """
    path = Path(directory) / STORE_NAME
    if not path.exists():
        return None
    store = ExpertStore(path)
    sparse = [layer for layer in range(config.num_layers) if config.sparse[layer]]
    found = (store.num_layers, store.num_experts, store.hidden, store.ffn, store.layers)
    wanted = (config.num_layers, config.num_experts, config.hidden, config.expert_ffn, sparse)
    if sparse and found != wanted:
        raise CorruptDataError(
            f"{path} has (layers, experts, hidden, ffn, sparse layers) {found}; the config says "
            f"{wanted}"
        )
    if store.model_hash != model_hash(directory):
        raise CorruptDataError(f"{path} belongs to another model than config.json beside it")
    return store


def need_store(store: ExpertStore | None, directory: str | Path, bits: int | None) -> None:
    """Refuse a width where there is no store."""
    if store is None and bits is not None:
        raise InvalidArgumentError(
            f"bits is {bits}, but {directory} is not quantized: run `pyruntime quantize` first"
        )
