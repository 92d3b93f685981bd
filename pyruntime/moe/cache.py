"""Experts of a store in limited memory: an expert backend that loads what tokens need.

The core, its eviction, its failure behaviour and its threads are described in
``pyruntime/moe_cache.h`` and ``csrc/moe/cache.hpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.errors import ClosedError, InvalidArgumentError
from pyruntime.moe.policy import BitPolicy, Fixed
from pyruntime.moe.store import ExpertStore
from pyruntime.pool import UNIT_BYTES, Budget

__all__ = ["DEGRADED", "FAILED", "ORDERS", "ExpertCache", "makespan", "plan_loads"]

#: A token's status after `ExpertCache.ffn`, bits of it; 0 if all is well.
FAILED, DEGRADED = 1, 2

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Order = Literal["hebf", "johnson", "id"]
ORDERS: dict[str, int] = {"hebf": 0, "johnson": 1, "id": 2}
"""Orders in which a call's planes are loaded."""
Predict = Callable[[int, Floats], Ints]
"""(layer, x) -> experts of that layer that tokens like `x` are likely to choose."""

_PAGE = 4096
"""Planes are padded to it, as on disk."""
_PREDICTED_TOKENS = 16
"""Of more tokens together nearly every expert is needed: there is nothing to predict."""


class ExpertCache:
    """Experts of a store in at most so many bytes; see `pyruntime.moe`.

    Parameters
    ----------
    store : ExpertStore
    memory_bytes : int
        For planes: at least one expert's, at its widest.
    policy : BitPolicy, optional
        The widths; the store's widest by default.
    deterministic : bool, default True
        Results depend on the routing alone, never on what is in memory: only repeatable policies,
        and a token whose plane cannot be read fails rather than being computed at a lower width.
        If False, only a token's first expert waits for the width it should have; the others take
        what is there, and what was missing is loaded for later.
    budget : Budget, optional
        What the planes are counted against too. When others need it, refinement planes go first.
    priority : int, default 0
        In the budget.
    predict : callable, optional
        Guesses a layer's experts one layer ahead (`hint`), for prefetching.
    order : {"hebf", "johnson", "id"}
    direct : bool, default True
        Read past the page cache where the file system allows it. False leaves a second copy in the
        page cache: useful when other memory is free.
    threads : int, default 4
        That read.
    floor : int, default 1
        Base planes that each layer keeps, as far as possible.
    scratch_bytes : int, default 64 MiB
        For activations; more tokens than fit are computed in groups.

    Raises
    ------
    pyruntime.errors.CapacityError
        `memory_bytes` or the budget do not hold one expert; the message has the bytes needed.
    pyruntime.errors.InvalidArgumentError
        The store lacks a width of the policy, or the policy is not repeatable.
    """

    def __init__(
        self,
        store: ExpertStore,
        memory_bytes: int,
        *,
        policy: BitPolicy | None = None,
        deterministic: bool = True,
        budget: Budget | None = None,
        priority: int = 0,
        predict: Predict | None = None,
        order: Order = "hebf",
        direct: bool = True,
        threads: int = 4,
        floor: int = 1,
        scratch_bytes: int = 64 << 20,
    ) -> None:
        if order not in ORDERS:
            raise InvalidArgumentError(f"order is {order!r}; it must be one of {list(ORDERS)}")
        self.store = store
        self.policy = policy or Fixed()
        self.deterministic = deterministic
        self._predict = predict
        if deterministic and not self.policy.repeatable:
            raise InvalidArgumentError(
                f"{type(self.policy).__name__} depends on what is in memory; it needs "
                "deterministic=False"
            )
        self.policy.bind(store, self.missing_bytes)
        self._core: _native.MoeCache | None = _native.MoeCache(
            store._native,
            None if budget is None else budget._core,
            memory_bytes,
            priority,
            scratch_bytes,
            floor,
            threads,
            ORDERS[order],
            direct,
            deterministic,
            not deterministic,
        )
        widest = self.policy.level if isinstance(self.policy, Fixed) else store.levels - 1
        self._least_bytes = self.least_bytes(store, floor)
        self._expert_bytes = sum(
            store.extent(store.layers[0], 0, level).bytes for level in range(widest + 1)
        )

    def _live(self) -> _native.MoeCache:
        if self._core is None:
            raise ClosedError("the expert cache is closed")
        return self._core

    @staticmethod
    def least_bytes(store: ExpertStore, floor: int = 1) -> int:
        """Return what a cache with a budget keeps of it.

        Parameters
        ----------
        store : ExpertStore
        floor : int, default 1
            Experts of each layer whose base planes stay, as for the cache.

        Returns
        -------
        int
            Bytes, in whole units of a budget: one expert at its widest, or all floors if more.
        """
        first = store.layers[0]
        planes = [store.extent(first, 0, level).bytes for level in range(store.levels)]
        padded = [-(-plane // _PAGE) * _PAGE for plane in planes]
        least = max(sum(padded), len(store.layers) * floor * padded[0])
        return -(-least // UNIT_BYTES) * UNIT_BYTES

    def spare_bytes(self) -> int:
        """Return the bytes that the cache would give back to the budget if nothing were loading."""
        return max(0, int(self.stats()["capacity_bytes"]) - self._least_bytes)

    def begin_step(self, plan: Any) -> None:
        """Nothing depends on the step: each layer's call orders its own loads."""

    def hint(self, layer: int, x: Floats) -> None:
        """Prefetch what tokens with these hidden states are likely to choose at `layer`."""
        if self._predict is None or len(x) > _PREDICTED_TOKENS:
            return
        core = self._live()
        experts = self._predict(layer, x)
        level = self.policy.level if isinstance(self.policy, Fixed) else 0
        core.prefetch(layer, np.unique(experts).astype(np.int32), level)

    def ffn(
        self, layer: int, x: Floats, ids: Ints, weights: Floats, out: Floats
    ) -> NDArray[np.uint8]:
        """Compute the experts of a layer, loading what is missing.

        Returns
        -------
        uint8 [n]
            `FAILED` for a token whose planes could not be read: its row of `out` is zero.
            `DEGRADED` for one computed at a lower width, as a finer plane is damaged (not if
            deterministic).
        """
        levels = self.policy.levels(layer, ids, weights)
        floors = None
        if not self.deterministic:
            floors = np.zeros_like(levels)
            first = np.argmax(weights, axis=1)[:, None]
            np.put_along_axis(floors, first, np.take_along_axis(levels, first, 1), 1)
        status = np.zeros(len(x), np.uint8)
        self._live().ffn(layer, self.store.hidden, x, ids, weights, levels, 0, floors, out, status)
        return status

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of one expert at the fixed width, or at its widest.

        With a policy that chooses by token this is an upper bound; `stats()` counts what was read.
        """
        return self._expert_bytes

    def missing_bytes(self, layer: int, experts: Ints, level: int) -> int:
        """Bytes that computing `experts` (int32) of a layer at `level` would have to read."""
        return self._live().missing(layer, experts, level)

    def prefetch(self, layer: int, experts: Sequence[int], bits: int | None = None) -> None:
        """Load experts when nothing else is to be read and nothing worth more has to go.

        Parameters
        ----------
        layer : int
        experts : sequence of int
        bits : int, optional
            Up to this width; the narrowest by default.
        """
        level = 0 if bits is None else self.store.level_of(bits)
        self._live().prefetch(layer, np.asarray(experts, np.int32), level)

    def shrink(self, num_bytes: int = 0) -> int:
        """Evict until at most `num_bytes` are used; return the bytes that remain."""
        return self._live().shrink(num_bytes)

    def drain(self) -> None:
        """Wait until nothing is being read."""
        self._live().drain()

    def verify(self) -> None:
        """Walk all invariants; CorruptDataError says what is wrong."""
        self._live().verify()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of ``pyrt_moe_cache_statistics``.

        Lists are by level; ``backend`` is "direct" or "buffered"; ``resident_bytes`` includes
        planes on their way.
        """
        stats: dict[str, Any] = self._live().statistics()
        return stats

    def close(self) -> None:
        """Give all memory back; closing twice does nothing."""
        if self._core is not None:
            self._core.close()
            self._core = None

    def __enter__(self) -> ExpertCache:
        """Return the cache."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Say what it holds."""
        if self._core is None:
            return "<ExpertCache, closed>"
        s = self.stats()
        return (
            f"<ExpertCache of {self.store.path.name}: {s['resident_bytes']} of "
            f"{s['limit_bytes']} bytes, planes by level {s['resident']}>"
        )


def plan_loads(
    counts: NDArray[np.int64],
    resident: Ints,
    load_seconds: NDArray[np.float64],
    compute_seconds: NDArray[np.float64],
    order: Order = "hebf",
) -> tuple[list[tuple[int, int]], float]:
    """Order the loads of a layer's missing planes: the highest expert-bit first, or otherwise.

    Parameters
    ----------
    counts : int64 [experts, levels]
        Tokens that want an expert at exactly a level.
    resident : int32 [experts]
        Levels in memory.
    load_seconds, compute_seconds : float64 [levels]
        To load a plane of a level; to compute a token at a level.
    order : {"hebf", "johnson", "id"}

    Returns
    -------
    planes : list of (expert, level)
    seconds : float
        Until all is computed, if loading and computing overlap.

    Notes
    -----
    Source: D2MoE (arXiv 2504.15299), section 5; Johnson's rule for two machines (1954).
    """
    if order not in ORDERS:
        raise InvalidArgumentError(f"order is {order!r}; it must be one of {list(ORDERS)}")
    planes, seconds = _native.moe_plan(
        ORDERS[order], counts, resident, load_seconds, compute_seconds
    )
    return [(expert, level) for expert, level in planes], seconds


def makespan(
    counts: NDArray[np.int64],
    resident: Ints,
    load_seconds: NDArray[np.float64],
    compute_seconds: NDArray[np.float64],
    planes: Sequence[tuple[int, int]],
) -> float:
    """Return the seconds until all is computed if `planes` are loaded in this order.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        It is not an order of the missing planes, each after the lower ones of its expert.
    """
    order = np.array(planes, np.int32).reshape(-1, 2)
    return _native.moe_makespan(counts, resident, load_seconds, compute_seconds, order)
