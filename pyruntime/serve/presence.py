"""Which worker holds which KV blocks, as its events tell: one small filter per worker.

A filter may say yes to a block that is not there; the request then finds a shorter prefix than was
hoped for, a miss and nothing worse. It never says no to one that is, as long as every event was
seen; where some were lost (``dropped``, or a worker began anew), `follow` says so, and the caller
rebuilds the filter from the worker's snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ExactSet", "MemberSet", "PresenceMap", "as_keys"]

Keys = NDArray[np.uint64]


class MemberSet(Protocol):
    """A multiset of 64-bit keys that may err towards yes."""

    def insert(self, keys: Keys) -> Any:
        """Add keys."""
        ...

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Say for each key whether it may be there."""
        ...

    def delete(self, keys: Keys) -> Any:
        """Take keys out that are in."""
        ...


class ExactSet:
    """A plain set: never errs, and holds a Python object per key."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def insert(self, keys: Keys) -> None:
        """See `MemberSet`."""
        self._keys.update(keys.tolist())

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """See `MemberSet`."""
        return np.array([key in self._keys for key in keys.tolist()], bool)

    def delete(self, keys: Keys) -> None:
        """See `MemberSet`."""
        self._keys.difference_update(keys.tolist())


def as_keys(names: Iterable[str]) -> Keys:
    """Return 64 bits of each block key (hexadecimal)."""
    return np.array([int(name[:16], 16) for name in names], np.uint64)


class PresenceMap:
    """What each worker holds.

    Parameters
    ----------
    make_filter : callable
        Returns an empty `MemberSet`, one per worker and life.
    """

    def __init__(self, make_filter: Callable[[], MemberSet] = ExactSet) -> None:
        self._make = make_filter
        self._filters: dict[int, MemberSet] = {}
        self._next: dict[int, int] = {}
        self.rebuilds = 0

    def next_event(self, worker: int) -> int:
        """Return the sequence number from which on the worker's events are wanted."""
        return self._next.get(worker, 0)

    def follow(self, worker: int, following: int, events: Sequence[dict[str, Any]]) -> bool:
        """Take a worker's events; False if some are lost and a snapshot is needed."""
        members = self._filters.get(worker)
        if members is None:
            members = self._filters[worker] = self._make()
        for event in events:
            kind = event["type"]
            if kind == "dropped":
                return False
            if kind == "cleared":
                members = self._filters[worker] = self._make()
            elif kind == "stored":
                members.insert(as_keys(event["keys"]))
            elif kind == "removed":
                members.delete(as_keys(event["keys"]))
        self._next[worker] = following
        return True

    def rebuild(self, worker: int, following: int, names: Iterable[str]) -> None:
        """Begin anew from a snapshot, which events from `following` on continue."""
        members = self._make()
        members.insert(as_keys(names))
        self._filters[worker] = members
        self._next[worker] = following
        self.rebuilds += 1

    def forget(self, worker: int) -> None:
        """Drop what is known of a worker: it has died."""
        self._filters.pop(worker, None)
        self._next.pop(worker, None)

    def prefix(self, worker: int, keys: Keys) -> int:
        """Return how many leading blocks of a request the worker seems to hold."""
        members = self._filters.get(worker)
        if members is None or not len(keys):
            return 0
        there = members.contains(keys)
        return len(keys) if there.all() else int(np.argmin(there))
