"""What others may know of a pool's content: block keys, and events about them.

A block's key names its content and everything before it: the first 128 bits of its export key
(`pyruntime.kv.export_keys`), a digest of deployment secret, namespace and tokens. Equal keys mean
equal prefixes, so a router that knows the secret and a request's tokens knows the keys of its
blocks, and who does not know the secret can neither predict nor test them.

Events are plain dicts with a gapless sequence number `seq` and a `type`:

- ``stored`` with ``keys``: these blocks are in memory now,
- ``removed`` with ``keys`` and ``reason``: no longer,
- ``cleared``: nothing is,
- ``dropped`` with ``count``: that many events are not to be had any more; take a snapshot.

Keys are 32 hexadecimal digits. `EventLog.snapshot` gives all keys and the sequence number from
which on events follow.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.kv.export import export_keys

__all__ = ["EventLog", "block_keys"]


def block_keys(
    tokens: NDArray[np.int32], block_size: int, namespace: bytes = b"", secret: bytes = b""
) -> list[str]:
    """Return the keys of the full blocks of `tokens`.

    Parameters
    ----------
    tokens : ndarray of int32, shape (n,)
    block_size : int
    namespace : bytes
        Tenants that must not share get different ones.
    secret : bytes
        The deployment's.
    """
    keys = export_keys(secret, namespace, tokens, block_size=block_size)
    return [key.tobytes()[:16].hex() for key in keys]


class EventLog:
    """A pool's latest events, and what they add up to; any thread may read.

    Parameters
    ----------
    capacity : int, default 65536
        Events kept at least.
    """

    def __init__(self, capacity: int = 1 << 16) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._first = 0
        self._present: set[str] = set()

    def add(self, kind: str, keys: Iterable[str] = (), **fields: Any) -> None:
        """Append an event."""
        keys = list(keys)
        with self._lock:
            event = {"seq": self._first + len(self._events), "type": kind, **fields}
            if kind in ("stored", "removed"):
                event["keys"] = keys
            if kind == "stored":
                self._present.update(keys)
            elif kind == "removed":
                self._present.difference_update(keys)
            elif kind == "cleared":
                self._present.clear()
            self._keep([event])

    def extend(self, events: list[dict[str, Any]]) -> None:
        """Append events that another log has numbered; a gap counts as dropped."""
        with self._lock:
            if events and events[0]["seq"] != self._first + len(self._events):
                self._events, self._first = [], events[0]["seq"]
            self._keep(events)

    def _keep(self, events: list[dict[str, Any]]) -> None:
        self._events += events
        if len(self._events) > 2 * self._capacity:
            surplus = len(self._events) - self._capacity
            del self._events[:surplus]
            self._first += surplus

    def since(self, seq: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the next sequence number and the events from `seq` on.

        Where some of them are gone, one ``dropped`` event stands for all up to the next number.
        """
        with self._lock:
            following = self._first + len(self._events)
            if seq < self._first or seq > following:
                lost = max(0, following - seq)
                return following, [{"seq": following - 1, "type": "dropped", "count": lost}]
            return following, self._events[seq - self._first :]

    def snapshot(self) -> tuple[int, list[str]]:
        """Return the sequence number of the next event, and all keys that are present."""
        with self._lock:
            return self._first + len(self._events), list(self._present)
