"""A pool's blocks on disk: written beside the steps, read when a prompt is admitted.

A block's K and V in all layers are one item of a `DiskTier`, so a model with several KV groups
needs nothing more. Blocks are written once all layers of them are computed, by a thread: the step
only copies them into a queue of bounded size. What finds it full until its request ends is dropped.
Whatever goes wrong on the disk is a miss, and is counted.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.errors import Error
from pyruntime.kv.disk import HIT, DiskTier
from pyruntime.kv.export import export_keys
from pyruntime.kv.tables import KvStorage

__all__ = ["QUEUE_BYTES", "DiskCache"]

log = logging.getLogger(__name__)
QUEUE_BYTES = 32 << 20
MOST_TOLD = 8
"""Failures that are logged one by one."""

Keys = NDArray[np.uint8]
Rows = Sequence[NDArray[np.int32]]


class DiskCache:
    """Blocks of a `KvStorage` in a `DiskTier`.

    Parameters
    ----------
    tier : DiskTier
        Its items are `item_bytes(storage)` long. Closed by `close`.
    storage : KvStorage
    block_size : int
        Tokens per block.
    queue_bytes : int, default 32 MiB
        Of blocks that wait to be written.

    Attributes
    ----------
    room : int
        Blocks in so many bytes; who loads should not ask for more at a time.

    Notes
    -----
    The owner of the storage calls; one thread of the cache's own writes.
    """

    def __init__(
        self,
        tier: DiskTier,
        storage: KvStorage,
        block_size: int,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.tier = tier
        self._pieces = [
            [
                part
                for layer in group.layers
                for part in (storage.keys[layer], storage.values[layer])
            ]
            for group in storage.groups
        ]
        self._num_pieces = sum(map(len, self._pieces))
        self._block_size = block_size
        self.room = max(1, queue_bytes // tier.item_bytes)  # blocks
        self._counts = dict.fromkeys(("asked", "found", "dropped", "write_failures"), 0)
        self._told = 0
        self._wake = threading.Condition()
        self._queue: deque[tuple[Keys, NDArray[Any]]] = deque()  # guarded by _wake
        self._pending = 0  # blocks queued or being written; guarded by _wake
        self._closed = False  # guarded by _wake
        self._thread = threading.Thread(target=self._write, name="pyruntime-disk", daemon=True)
        self._thread.start()

    @staticmethod
    def item_bytes(storage: KvStorage) -> int:
        """Return the bytes of one block in all layers."""
        return sum(part[0].nbytes for part in (*storage.keys, *storage.values))

    def keys(self, namespace: bytes, tokens: NDArray[np.int32]) -> Keys:
        """Return the keys of the full blocks of `tokens`.

        The namespace alone keeps tenants apart: who can read keys in the file can read the blocks.
        """
        return export_keys(b"", namespace, tokens, block_size=self._block_size)

    def save(self, keys: Keys, rows: Rows) -> int:
        """Write leading blocks later, as many as the queue takes; return how many these are.

        `rows` has their ids in each group.
        """
        with self._wake:
            taken = 0 if self._closed else min(len(keys), self.room - self._pending)
            if taken < 1:
                return 0
            self._pending += taken
        items = self._items(taken)
        for at, part, row in self._each(rows):
            items[:, at] = part[row[:taken]]
        with self._wake:
            self._queue.append((keys[:taken], items))
            self._wake.notify_all()
        return taken

    def drop(self, blocks: int) -> None:
        """Note that so many blocks found the queue full."""
        self._counts["dropped"] += blocks

    def load(self, keys: Keys) -> NDArray[Any]:
        """Return the items of the leading keys that are there, for `place`."""
        self._counts["asked"] += len(keys)
        items = self._items(0)
        try:
            there = self.tier.match(keys)
            if there:
                items = self._items(there)
                found, _ = self.tier.get(keys[:there], items)
                items = items[: int(np.argmin(np.append(found == HIT, False)))]
        except Error as error:
            self._tell("reading KV blocks from disk failed: %s", error)
            items = self._items(0)
        self._counts["found"] += len(items)
        return items

    def place(self, items: NDArray[Any], rows: Rows) -> None:
        """Put items into the blocks that `rows` names in each group."""
        for at, part, row in self._each(rows):
            part[row] = items[:, at]

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued is on disk; False after `timeout_s`."""
        with self._wake:
            return self._wake.wait_for(lambda: self._pending == 0, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, giving up after `timeout_s`, and close the file."""
        self.flush(timeout_s)
        with self._wake:
            self._closed = True
            self._queue.clear()
            self._wake.notify_all()
        self._thread.join()
        self.tier.close()

    def stats(self) -> dict[str, int]:
        """Counters of the tier, ``asked`` and ``found`` blocks of prompts, ``dropped`` ones."""
        try:
            tier = self.tier.stats()
        except Error:  # closed
            tier = {}
        return {**tier, **self._counts, "queued": self._pending}

    def _items(self, blocks: int) -> NDArray[Any]:
        piece = self._pieces[0][0]
        return np.empty((blocks, self._num_pieces, *piece.shape[1:]), piece.dtype)

    def _each(self, rows: Rows) -> Any:
        at = 0
        for pieces, row in zip(self._pieces, rows, strict=True):
            for part in pieces:
                yield at, part, row
                at += 1

    def _write(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closed)
                jobs = list(self._queue)
                self._queue.clear()
                if not jobs:
                    return
            try:  # as one: each call waits for the disk
                keys = np.concatenate([keys for keys, _ in jobs])
                self.tier.put(keys, np.concatenate([items for _, items in jobs]))
            except Error as error:
                self._counts["write_failures"] += 1
                self._tell("writing KV blocks to disk failed: %s", error)
            except Exception:  # a bug, or no memory: the engine serves on without these blocks
                self._counts["write_failures"] += 1
                log.exception("writing KV blocks to disk failed")
            with self._wake:
                self._pending -= sum(len(keys) for keys, _ in jobs)
                self._wake.notify_all()

    def _tell(self, text: str, error: Error) -> None:
        self._told += 1
        if self._told <= MOST_TOLD:
            log.warning(text, error)
