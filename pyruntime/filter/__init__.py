"""Approximate membership with deletion: a cuckoo filter, on the CPU and on CUDA devices."""

from pyruntime.filter.cuckoo import ABSENT, DUP_LIMIT, EXISTS, FULL, OK, CuckooFilter
from pyruntime.filter.device import DeviceFilter

__all__ = ["ABSENT", "DUP_LIMIT", "EXISTS", "FULL", "OK", "CuckooFilter", "DeviceFilter"]
