"""KV blocks in a file, under names of their content: the tier that outlives the process.

The core, the file's layout and its failure behaviour are described in ``pyruntime/kv_tiers.h`` and
``csrc/kv/disk.hpp``.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.errors import ClosedError, InvalidArgumentError

__all__ = ["CORRUPT", "HIT", "MISS", "DiskTier"]

MISS, HIT, CORRUPT = 0, 1, 2
"""What `DiskTier.get` says of a key."""


class DiskTier:
    """Items of one size in one file, by keys of 32 bytes; the least recently used make room.

    Parameters
    ----------
    path : path
        Made if there is none, readable by its owner only, and locked while it is open.
    item_bytes : int
        Of an item (1..2**30).
    capacity_bytes : int
        Of the file, which grows as it is filled. A sixteenth of its items, 64 at most, stay free.
    fingerprint : bytes
        Says what the items are about, 1024 bytes at most: model, block size, type.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        A size is out of range, or the file was made with another fingerprint or other sizes.
    pyruntime.errors.CorruptDataError, pyruntime.errors.VersionError
        The file is none of ours, its header is damaged, or it is of another version.
    pyruntime.errors.StateError
        The file is open already, in this process or another.
    pyruntime.errors.NotFoundError, pyruntime.errors.StorageError, pyruntime.errors.CapacityError
        What the system says: no such folder, no permission, no room.

    Notes
    -----
    Thread-safe but for `close`; all calls release the GIL. Puts take turns; gets run beside them.
    What was put is on the disk when `put` returns, and an item whose checksum does not fit is
    dropped rather than returned.

    Examples
    --------
    >>> import tempfile
    >>> from pyruntime.kv import export_keys
    >>> folder = tempfile.TemporaryDirectory()
    >>> keys = export_keys(b"secret", b"tenant", np.arange(32, dtype=np.int32))
    >>> blocks = np.arange(8, dtype=np.float32).reshape(2, 4)
    >>> with DiskTier(f"{folder.name}/kv", item_bytes=16, capacity_bytes=1 << 20) as disk:
    ...     disk.put(keys, blocks)
    2
    >>> with DiskTier(f"{folder.name}/kv", item_bytes=16, capacity_bytes=1 << 20) as disk:
    ...     found, data = disk.get(keys)
    >>> found.tolist(), data.view(np.float32).tolist()
    ([1, 1], [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        item_bytes: int,
        capacity_bytes: int,
        fingerprint: bytes = b"",
    ) -> None:
        self.path = os.fspath(path)
        self.item_bytes = item_bytes
        for name, value in (("item_bytes", item_bytes), ("capacity_bytes", capacity_bytes)):
            if not 0 <= value < 1 << 64:
                raise InvalidArgumentError(f"{name} is {value}; it must be a size in bytes")
        self._open: Any = _native.KvDisk(self.path, item_bytes, capacity_bytes, bytes(fingerprint))

    def put(self, keys: NDArray[np.uint8], data: NDArray[Any]) -> int:
        """Store items that are not there; those that are count as used.

        Parameters
        ----------
        keys : ndarray of uint8, shape (n, 32)
            The first becomes the most recently used: blocks of a prefix in order.
        data : ndarray, shape (n, ...)
            Contiguous, `item_bytes` for each key.

        Returns
        -------
        int
            How many were new. Of more than the capacity, the first are taken.

        Raises
        ------
        pyruntime.errors.CapacityError, pyruntime.errors.StorageError
            The disk is full, or a write failed: what was there stays, and what earlier rounds of
            the call stored (a sixteenth of the capacity each, 64 items at most).
        """
        data = np.asarray(data)
        if not data.flags.c_contiguous or data.nbytes != len(keys) * self.item_bytes:
            raise InvalidArgumentError(
                f"data has {data.nbytes} bytes; {len(keys)} keys take {self.item_bytes} each, "
                "contiguous"
            )
        stored: int = self._disk.put(_checked(keys), data.reshape(-1).view(np.uint8))
        return stored

    def get(
        self, keys: NDArray[np.uint8], out: NDArray[Any] | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Read items.

        Parameters
        ----------
        keys : ndarray of uint8, shape (n, 32)
        out : ndarray, shape (n, ...), optional
            Contiguous, `item_bytes` for each key.

        Returns
        -------
        found : ndarray of uint8, shape (n,)
            `HIT`, `MISS`, or `CORRUPT` for an item that was dropped just now.
        data : ndarray, shape (n, ...)
            `out`, or uint8 [n, item_bytes]; zero where there was no hit.

        Raises
        ------
        pyruntime.errors.StorageError
            A read failed; nothing was dropped.
        """
        if out is None:
            out = np.empty((len(keys), self.item_bytes), np.uint8)
        writable = out.flags.c_contiguous and out.flags.writeable
        if not writable or out.nbytes != len(keys) * self.item_bytes:
            raise InvalidArgumentError(
                f"out has {out.nbytes} bytes; {len(keys)} keys take {self.item_bytes} each, "
                "contiguous and writable"
            )
        found: NDArray[np.uint8] = self._disk.get(_checked(keys), out.reshape(-1).view(np.uint8))
        return found, out

    def match(self, keys: NDArray[np.uint8]) -> int:
        """Return how many keys, from the first on, are there; these count as used. No I/O."""
        there: int = self._disk.match(_checked(keys))
        return there

    def stats(self) -> dict[str, int]:
        """Counters and gauges of ``pyrt_kv_disk_statistics``."""
        found: dict[str, int] = self._disk.statistics()
        return found

    def verify(self) -> None:
        """Count everything again, without I/O; `CorruptDataError` says what is wrong."""
        self._disk.verify()

    def close(self) -> None:
        """Close the file; no other call may be running. Nothing is left to write."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def _disk(self) -> Any:
        if self._open is None:
            raise ClosedError(f"{self.path} is closed")
        return self._open

    def __enter__(self) -> DiskTier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DiskTier({self.path!r}, item_bytes={self.item_bytes})"


def _checked(keys: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 32:
        raise InvalidArgumentError(
            f"keys are {keys.dtype}{list(keys.shape)}; they must be uint8 of the shape (n, 32)"
        )
    return np.ascontiguousarray(keys)
