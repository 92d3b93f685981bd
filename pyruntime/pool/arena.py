"""Objects of many sizes on huge pages, drawing on a budget: what caches of large things use.

The core, its locks and its failure behaviour are described in ``pyruntime/pool.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pyruntime._ext import _native
from pyruntime.errors import ClosedError, InvalidArgumentError
from pyruntime.pool.arguments import PAGES, choice, client, count, typed
from pyruntime.pool.budget import Budget

__all__ = ["Arena", "Block"]


class Arena:
    """Objects of 4 KiB to many MiB, each starting on a 4 KiB boundary, from slabs of huge pages.

    Parameters
    ----------
    budget : Budget, optional
        What committed memory is counted against, in whole slabs of 2 MiB units. Default: only
        `reserve_bytes` limits it.
    reserve_bytes : int, optional
        Address space (2 MiB..2**43). Default: twice the budget's limit; required without a budget.
    classes : sequence of int, optional
        Sizes in bytes that shall fit exactly (rounded up to 4 KiB). Other sizes are rounded up to
        one of four steps to each doubling.
    name, priority, reclaim : optional
        As in `Budget.register`. `reclaim(num_bytes)` is asked after the empty slabs went, to drop
        blocks, preferably neighbours; it returns the bytes it released.
    pages : {"auto", "thp", "4k"}, optional
        What the memory should be made of.
    node : int, optional
        Preferred NUMA node (0..63). Default: where the first touch happens.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        An argument is outside its range; the message names it.

    Notes
    -----
    Thread-safe; a call takes a mutex and, when a slab is made or given back, a system call. Memory
    is faulted in by its user. A forked child's calls raise `StateError`.

    Examples
    --------
    >>> budget = Budget(64 << 20)
    >>> arena = Arena(budget, name="experts")
    >>> with arena.acquire(300_000) as block:
    ...     weights = block.array(np.float32, (3, 4))
    ...     weights[:] = 1
    ...     del weights
    >>> arena.trim() >> 20
    2
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        reserve_bytes: int | None = None,
        classes: Sequence[int] = (),
        name: str = "arena",
        priority: int = 0,
        reclaim: Callable[[int], int] | None = None,
        pages: Literal["auto", "thp", "4k"] = "auto",
        node: int | None = None,
    ) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise InvalidArgumentError(f"budget is {budget!r}; it must be a Budget or None")
        if reserve_bytes is None:
            if budget is None:
                raise InvalidArgumentError("reserve_bytes is required without a budget")
            reserve_bytes = min(2 * budget.limit_bytes, 1 << 43)
        name, priority, weak_reclaim = client(name, priority, reclaim)
        self.name = name
        self._core: _native.Arena | None = _native.Arena(
            None if budget is None else budget._core,
            count("reserve_bytes", reserve_bytes),
            [count("classes", size) for size in classes],
            choice("pages", pages, PAGES),
            -1 if node is None else count("node", node, bits=31),
            name,
            priority,
            weak_reclaim,
        )

    @property
    def closed(self) -> bool:
        """True once `close` succeeded."""
        return self._core is None

    def acquire(self, num_bytes: int) -> Block:
        """Take an object of at least `num_bytes` out.

        Raises
        ------
        pyruntime.errors.CapacityError
            The budget (after reclaiming from lower and equal priorities) or the address range is
            exhausted.
        pyruntime.errors.OutOfMemoryError
            The system gives no memory.
        """
        num_bytes = count("num_bytes", num_bytes)
        return Block(_native.ArenaBlock(self._live(), num_bytes), num_bytes)

    def trim(self) -> int:
        """Give slabs without objects back to the system and the budget; returns the bytes."""
        return self._live().trim()

    def stats(self) -> dict[str, int]:
        """Counters and gauges of ``pyrt_arena_statistics``.

        ``objects``, ``in_use_bytes``, ``committed_bytes``, ``empty_bytes``, ``reserved_bytes``,
        ``acquires``, ``releases``, ``failures``, ``trimmed_bytes``, ``fallbacks``, ``num_slabs``,
        ``huge_bytes``.
        """
        return self._live().statistics()

    def verify(self) -> None:
        """Walk slabs and free runs; `CorruptDataError` says what is wrong."""
        self._live().verify()

    def close(self) -> None:
        """Unmap everything and leave the budget; closing twice does nothing.

        Raises
        ------
        pyruntime.errors.StateError
            Blocks, or views of them, are still out.
        """
        if self._core is not None:
            self._core.destroy()
            self._core = None

    def __enter__(self) -> Arena:
        """Return the arena itself."""
        self._live()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close, unless an exception is on its way: blocks may still be out then."""
        if error is None:
            self.close()

    def __repr__(self) -> str:
        """Say which arena it is."""
        return f"<Arena {self.name!r}{', closed' if self.closed else ''}>"

    def __reduce__(self) -> str:
        """Refuse: an arena is memory of this process."""
        raise TypeError("an arena is memory of this process and cannot be pickled")

    def _live(self) -> _native.Arena:
        if self._core is None:
            raise ClosedError("the arena is closed")
        return self._core


class Block:
    """One object of an `Arena`; returned by `release`, leaving a ``with`` block, or when dropped.

    Arrays and memoryviews over it keep the memory out.
    """

    def __init__(self, core: _native.ArenaBlock, num_bytes: int) -> None:
        self.nbytes = num_bytes
        self.ptr = core.address
        self._memory: memoryview | None = memoryview(core)

    @property
    def memory(self) -> memoryview:
        """The bytes, writable, ``(nbytes,)``."""
        if self._memory is None:
            raise ClosedError("the block was released")
        return self._memory

    def array(self, dtype: npt.DTypeLike = np.uint8, shape: Any = None) -> npt.NDArray[Any]:
        """View the bytes as an ndarray without copying.

        Parameters
        ----------
        dtype : dtype_like, optional
            Element type. Default uint8.
        shape : int or tuple of int, optional
            Default: as many elements as fit, one-dimensional.
        """
        return typed(np.frombuffer(self.memory, np.uint8), dtype, shape)

    def release(self) -> None:
        """Return the object to its arena; releasing twice does nothing.

        While arrays or memoryviews over it are alive, it returns when the last of them is dropped.
        """
        if self._memory is not None:
            self._memory.release()
            self._memory = None

    def __len__(self) -> int:
        """Bytes of the block."""
        return self.nbytes

    def __enter__(self) -> Block:
        """Return the block itself."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Release."""
        self.release()

    def __repr__(self) -> str:
        """Say how large it is and whether it is still out."""
        return f"<Block of {self.nbytes} bytes{', released' if self._memory is None else ''}>"
