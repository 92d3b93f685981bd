"""Other ways to nest widths, for comparison with ours; float arithmetic, nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["binary_planes", "relative_errors"]

Floats = NDArray[np.float32]


def binary_planes(
    weights: Floats, bits: Sequence[int], *, group: int = 128
) -> dict[int, NDArray[np.float64]]:
    """Quantize with a low base width and binary residual planes.

    The base is an asymmetric code of ``bits[0]`` bits per group of columns. Each further bit adds a
    plane of signs of what is left, with one scale per group: its mean magnitude, which is the least
    squares choice.

    Parameters
    ----------
    weights : ndarray of float32, shape (rows, columns)
    bits : sequence of int
        Rising widths; every width between the first and the last gets a plane.
    group : int, default 128
        Columns per group; the last one may be shorter.

    Returns
    -------
    dict of int to ndarray of float64
        The weights at each of `bits`.

    References
    ----------
    Wang et al., D2MoE: dual routing and dynamic scheduling for efficient on-device MoE-based LLM
    serving (MobiCom 2025), section on matryoshka weight quantization.
    """
    rows, columns = weights.shape
    groups = -(-columns // group)
    padded = np.zeros((rows, groups * group))
    padded[:, :columns] = weights
    inside = np.zeros(groups * group, bool)
    inside[:columns] = True
    w = padded.reshape(rows, groups, group)
    counted = inside.reshape(1, groups, group)
    low = np.where(counted, w, np.inf).min(axis=2, keepdims=True)
    high = np.where(counted, w, -np.inf).max(axis=2, keepdims=True)
    step = np.maximum(high - low, 1e-30) / (2 ** bits[0] - 1)
    approximation = low + step * np.rint((w - low) / step)
    out: dict[int, NDArray[np.float64]] = {}
    for width in range(bits[0], bits[-1] + 1):
        if width > bits[0]:
            left = np.where(counted, w - approximation, 0.0)
            scale = np.abs(left).sum(axis=2, keepdims=True) / counted.sum(axis=2, keepdims=True)
            approximation = approximation + scale * np.where(left < 0, -1.0, 1.0)
        if width in bits:
            out[width] = approximation.reshape(rows, -1)[:, :columns].copy()
    return out


def relative_errors(weights: Floats, by_width: dict[int, NDArray[np.float64]]) -> dict[int, float]:
    """Return squared error over squared weights for each width."""
    energy = float(np.square(weights, dtype=np.float64).sum())
    return {b: float(np.square(w - weights).sum()) / energy for b, w in by_width.items()}
