"""Which worker holds which KV blocks, as its events tell: one small filter per worker.

A filter may say yes to a block that is not there; the request then finds a shorter prefix than was
hoped for, a miss and nothing worse. It never says no to one that is, as long as every event was
seen; where some were lost (``dropped``, or a worker began anew), or the filter is full, `follow`
says so, and the caller rebuilds it, large enough, from the worker's snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import CapacityError
from pyruntime.filter import CuckooFilter

__all__ = ["ExactSet", "FilterSet", "MemberSet", "PresenceMap", "as_keys"]

Keys = NDArray[np.uint64]


class MemberSet(Protocol):
    """A multiset of 64-bit keys that may err towards yes."""

    def insert(self, keys: Keys) -> Any:
        """Add keys; `CapacityError` if one found no room: it must then be rebuilt."""
        ...

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Say for each key whether it may be there."""
        ...

    def delete(self, keys: Keys) -> Any:
        """Take keys out that are in."""
        ...


class ExactSet:
    """A plain set: never errs, and holds a Python object per key; the tests' oracle."""

    def __init__(self, capacity: int = 0) -> None:
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


class FilterSet:
    """A cuckoo filter: two bytes and a bit per key, and one false yes in thousands."""

    def __init__(self, capacity: int) -> None:
        self._filter = CuckooFilter(capacity, on_full="raise")

    def insert(self, keys: Keys) -> None:
        """See `MemberSet`."""
        self._filter.insert(keys)

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """See `MemberSet`."""
        return self._filter.contains(keys)

    def delete(self, keys: Keys) -> None:
        """See `MemberSet`; keys that are not in stay out of it, lest another key goes."""
        self._filter.delete(keys[self._filter.contains(keys)])


def as_keys(names: Iterable[str]) -> Keys:
    """Return 64 bits of each block key (hexadecimal)."""
    return np.array([int(name[:16], 16) for name in names], np.uint64)


class PresenceMap:
    """What each worker holds.

    Parameters
    ----------
    make_filter : callable
        ``make_filter(capacity)`` returns an empty `MemberSet`, one per worker and life.
    """

    LEAST = 1 << 14

    def __init__(self, make_filter: Callable[[int], MemberSet] = FilterSet) -> None:
        self._make = make_filter
        self._filters: dict[int, MemberSet] = {}
        self._next: dict[int, int] = {}
        self.rebuilds = 0

    def next_event(self, worker: int) -> int:
        """Return the sequence number from which on the worker's events are wanted."""
        return self._next.get(worker, 0)

    def follow(self, worker: int, following: int, events: Sequence[dict[str, Any]]) -> bool:
        """Take a worker's events; False if a snapshot is needed: some are lost, or it is full."""
        members = self._filters.get(worker)
        if members is None:
            members = self._filters[worker] = self._make(self.LEAST)
        for event in events:
            kind = event["type"]
            if kind == "dropped":
                return False
            if kind == "cleared":
                members = self._filters[worker] = self._make(self.LEAST)
            elif kind == "stored":
                try:
                    members.insert(as_keys(event["keys"]))
                except CapacityError:
                    return False
            elif kind == "removed":
                members.delete(as_keys(event["keys"]))
        self._next[worker] = following
        return True

    def rebuild(self, worker: int, following: int, names: Iterable[str]) -> None:
        """Begin anew from a snapshot, which events from `following` on continue."""
        keys = np.unique(as_keys(names))
        members = self._make(max(self.LEAST, 2 * len(keys)))
        members.insert(keys)
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
