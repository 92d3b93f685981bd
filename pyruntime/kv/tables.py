"""What a pool and an engine exchange: groups of layers, block tables, and where K and V live."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import InvalidArgumentError

__all__ = ["EnginePool", "GroupTable", "KvGroup", "KvStorage", "StepTables"]

Values = NDArray[np.float32] | NDArray[np.float16]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share block tables."""

    layers: tuple[int, ...]
    window: int = 0
    """0, or the last `window` tokens are all a query attends to: older blocks may be released."""
    block_size: int = 16


@dataclass(slots=True)
class GroupTable:
    """Block tables of one group in one step."""

    tables: Ints
    """[rows, max blocks]: block ids in order of slots; -1 behind them and where a hole is."""
    block_size: int
    shift: Ints
    """[rows]: rotary position minus slot of the tokens that the step writes. Compaction, which
    moves kept tokens to lower slots, raises it; 0 otherwise."""


def _no_copies() -> Ints:
    return np.empty((0, 3), np.int32)


@dataclass(slots=True)
class StepTables:
    """Everything a step needs to know of the pool; see `pyruntime.kv`."""

    groups: list[GroupTable]
    row_of: dict[int, int]
    """Request to row, in every group."""
    copies: Ints = field(default_factory=_no_copies)
    """Rows (group, source block, target block), copied in all layers of the group before the step:
    copy on write. Copying twice does no harm."""
    alpha: float | None = None
    """If set, the step marks the slots whose attention weight exceeds it: `StepResult.marks`."""
    device: str = "cpu"
    stream: int = 0

    @property
    def tables(self) -> Ints:
        """The tables of the first group."""
        return self.groups[0].tables


class KvStorage:
    """Where K and V of each layer live: array views, so base, strides and dtype.

    Parameters
    ----------
    groups : sequence of KvGroup
        Every layer in exactly one.
    keys, values : sequence of ndarray, shape (blocks, block size, kv heads, head dim)
        Per layer, float32 or float16, one type for all; of any strides, contiguous along the last
        axis; alike for keys and values.
    """

    device = "cpu"
    stream = 0

    def __init__(
        self, groups: Sequence[KvGroup], keys: Sequence[Values], values: Sequence[Values]
    ) -> None:
        self.groups = tuple(groups)
        self.keys = tuple(keys)
        self.values = tuple(values)
        self._mapped: list[mmap.mmap] = []  # by group, of small pages
        layers = sorted(layer for group in self.groups for layer in group.layers)
        if layers != list(range(len(self.keys))) or len(self.keys) != len(self.values):
            raise InvalidArgumentError(
                "each layer must be in one KV group and have keys and values"
            )
        self.group_of = [0] * len(layers)
        for index, group in enumerate(self.groups):
            for layer in group.layers:
                self.group_of[layer] = index
                for part in (self.keys[layer], self.values[layer]):
                    if part.dtype not in (np.float32, np.float16) or part.ndim != 4:
                        raise InvalidArgumentError(
                            "K and V are float32 or float16 arrays of four axes"
                        )
                    if part.dtype != self.dtype:
                        raise InvalidArgumentError("K and V of all layers have one type")
                    if part.shape[1] != group.block_size:
                        raise InvalidArgumentError(f"layer {layer} has other blocks than its group")

    @classmethod
    def allocate(
        cls,
        groups: Sequence[KvGroup],
        num_blocks: int,
        kv_heads: int,
        head_dim: int,
        *,
        small_pages: bool = False,
        dtype: str = "float32",
    ) -> KvStorage:
        """Make zeroed arrays of `num_blocks` blocks per group; pages appear as they are written.

        With `small_pages` huge ones are refused, so that memory grows with the blocks written: a
        huge page in each layer's keys and values would hold many more.
        """
        keys: dict[int, Values] = {}
        values: dict[int, Values] = {}
        mapped = []
        for group in groups:
            shape = (len(group.layers), 2, num_blocks, group.block_size, kv_heads, head_dim)
            if small_pages:
                memory, whole = zeroed(shape, dtype)
                mapped.append(memory)
            else:
                whole = np.zeros(shape, dtype)
            for index, layer in enumerate(group.layers):
                keys[layer], values[layer] = whole[index]
        order = sorted(keys)
        made = cls(groups, [keys[layer] for layer in order], [values[layer] for layer in order])
        made._mapped = mapped
        return made

    def discard(self, group: int, first: int, last: int) -> None:
        """Give the system the pages of blocks `first` to `last` of small pages; they hold zeroes.

        A page that other blocks are on stays.
        """
        if not self._mapped:
            return
        memory, layers = self._mapped[group], self.groups[group].layers
        part = len(memory) // (2 * len(layers))
        block = part // len(self.keys[layers[0]])
        for at in range(0, len(memory), part):
            low = -(-(at + first * block) // mmap.PAGESIZE) * mmap.PAGESIZE
            high = (at + last * block) // mmap.PAGESIZE * mmap.PAGESIZE
            if low < high:
                memory.madvise(mmap.MADV_DONTNEED, low, high - low)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of keys and values."""
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def copy_blocks(self, copies: Ints) -> None:
        """Copy blocks: rows (group, source, target), none of whose targets is a source."""
        for index, group in enumerate(self.groups):
            pairs = copies[copies[:, 0] == index]
            if len(pairs):
                for layer in group.layers:
                    for part in (self.keys[layer], self.values[layer]):
                        part[pairs[:, 2]] = part[pairs[:, 1]]

    def move_slots(self, group: int, moves: NDArray[np.int64]) -> None:
        """Move tokens: rows (source, target) of ``block * block size + offset``, all read first."""
        size = self.groups[group].block_size
        (from_block, from_at), (to_block, to_at) = (np.divmod(moves[:, i], size) for i in (0, 1))
        for layer in self.groups[group].layers:
            for part in (self.keys[layer], self.values[layer]):
                part[to_block, to_at] = part[from_block, from_at]


def zeroed(shape: tuple[int, ...], dtype: str = "float32") -> tuple[mmap.mmap, NDArray[Any]]:
    """Map zeroes whose pages, never huge ones, appear as they are written."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # kernels without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, dtype).reshape(shape)


class EnginePool(Protocol):
    """What the engine loop asks of a pool; `pyruntime.kv` is its page."""

    num_blocks: int
    block_size: int

    def admit(self, request: int, tokens: Ints, namespace: bytes = b"", reserve: int = 0) -> int:
        """Make a request known; return its tokens in memory already."""
        ...

    def knows(self, request: int) -> bool:
        """Whether the request was admitted and not freed since."""
        ...

    def need(self, request: int, tokens: int) -> int:
        """Return the further blocks `request` needs to hold `tokens`."""
        ...

    def fits(self, tokens: int) -> bool:
        """Whether a lone sequence of `tokens` tokens could ever fit."""
        ...

    def can_swap(self, request: int) -> bool:
        """Whether the request's blocks could move to a lower tier now."""
        ...

    def dry_run(self, grow: Sequence[tuple[int, int]], free: Sequence[int] = ()) -> int:
        """Return the blocks left after such a step, negative for a deficit; changes nothing."""
        ...

    def step(
        self,
        grow: Sequence[tuple[int, int]],
        free: Sequence[int] = (),
        swap_out: Sequence[int] = (),
        swap_in: Sequence[int] = (),
    ) -> StepTables:
        """Free and swap, then grow; return the tables of the requests in `grow`."""
        ...

    def commit(self, request: int, tokens: int, layers: int, ids: Ints | None = None) -> None:
        """Note that the first `tokens` tokens, which `ids` begins with, are valid in `layers`."""
        ...

    def observe(self, requests: Sequence[int], marks: dict[int, NDArray[np.uint8]]) -> None:
        """Take the attention marks of a step that asked for them."""
        ...

    def free(self, request: int) -> None:
        """Return a request's blocks; unknown requests are ignored."""
        ...

    def check(self) -> None:
        """Raise `CorruptDataError` unless every invariant holds."""
        ...

    @property
    def num_free(self) -> int:
        """Free blocks."""
        ...
