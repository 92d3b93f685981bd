"""Approximate membership with deletion: a cuckoo filter, on the CPU and on CUDA devices."""

from pyruntime.filter.cuckoo import (
    ABSENT,
    DUP_LIMIT,
    EXISTS,
    FULL,
    OK,
    AbsentKeysError,
    CuckooFilter,
    FilterFullError,
)
from pyruntime.filter.device import DeviceFilter, raw_kernel_options

__all__ = [
    "ABSENT",
    "DUP_LIMIT",
    "EXISTS",
    "FULL",
    "OK",
    "AbsentKeysError",
    "CuckooFilter",
    "DeviceFilter",
    "FilterFullError",
    "raw_kernel_options",
]
