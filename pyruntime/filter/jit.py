"""One key at a time from compiled code: functions of a filter for ``numba.njit`` and ctypes.

They take the filter's `address` and one 64-bit key, and go through the C ABI without the
interpreter, also where it has been released (``nogil=True``). The filter must live meanwhile;
any number of threads may share it. They neither check that it holds integers nor raise: a negative
result is a status of ``pyruntime/abi.h``, of which `pyruntime.errors.from_status` makes an error.

Examples
--------
>>> from pyruntime.filter import CuckooFilter
>>> f = CuckooFilter(1000, seed=1)
>>> insert1(f.address, 3), contains1(f.address, 3), contains1(f.address, 4)
(0, 1, 0)
"""

from __future__ import annotations

from pyruntime import policy

__all__ = ["contains1", "insert1", "remove1"]

contains1 = policy.c_function("pyrt_filter_contains1")
"""``contains1(address, key)``: 1 if the key may be in, 0 if it is not."""
insert1 = policy.c_function("pyrt_filter_insert1")
"""``insert1(address, key)``: `OK`, or `FULL` or `DUP_LIMIT`, which leave no trace; never grows."""
remove1 = policy.c_function("pyrt_filter_remove1")
"""``remove1(address, key)``: `OK`, or `ABSENT`. Only for keys that are in."""
