"""Bit policies: the second router, which says at what width a token sees each of its experts.

Contract of a policy
--------------------
``levels(layer, ids, weights) -> uint8 [n, top_k]`` for int32 ids and float32 weights [n, top_k]. A
policy is *repeatable* if a token's levels depend on its own row alone: then a request's text does
not depend on its company or on what is in memory. A learned router has the same interface.

A policy is bound to a store once, by the cache that uses it (`bind`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import InvalidArgumentError
from pyruntime.moe.store import ExpertStore

__all__ = ["AverageBits", "BitPolicy", "Deadline", "Fixed", "RankBased", "parse_policy"]

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
Missing = Callable[[int, Ints, int], int]
"""(layer, experts, level) -> bytes that computing them at this level would have to read."""


class BitPolicy(Protocol):
    """See the module."""

    repeatable: bool

    def bind(self, store: ExpertStore, missing: Missing) -> None:
        """Learn the widths and errors of a store."""
        ...

    def levels(self, layer: int, ids: Ints, weights: Floats) -> Levels:
        """Return the level of each slot."""
        ...


class Fixed:
    """Every expert at one width.

    Parameters
    ----------
    bits : int, optional
        Width of gate and up; the store's widest by default.
    """

    repeatable = True

    def __init__(self, bits: int | None = None) -> None:
        self.bits = bits
        self.level = 0

    def bind(self, store: ExpertStore, missing: Missing) -> None:
        """Find the level of the width; InvalidArgumentError if the store has none."""
        self.level = store.levels - 1 if self.bits is None else store.level_of(self.bits)

    def levels(self, layer: int, ids: Ints, weights: Floats) -> Levels:
        """Return the one level."""
        return np.full(ids.shape, self.level, np.uint8)


class RankBased:
    """A token's first expert at the first width, its second at the second, and so on.

    Parameters
    ----------
    bits : sequence of int
        Widths by rank of the router's weight; the last one holds for all further ranks.
    """

    repeatable = True

    def __init__(self, bits: Sequence[int] = (8, 6, 4)) -> None:
        if not bits:
            raise InvalidArgumentError("bits is empty; it must have a width at least")
        self.bits = tuple(bits)
        self._by_rank = np.zeros(0, np.uint8)

    def bind(self, store: ExpertStore, missing: Missing) -> None:
        """Find the levels of the widths; InvalidArgumentError if the store lacks one."""
        self._by_rank = np.array([store.level_of(b) for b in self.bits], np.uint8)

    def levels(self, layer: int, ids: Ints, weights: Floats) -> Levels:
        """Return levels by rank; equal weights rank in slot order."""
        order = np.argsort(-weights, axis=1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(ids.shape[1])[None, :], axis=1)
        return self._by_rank[np.minimum(ranks, len(self._by_rank) - 1)]


class AverageBits:
    """Spends a number of bits per token where they take away most error.

    Every expert of a token starts at the narrowest width; then the step with the most error taken
    away per bit is made, as long as the token's average stays within `bits`. The error of an expert
    counts with the square of the router's weight.

    Parameters
    ----------
    bits : float
        Average over a token's experts, by the widths of gate and up.
    """

    repeatable = True

    def __init__(self, bits: float) -> None:
        self.bits = float(bits)
        self._widths = np.zeros(0)
        self._gains: dict[int, NDArray[np.float64]] = {}

    def bind(self, store: ExpertStore, missing: Missing) -> None:
        """Read the errors of the store; InvalidArgumentError if even the narrowest is wider."""
        self._widths = np.array(store.bits[0], np.float64)
        if not self._widths[0] <= self.bits:
            raise InvalidArgumentError(
                f"bits is {self.bits}; {store.path} has {store.bits[0]}, so it must be "
                f"{self._widths[0]:.0f} at least"
            )
        for layer in store.layers:
            errors = np.array(
                [
                    [sum(store.extent(layer, e, level).error) for level in range(store.levels)]
                    for e in range(store.num_experts)
                ]
            )
            self._gains[layer] = -np.diff(errors, axis=1)

    def levels(self, layer: int, ids: Ints, weights: Floats) -> Levels:
        """Return the levels, row by row on its own."""
        n, k = ids.shape
        steps = np.diff(self._widths)
        levels = np.zeros((n, k), np.uint8)
        if not len(steps):
            return levels
        known = np.maximum(ids, 0)
        worth = self._gains[layer][known] / steps * np.square(weights.astype(np.float64))[..., None]
        worth = np.minimum.accumulate(worth, axis=2)  # a step never before the lower one
        order = np.argsort(-worth.reshape(n, -1), axis=1, kind="stable")
        left = np.full(n, (self.bits - self._widths[0]) * k + 1e-9)
        rows = np.arange(n)
        for position in range(order.shape[1]):
            slot, step = np.divmod(order[:, position], len(steps))
            fits = (steps[step] <= left) & (levels[rows, slot] == step)
            levels[rows[fits], slot[fits]] += 1
            left[fits] -= steps[step[fits]]
        return levels


class Deadline:
    """The widest level at which a layer's missing planes load in its share of a time.

    What it gives depends on what is in memory, so it is not repeatable.

    Parameters
    ----------
    milliseconds : float
        For a whole step.
    bytes_per_second : float, default 1e9
        How fast planes load.
    """

    repeatable = False

    def __init__(self, milliseconds: float, bytes_per_second: float = 1e9) -> None:
        if not (milliseconds > 0 and bytes_per_second > 0):
            raise InvalidArgumentError("milliseconds and bytes_per_second must be above 0")
        self.milliseconds = milliseconds
        self.bytes_per_second = bytes_per_second
        self._missing: Missing = lambda layer, experts, level: 0
        self._bytes = 0.0
        self._top = 0

    def bind(self, store: ExpertStore, missing: Missing) -> None:
        """Learn how many layers share the time."""
        share = self.milliseconds / 1000 / len(store.layers)
        self._bytes = share * self.bytes_per_second
        self._top = store.levels - 1
        self._missing = missing

    def levels(self, layer: int, ids: Ints, weights: Floats) -> Levels:
        """Return one level for all."""
        experts = np.unique(ids[ids >= 0]).astype(np.int32)
        level = self._top
        while level > 0 and self._missing(layer, experts, level) > self._bytes:
            level -= 1
        return np.full(ids.shape, level, np.uint8)


def parse_policy(text: str) -> BitPolicy:
    """Read a policy as the command line spells it.

    ``fixed``, ``fixed:4``, ``rank:8,6,4``, ``average:4.2``, ``deadline:50`` (milliseconds).

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It is none of these.
    """
    name, _, rest = text.partition(":")
    try:
        if name == "fixed":
            return Fixed(int(rest) if rest else None)
        if name == "rank":
            return RankBased([int(b) for b in rest.split(",")] if rest else (8, 6, 4))
        if name == "average":
            return AverageBits(float(rest))
        if name == "deadline":
            return Deadline(float(rest))
    except ValueError:
        pass
    raise InvalidArgumentError(
        f"bit policy is {text!r}; it must be like fixed:4, rank:8,6,4, average:4.2 or deadline:50"
    )
