"""Prefixes that a known set of prompts shares, planned instead of hoped for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import InvalidArgumentError

__all__ = ["PrefixGroup", "PrefixPlan", "plan_prefixes"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Requests that share a prefix and are best computed one after the other."""

    prefix: int
    """Tokens that all of them begin with, whole blocks; 0: they share nothing worth keeping."""
    requests: list[int]
    """Indices of the prompts."""


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Groups of prompts, in the order in which to compute them."""

    groups: list[PrefixGroup]
    saved: int
    """Prompt tokens that need not be computed, if each group's prefix is kept while it runs."""
    possible: int
    """The same if every shared prefix at every level were kept."""

    def order(self) -> list[int]:
        """Return the indices of all prompts in the order of the groups."""
        return [request for group in self.groups for request in group.requests]


@dataclass(slots=True)
class _Node:
    """A prefix that at least two prompts share, in the tree of all of them."""

    length: int
    nodes: list[_Node] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    chosen: NDArray[np.bool_] | None = None
    """By the ancestor that its prompts would belong to otherwise: whether it is a group."""


def plan_prefixes(
    prompts: Sequence[Sequence[int] | Ints],
    block_size: int = 16,
    decode: Sequence[float] | None = None,
) -> PrefixPlan:
    """Choose for every prompt at most one prefix to share, so that most tokens are saved.

    Parameters
    ----------
    prompts : sequence of int sequences
        Tokens, int32.
    block_size : int, default 16
        Tokens of a KV block; whole blocks are shared, and a prompt's last token is always computed.
    decode : sequence of float, optional
        Tokens each prompt is expected to generate. Groups with many of them for each prompt token
        go first, so that long prompts fill the steps of what then only decodes. Default: all alike.

    Returns
    -------
    PrefixPlan

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        A prompt is empty, or an argument does not match.

    Notes
    -----
    Source: BatchLLM (arXiv 2412.03594), sections 4.1 and 4.2, where prefixes are flattened from the
    bottom up by a rule of thumb. Here the choice is the best one: a prefix u of length L(u) that n
    prompts use saves (n - 1) L(u); with h(u, a) the most that the prompts below u can save if those
    that no group takes count L(a) each, h(u, a) = max(s(a), s(u) - L(u)), where s sums h over what
    is below u. Prompts are sorted, so equal prefixes are neighbours and nothing is hashed. The cost
    is that of sorting, and of each shared prefix times the prefixes above it.

    Examples
    --------
    >>> plan = plan_prefixes([[1] * 40, [2] * 40, [1] * 32 + [3] * 8, [2] * 40])
    >>> plan.groups
    [PrefixGroup(prefix=32, requests=[0, 2]), PrefixGroup(prefix=32, requests=[1, 3])]
    >>> plan.saved, plan.possible
    (64, 64)
    """
    if block_size < 1:
        raise InvalidArgumentError(f"block_size is {block_size}; it must be at least 1")
    arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
    for index, array in enumerate(arrays):
        if array.ndim != 1 or not array.size:
            raise InvalidArgumentError(f"prompt {index} is not a non-empty list of tokens")
    sizes = np.array([array.size for array in arrays], np.int64)
    expected = np.ones(len(arrays)) if decode is None else np.asarray(decode, np.float64)
    if expected.shape != sizes.shape:
        raise InvalidArgumentError(f"decode has {expected.size} entries for {sizes.size} prompts")
    if not arrays:
        return PrefixPlan([], 0, 0)
    usable = (sizes - 1) // block_size * block_size
    keys = [array.astype(">i4").tobytes() for array in arrays]
    ordered = sorted(range(len(arrays)), key=keys.__getitem__)
    shared = [
        _common(arrays[a], arrays[b], int(min(usable[a], usable[b])), block_size)
        for a, b in pairwise(ordered)
    ]
    root = _tree(ordered, shared)
    saved = _choose(root)
    groups = _groups(root)
    groups.sort(
        key=lambda g: (-expected[g.requests].sum() / sizes[g.requests].sum(), g.requests[0])
    )
    return PrefixPlan(groups, saved, sum(shared))


def _common(a: NDArray[np.int32], b: NDArray[np.int32], limit: int, block_size: int) -> int:
    different = np.flatnonzero(a[:limit] != b[:limit])
    return (int(different[0]) if different.size else limit) // block_size * block_size


def _tree(ordered: list[int], shared: list[int]) -> _Node:
    """Return the tree of sorted prompts; shared[i] is what the i-th has in common with the next."""
    open_nodes = [_Node(0)]
    for request, before, after in zip(ordered, [0, *shared], [*shared, 0], strict=True):
        # What is deeper than this prompt's beginning has all it will get.
        closed: _Node | None = None
        while open_nodes[-1].length > before:
            node = open_nodes.pop()
            if closed is not None:
                node.nodes.append(closed)
            closed = node
        if closed is not None:
            if open_nodes[-1].length < before:
                open_nodes.append(_Node(before))
            open_nodes[-1].nodes.append(closed)
        if after > open_nodes[-1].length:
            open_nodes.append(_Node(after))
        open_nodes[-1].leaves.append(request)
    while len(open_nodes) > 1:
        node = open_nodes.pop()
        open_nodes[-1].nodes.append(node)
    return open_nodes[0]


def _choose(root: _Node) -> int:
    """Decide for every node and ancestor whether it is a group; return the tokens saved."""
    values: dict[int, Ints] = {}
    stack = [(root, np.zeros(1, np.int64), False)]
    while stack:
        node, lengths, seen = stack.pop()  # of its ancestors and its own, from the root
        if not seen:
            stack.append((node, lengths, True))
            stack += [(n, np.append(lengths, n.length), False) for n in node.nodes]
            continue
        below = len(node.leaves) * lengths
        for n in node.nodes:
            below = below + values.pop(id(n))
        alone = below[-1] - node.length
        node.chosen = alone > below[:-1]
        values[id(node)] = np.maximum(below[:-1], alone)
        if node is root:
            return int(below[0])
    raise AssertionError("the root is last")


def _groups(root: _Node) -> list[PrefixGroup]:
    """Hand every prompt to the group that `_choose` decided on."""
    found: list[PrefixGroup] = []
    stack: list[tuple[_Node, int, int, PrefixGroup | None]] = [(root, 0, 0, None)]
    while stack:
        node, depth, at, group = stack.pop()  # `at`: the depth of the group's node, 0 for none
        assert node.chosen is not None
        if depth and node.chosen[at]:
            at, group = depth, PrefixGroup(node.length, [])
            found.append(group)
        if group is not None:
            group.requests.extend(node.leaves)
        else:
            found += [PrefixGroup(0, [leaf]) for leaf in node.leaves]
        stack += [(n, depth + 1, at, group) for n in node.nodes]
    for each in found:
        each.requests.sort()
    return found
