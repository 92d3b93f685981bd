"""Sampling at the end of a step: the last rows' logits, processed and drawn from natively."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyruntime import ops
from pyruntime.engine.linear import apply
from pyruntime.engine.loader import Weights
from pyruntime.engine.step import Floats, Rows, Sequence, StepResult
from pyruntime.engine.workspace import Workspace
from pyruntime.moe import DEGRADED, FAILED

__all__ = ["sample_rows"]


def sample_rows(
    weights: Weights,
    eps: float,
    sequences_of: dict[int, Sequence],
    pieces: list[int],
    x: Floats,
    rows: Rows,
    token_status: NDArray[np.uint8],
    result: StepResult,
    return_logits: bool,
    work: Workspace,
) -> list[tuple[int, int]]:
    """Fill the result's samples; return (request, token) pairs."""
    lowered = np.bincount(rows.row_piece[token_status & DEGRADED != 0])
    result.degraded = {rows.requests[p]: int(lowered[p]) for p in np.flatnonzero(lowered).tolist()}
    for piece in np.unique(rows.row_piece[token_status & FAILED != 0]).tolist():
        result.failed[rows.requests[piece]] = "an expert could not be read"
    pieces = [piece for piece in pieces if rows.requests[piece] not in result.failed]
    if not pieces:
        return []
    last = rows.starts[np.array(pieces) + 1] - 1
    normed = ops.rms_norm(np.ascontiguousarray(x[last]), weights.norm, eps)
    out = work.array("logits", len(pieces), weights.embedding.shape[0])
    logits = apply(normed, weights.head, out=out)
    kept = logits.copy() if return_logits else None
    sequences = [sequences_of[rows.requests[piece]] for piece in pieces]
    params = np.array([sequence.row for sequence in sequences], ops.SAMPLING)
    params["position"] = [sequence.size for sequence in sequences]
    bias = tokens = None
    if any(sequence.params.logit_bias for sequence in sequences):
        pairs = [sorted(s.params.logit_bias.items()) for s in sequences]
        flat = [pair for row in pairs for pair in row]
        bias = (
            _offsets([len(row) for row in pairs]),
            np.array([token for token, _ in flat], np.int32),
            np.array([value for _, value in flat], np.float32),
        )
    if any(sequence.params.penalises for sequence in sequences):
        known = [s.tokens[: s.size if s.params.penalises else 0] for s in sequences]
        prompts = [min(s.prompt_len, len(k)) for s, k in zip(sequences, known, strict=True)]
        tokens = (
            _offsets([len(k) for k in known]),
            np.concatenate(known),
            np.array(prompts, np.int64),
        )
    sampled = ops.sample(logits, params, bias, tokens)
    good = sampled.status == 0
    for index in np.flatnonzero(~good).tolist():
        result.failed[rows.requests[pieces[index]]] = "its logits are not finite"
    if not good.all():
        sampled = ops.SampleResult(*(part[good] for part in sampled))
        kept = None if kept is None else kept[good]
    result.requests = [rows.requests[p] for p, fine in zip(pieces, good, strict=True) if fine]
    result.sampled, result.logits = sampled, kept
    return list(zip(result.requests, sampled.tokens.tolist(), strict=True))


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
