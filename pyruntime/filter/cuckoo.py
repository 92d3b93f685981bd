"""Approximate membership with deletion: a cuckoo filter for any number of threads.

The core, its concurrency rules and its failure behaviour are described in ``pyruntime/filter.h``
and ``csrc/filter/filter.hpp``; the file in ``docs/filter_format.md``.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyruntime._ext import _native
from pyruntime.errors import CapacityError, InvalidArgumentError, NotFoundError
from pyruntime.filter.keys import Keys, read_keys, result_array

__all__ = [
    "ABSENT",
    "DUP_LIMIT",
    "EXISTS",
    "FULL",
    "OK",
    "AbsentKeysError",
    "CuckooFilter",
    "FilterFullError",
]

OK, EXISTS, FULL, DUP_LIMIT = range(4)
"""Results by key (`CuckooFilter.status`)."""
ABSENT = 1
"""Result of a deletion: the key was not there."""

OnFull = Literal["report", "raise", "grow"]
_KINDS = {1: "integer", 2: "string"}


class FilterFullError(CapacityError):
    """Keys found no room. `status` says which, `stored` is how many did."""

    status: NDArray[np.uint8]
    stored: int


class AbsentKeysError(NotFoundError):
    """Keys to be deleted were not in. `mask` is True where one was absent."""

    mask: NDArray[np.bool_]


class CuckooFilter:
    """A multiset of keys that never forgets one, and rarely takes another key for one of them.

    Parameters
    ----------
    capacity : int
        Distinct keys that fit for sure (1..2**38).
    bits : {16, 8}, optional
        Of a fingerprint: about 17 or 8.5 bits of memory per key, and false positives of 0.023 % or
        6 % when full (with 8 slots).
    slots : {8, 16}, optional
        Of a bucket: 16 doubles the false positives.
    seed : int, optional
        Random by default, so that nobody can choose keys that collide. 64 bits.
    on_full : {"report", "raise", "grow"}, optional
        Whether `insert` raises when a key found no room, or grows the filter when as many keys are
        in as fit for sure.

    Raises
    ------
    pyruntime.errors.InvalidArgumentError
        An argument is outside its range.

    Notes
    -----
    Keys are integers (arrays of int64, uint64, int32, uint32, or Python ints) or strings and bytes
    (lists, numpy ``S`` and ``U`` arrays; text counts as its UTF-8), not both in one filter. Arrow
    arrays of either, chunked or not, are read through ``__arrow_c_array__`` or
    ``__arrow_c_stream__`` (pyarrow, polars). Arrays that are contiguous 64-bit
    integers are not copied. Signed keys count modulo 2**64.

    A filter grows by generations, each twice as large as the one before; no key that is in is
    lost, then or by later deletions, after which `compact` gives them back. Every generation adds
    its false positives (`expected_fpr`) and its share to the time of a lookup, so a `capacity` that
    fits is better.

    Thread-safe, but `status` is that of the latest call of any thread; calls on many keys release
    the GIL. Source: Fan et al., "Cuckoo Filter:
    Practically Better Than Bloom" (CoNEXT 2014).

    Examples
    --------
    >>> f = CuckooFilter(1000, seed=1)
    >>> f.insert([3, 5, 5])
    3
    >>> f.contains([3, 4, 5]).tolist()
    [True, False, True]
    >>> f.delete([5])
    1
    >>> 5 in f, len(f)
    (True, 2)
    """

    def __init__(
        self,
        capacity: int,
        *,
        bits: Literal[8, 16] = 16,
        slots: Literal[8, 16] = 8,
        seed: int | None = None,
        on_full: OnFull = "report",
    ) -> None:
        for name, value, most in (("capacity", capacity, 1 << 38), ("seed", seed or 0, 1 << 64)):
            if not isinstance(value, int) or not 0 <= value < most + (name == "capacity"):
                raise InvalidArgumentError(f"{name} is {value!r}; it must be in 0..{most:#x}")
        if bits not in (8, 16) or slots not in (8, 16):
            raise InvalidArgumentError(f"bits is {bits!r} and slots {slots!r}; each is 8 or 16")
        seed = secrets.randbits(64) if seed is None else seed
        self._hold(_native.Filter(capacity, bits, slots, seed), 0, on_full)

    def _hold(self, core: _native.Filter, kind: int, on_full: OnFull) -> None:
        if on_full not in ("report", "raise", "grow"):
            raise InvalidArgumentError(
                f"on_full is {on_full!r}; it must be 'report', 'raise' or 'grow'"
            )
        self.core = core
        self.on_full = on_full
        self.status: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._kind = kind
        self._kind_lock = threading.Lock()

    # Keys

    @property
    def kind(self) -> str:
        """Kind of the keys that are in: "integer", "string", or "" before the first."""
        return _KINDS.get(self._kind, "")

    def _keys(self, keys: Any) -> Keys:
        """Return 64-bit keys and check that they are of the filter's kind."""
        kind, found = read_keys(self.core, keys)
        self._check(kind)
        return found

    def _check(self, kind: int) -> None:
        if kind and self._kind and kind != self._kind:
            raise InvalidArgumentError(
                f"this filter holds {_KINDS[self._kind]} keys; these are {_KINDS[kind]} keys"
            )

    def _claim(self, kind: int) -> None:
        """Check the kind, which is the filter's from now on if it had none."""
        if not kind or kind == self._kind:
            return
        with self._kind_lock:
            self._check(kind)
            self._kind = kind

    # Operations

    def insert(
        self, keys: Any, *, unique: bool = False, out: NDArray[np.uint8] | None = None
    ) -> int:
        """Store keys; `status` (uint8, one per key) then says what became of each.

        Parameters
        ----------
        keys : array_like
        unique : bool, optional
            Leave keys out that are there already, or look so: `EXISTS`.
        out : array of uint8, optional
            Takes the statuses, instead of a new array.

        Returns
        -------
        int
            Keys stored: those that are `OK`. Others have left no trace.

        Raises
        ------
        FilterFullError
            With ``on_full="raise"``: some were `FULL` or at `DUP_LIMIT`; those `OK` are in.
        pyruntime.errors.CapacityError
            With ``on_full="grow"``: it cannot grow any more.
        pyruntime.errors.OutOfMemoryError
            With ``on_full="grow"``: there is no memory for the next generation.
        pyruntime.errors.InvalidArgumentError
            The keys are of another kind than those that are in.
        """
        kind, found = read_keys(self.core, keys)
        status = result_array(out, len(found), np.uint8, found)
        self._claim(kind)
        status.fill(FULL)
        self.status = status
        if self.on_full == "grow":
            return self._insert_growing(found, unique, status)
        stored = self.core.insert(found, unique, status)
        if self.on_full == "raise" and (status >= FULL).any():
            error = FilterFullError(
                f"{int((status >= FULL).sum())} of {len(status)} keys found no room; see status"
            )
            error.status, error.stored = status, stored
            raise error
        return stored

    def _insert_growing(self, keys: Keys, unique: bool, status: NDArray[np.uint8]) -> int:
        stored = at = 0
        while at < len(keys):
            info = self.core.info()
            room = info["capacity"] - info["occupied"]
            if room <= 0:
                self.core.grow(info["num_generations"])
                continue
            piece = slice(at, at + max(room, 1024))
            at, some, marks = piece.stop, keys[piece], status[piece]
            stored += self.core.insert(some, unique, marks)
            while (full := np.flatnonzero(marks == FULL)).size:
                self.core.grow(self.core.info()["num_generations"])
                again = np.empty(len(full), np.uint8)
                stored += self.core.insert(some[full], unique, again)
                marks[full] = again
        return stored

    def grow(self) -> None:
        """Add a generation, twice as large as the last one, after waiting for running calls.

        Raises
        ------
        pyruntime.errors.CapacityError
            The next generation would have more than 2**24 segments of 65 536 slots.
        pyruntime.errors.OutOfMemoryError
            There is no memory for it.
        """
        self.core.grow(0)

    def compact(self) -> int:
        """Give generations back that are no longer needed, after waiting for running calls.

        The newest goes when all that is in it fits into the older ones; then the next. Their
        places in a newer one are not known, so keys never move there.

        Returns
        -------
        int
            Generations less. 0 when nothing has changed.

        Raises
        ------
        pyruntime.errors.OutOfMemoryError
            There is no memory for a byte per key of the newest generation; no key is lost.
        pyruntime.errors.StateError
            The filter is a mapped file.

        Notes
        -----
        Lookups become faster and memory less. Keys stand closer afterwards, so `expected_fpr` may
        rise, and a filter that just fits grows again with the next keys. Takes time in proportion
        to the slots of the newest generation.

        Examples
        --------
        >>> f = CuckooFilter(1000, seed=1, on_full="grow")
        >>> f.insert(range(5000)), f.num_generations
        (5000, 3)
        >>> f.delete(range(4500)), f.compact(), f.num_generations
        (4500, 2, 1)
        """
        return self.core.compact()

    def contains(
        self, keys: Any, *, bits: bool = False, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Say for each key whether it may be in; False is certain.

        Parameters
        ----------
        keys : array_like
        bits : bool, optional
            Pack the answers as ``numpy.packbits(..., bitorder="little")`` does.
        out : array, optional
            Takes the answers, instead of a new array: bool, or uint8 with `bits`.

        Returns
        -------
        array of bool (n_keys,), or with `bits` of uint8 ((n_keys + 7) // 8,)

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            The keys are of another kind than those that are in, or `out` does not fit.
        """
        found = self._keys(keys)
        if bits:
            packed = result_array(out, (len(found) + 7) // 8, np.uint8, found)
            self.core.contains_bits(found, packed)
            return packed
        if out is None:
            answer: NDArray[np.bool_] = self.core.contains(found)
            return answer
        answer = result_array(out, len(found), np.bool_, found)
        self.core.contains_into(found, answer.view(np.uint8))
        return answer

    def count(self, keys: Any, *, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
        """Say for each key how often it is in, or more; `out` takes the answers if given."""
        found = self._keys(keys)
        answer: NDArray[np.uint32] = result_array(out, len(found), np.uint32, found)
        self.core.count(found, answer)
        return answer

    def merge(self, other: CuckooFilter) -> None:
        """Add everything that is in another filter, which stays as it is.

        Parameters
        ----------
        other : CuckooFilter
            Made with the same capacity, bits, slots and seed, and with keys of the same kind.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            It is not such a filter, or this one.
        pyruntime.errors.CapacityError
            There is no room, and to grow would make none: where a key goes in a younger generation
            cannot be told from an older one. Nothing has changed.
        """
        if not isinstance(other, CuckooFilter):
            raise InvalidArgumentError(f"other is {other!r}; it must be a CuckooFilter")
        self._check(other._kind)
        self.core.merge(other.core)
        self._claim(other._kind)

    def delete(
        self, keys: Any, *, must_exist: bool = False, out: NDArray[np.uint8] | None = None
    ) -> int:
        """Take one copy of each key out; `status` says `OK` or `ABSENT`.

        Only delete what is in, its insert having returned: otherwise an equal fingerprint, another
        key's, may go.

        Parameters
        ----------
        keys : array_like
        must_exist : bool, optional
            Raise afterwards if some were absent.
        out : array of uint8, optional
            Takes the statuses, instead of a new array.

        Returns
        -------
        int
            Keys removed.

        Raises
        ------
        AbsentKeysError
            With `must_exist`; its `mask` says which. The others have been removed.
        """
        found = self._keys(keys)
        status = result_array(out, len(found), np.uint8, found)
        removed = self.core.remove(found, status)
        self.status = status
        if must_exist and removed < len(found):
            error = AbsentKeysError(f"{len(found) - removed} of {len(found)} keys were not in")
            error.mask = status == ABSENT
            raise error
        return removed

    def clear(self) -> None:
        """Take everything out and leave one generation, after waiting for running calls."""
        self.core.clear()
        self._kind = 0

    def __contains__(self, key: object) -> bool:
        """Whether one key may be in."""
        return bool(self.contains([key])[0])

    def __len__(self) -> int:
        """Keys that are in, each as often as it is."""
        return int(self.core.info()["occupied"])

    # Inspection

    @property
    def address(self) -> int:
        """Of the C handle, for compiled code (`pyruntime.filter.jit`), while the filter lives."""
        return self.core.address

    @property
    def capacity(self) -> int:
        """Distinct keys that fit for sure, in all generations together."""
        return int(self.core.info()["capacity"])

    @property
    def num_generations(self) -> int:
        """One, and one more for every time it has grown."""
        return int(self.core.info()["num_generations"])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.core.info()["bytes"])

    @property
    def load_factor(self) -> float:
        """Share of slots that are occupied."""
        info = self.core.info()
        return float(info["occupied"] / info["num_slots"])

    @property
    def expected_fpr(self) -> float:
        """Probability that a key that is not in looks as if it were."""
        return float(self.core.info()["expected_fpr"])

    def stats(self) -> dict[str, Any]:
        """Fields of ``pyrt_filter_info``."""
        return self.core.info()

    def verify(self) -> None:
        """Count the occupied slots again; `CorruptDataError` if they are not as counted."""
        self.core.verify()

    def __repr__(self) -> str:
        """Say how full it is."""
        info = self.core.info()
        return f"<CuckooFilter of {info['bits']} bits: {info['occupied']} of {info['capacity']}>"

    # Files

    def to_bytes(self) -> bytes:
        """Return the filter as its file has it."""
        return self.core.save(self._kind)

    @classmethod
    def from_bytes(cls, data: Any, *, on_full: OnFull = "report") -> CuckooFilter:
        """Make a filter of what `to_bytes` gave.

        Raises
        ------
        pyruntime.errors.CorruptDataError
            It is damaged, truncated or no filter; nothing was allocated.
        pyruntime.errors.VersionError
            Its format is not the one this library reads.
        """
        core, kind = _native.Filter.load(data)
        made = cls.__new__(cls)
        made._hold(core, kind, on_full)
        return made

    def save(self, path: str | Path) -> None:
        """Write the filter to a file, which gets its name when it is whole and synced."""
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | Path, *, on_full: OnFull = "report") -> CuckooFilter:
        """Read a filter from a file; errors as in `from_bytes`, and `FileNotFoundError`."""
        return cls.from_bytes(np.fromfile(path, np.uint8), on_full=on_full)

    @classmethod
    def mmap(cls, path: str | Path, *, verify: bool = True) -> CuckooFilter:
        """Map a file for lookups: they read it where it is, shared with all who map it.

        Parameters
        ----------
        path : str or Path
            What `save` wrote. It must not be cut short while the filter lives; `save` over it
            makes a new file and is safe.
        verify : bool, optional
            Check all of it, which reads all of it. Otherwise only the header is checked, and a
            damaged file gives wrong answers.

        Raises
        ------
        pyruntime.errors.CorruptDataError
            It is damaged, truncated or no filter.
        pyruntime.errors.VersionError
            Its format is not one this library reads.
        FileNotFoundError
            There is no such file.

        Notes
        -----
        What would change the filter raises `StateError`.
        """
        os.stat(path)
        core, kind = _native.Filter.open_map(os.fsencode(path), verify)
        made = cls.__new__(cls)
        made._hold(core, kind, "report")
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as its file."""
        return _restore, (self.to_bytes(), self.on_full)


def _restore(data: bytes, on_full: OnFull) -> CuckooFilter:
    return CuckooFilter.from_bytes(data, on_full=on_full)
