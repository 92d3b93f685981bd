"""The plain-Python block pool: the oracle of the native one, without sharing or tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError, StateError

__all__ = ["ReferenceBlockPool", "StepTables"]


@dataclass(slots=True)
class StepTables:
    """Block tables of one step; see `pyruntime.kv`."""

    tables: NDArray[np.int32]
    row_of: dict[int, int]
    block_size: int
    device: str = "cpu"
    stream: int = 0


@dataclass(slots=True)
class _Sequence:
    blocks: list[int]
    reserve: int
    valid: int = 0


class ReferenceBlockPool:
    """Fixed-size KV blocks with lists and dicts.

    Parameters
    ----------
    num_blocks : int
    block_size : int
        Tokens per block.
    num_layers : int
    """

    def __init__(self, num_blocks: int, block_size: int = 16, num_layers: int = 1) -> None:
        if min(num_blocks, block_size, num_layers) < 1:
            raise InvalidArgumentError("num_blocks, block_size and num_layers must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_layers = num_layers
        self._free = list(range(num_blocks - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that `tokens` tokens fill."""
        return -(-tokens // self.block_size)

    def fits(self, tokens: int) -> bool:
        """Whether a lone sequence of `tokens` tokens could ever fit."""
        return self.blocks_for(tokens) <= self.num_blocks

    def admit(
        self, request: int, tokens: NDArray[np.int32], namespace: bytes = b"", reserve: int = 0
    ) -> int:
        """Make a request known and return its tokens in memory already: none here.

        Raises
        ------
        pyruntime.errors.StateError
            The request is known already.
        """
        if request in self._sequences:
            raise StateError(f"request {request} is in the pool already")
        self._sequences[request] = _Sequence([], self.blocks_for(reserve))
        return 0

    def knows(self, request: int) -> bool:
        """Whether the request was admitted and not freed since."""
        return request in self._sequences

    def held(self, request: int) -> int:
        """Return the blocks of a request; 0 for an unknown one."""
        sequence = self._sequences.get(request)
        return len(sequence.blocks) if sequence else 0

    def need(self, request: int, tokens: int) -> int:
        """Return the further blocks `request` needs to hold `tokens`."""
        return max(0, self.blocks_for(tokens) - self.held(request))

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """Return the blocks left after such a step, negative for a deficit; changes nothing."""
        left = len(self._free) + sum(self.held(request) for request in free)
        return left - sum(self.need(request, tokens) for request, tokens in grow)

    def step(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> StepTables:
        """Free, then grow, and return the tables of the requests in `grow`.

        Raises
        ------
        pyruntime.errors.NotFoundError
            A request in `grow` was not admitted.
        pyruntime.errors.CapacityError
            Blocks are missing; nothing has changed.
        """
        for request, _ in grow:
            if request not in self._sequences or request in free:
                raise NotFoundError(f"request {request} is not in the pool; admit it first")
        left = self.dry_run(grow, free)
        if left < 0:
            raise CapacityError(f"the step lacks {-left} KV blocks; preempt or finish a request")
        for request in free:
            self.free(request)
        for request, tokens in grow:
            blocks = self._sequences[request].blocks
            blocks.extend(self._free.pop() for _ in range(self.need(request, tokens)))
        width = max((self.held(request) for request, _ in grow), default=0)
        tables = np.full((len(grow), max(1, width)), -1, np.int32)
        for row, (request, _) in enumerate(grow):
            blocks = self._sequences[request].blocks
            tables[row, : len(blocks)] = blocks
        row_of = {request: row for row, (request, _) in enumerate(grow)}
        return StepTables(tables, row_of, self.block_size)

    def commit(self, request: int, tokens: int, layers: int) -> None:
        """Note that the first `tokens` tokens are valid in `layers` layers."""
        sequence = self._sequences.get(request)
        if sequence is None:
            return  # cancelled while the step ran
        if tokens > len(sequence.blocks) * self.block_size:
            raise InvalidArgumentError(f"request {request} does not hold {tokens} tokens")
        if layers == self.num_layers:
            sequence.valid = max(sequence.valid, tokens)

    def free(self, request: int) -> None:
        """Return a request's blocks; unknown requests are ignored."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self._free.extend(reversed(sequence.blocks))

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return len(self._free)

    @property
    def promised(self) -> int:
        """Blocks reserved by admitted requests and not held yet."""
        return sum(max(0, s.reserve - len(s.blocks)) for s in self._sequences.values())

    def check(self) -> None:
        """Raise `StateError` unless every block is free or held exactly once."""
        held = [block for s in self._sequences.values() for block in s.blocks]
        if sorted(held + self._free) != list(range(self.num_blocks)):
            raise StateError("a KV block is lost or held twice")
