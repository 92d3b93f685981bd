"""Typed errors: every failure of the C ABI is one of these, and a built-in exception as well.

All derive from `Error`. The mapping from `pyrt_status` is `from_status`; the native modules raise
through it, so Python code never sees a bare status code.
"""

from __future__ import annotations

import builtins

__all__ = [
    "CancelledError",
    "CapacityError",
    "ClosedError",
    "CorruptDataError",
    "DeviceError",
    "DeviceUnavailableError",
    "Error",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfMemoryError",
    "StateError",
    "StorageError",
    "TimeoutError",
    "UnsupportedError",
    "VersionError",
    "from_status",
]


class Error(Exception):
    """Base of every error pyruntime raises."""


class InvalidArgumentError(Error, ValueError):
    """An argument is outside its documented range; the message names it, its value, the range."""


class OutOfMemoryError(Error, MemoryError):
    """The operating system gave no memory; state is unchanged."""


class CapacityError(Error, MemoryError):
    """A pool, filter, budget or KV space is exhausted; the message says what would free room."""


class NotFoundError(Error, KeyError):
    """Unknown id or file."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class CorruptDataError(Error, ValueError):
    """Stored data fail their checks; the message has file, offset, expected and found."""


class StorageError(Error, OSError):
    """A read or write failed."""


class VersionError(Error):
    """A format or ABI is too new or too old; the message has both numbers."""


class DeviceUnavailableError(Error, RuntimeError):
    """No GPU, no driver, or built without CUDA; the message says which of the three."""


class DeviceError(Error, RuntimeError):
    """A CUDA call failed; the handle is poisoned and later calls repeat the error."""


class StateError(Error, RuntimeError):
    """Busy, double release, stale handle, wrong thread or forked child; state is unchanged."""


class ClosedError(Error, RuntimeError):
    """The object was closed."""


class TimeoutError(Error, builtins.TimeoutError):
    """A deadline passed."""


class CancelledError(Error):
    """The caller's stop flag was raised."""


class UnsupportedError(Error, NotImplementedError):
    """Valid input that this version does not implement; the message lists what it does."""


class InternalError(Error, RuntimeError):
    """A bug in pyruntime; please report the message."""


_BY_STATUS: dict[int, type[Error]] = {
    -1: InvalidArgumentError,
    -2: OutOfMemoryError,
    -3: CapacityError,
    -4: NotFoundError,
    -5: CorruptDataError,
    -6: StorageError,
    -7: VersionError,
    -8: DeviceUnavailableError,
    -9: DeviceError,
    -10: StateError,
    -11: ClosedError,
    -12: TimeoutError,
    -13: CancelledError,
    -14: UnsupportedError,
    -15: InternalError,
}


def from_status(status: int, message: str) -> Error:
    """Make the exception for a `pyrt_status`.

    Parameters
    ----------
    status : int
        A negative `pyrt_status`.
    message : str
        Text of `pyrt_last_error()`.

    Returns
    -------
    Error
        To be raised by the caller.
    """
    return _BY_STATUS.get(status, InternalError)(message)
