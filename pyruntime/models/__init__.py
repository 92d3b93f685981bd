"""The model that ships: a small mixture of experts, trained by the recipe beside it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SHIPPED_NAME", "shipped"]

SHIPPED_NAME = "tiny-moe"
"""Model id under which the server offers it."""


def shipped() -> Path:
    """Return the directory of the model that ships, in Hugging Face layout.

    Qwen3-MoE layout: width 256, 4 layers, 8 experts of width 256, two per token; 2048 byte-level
    BPE tokens; context of 2048. See ``TRAINING.md`` and ``LICENCES.md`` beside it.
    """
    return Path(__file__).resolve().parent / "tiny_moe"
