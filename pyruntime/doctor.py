"""`pyruntime doctor`: what this machine has, and what the runtime falls back to.

Nothing here needs an extra; every probe reports what it saw rather than what is configured.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyruntime
from pyruntime import config, gpu
from pyruntime._ext import _native
from pyruntime.errors import Error
from pyruntime.pool import Pool

__all__ = ["as_json", "as_text", "examine", "huge_page_probe"]

HUGE_PAGE_BYTES = 2 << 20
CUDA_LIBRARY = "libpyruntime_cuda.so"
# Distribution -> the extra that installs it.
OPTIONAL = {
    "numba": "jit",
    "cupy-cuda13x": "cuda",
    "safetensors": "serve",
    "tokenizers": "serve",
    "jinja2": "serve",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus-client": "serve",
}


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""


def huge_page_probe(num_bytes: int = 8 * HUGE_PAGE_BYTES) -> dict[str, int]:
    """Make a memory pool on huge pages and look at what the kernel gave it.

    Parameters
    ----------
    num_bytes : int
        Bytes to commit and fault in.

    Returns
    -------
    dict
        ``asked_bytes`` and ``huge_bytes``, which is read from smaps.
    """
    with Pool(4096, num_bytes // 4096, align=4096, prefault="sync") as pool:
        stats = pool.stats()
        return {"asked_bytes": stats["committed_bytes"], "huge_bytes": stats["huge_bytes"]}


def _cpu() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "simd_detected": _native.simd_detected(),
        "simd_in_use": _native.simd_level(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cores_online": os.cpu_count() or 1,
        "threads": _native.threads_size(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
    }


def _memory() -> dict[str, Any]:
    modes = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    pools = Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")
    return {
        "page_bytes": mmap.PAGESIZE,
        "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "thp_mode": modes[1] if modes else "absent",
        "thp_probe": huge_page_probe(),
        "hugetlb_pages": {
            pool.name.removeprefix("hugepages-"): int(_read(f"{pool}/nr_hugepages") or 0)
            for pool in sorted(pools)
        },
    }


def _cuda() -> dict[str, Any]:
    """Ask the driver itself and our library: each may be there without the other."""
    library = Path(os.environ.get("PYRUNTIME_CUDA_LIBRARY") or config.library_dir() / CUDA_LIBRARY)
    report: dict[str, Any] = {
        "library": str(library) if library.exists() else "absent: built without CUDA",
        "driver": "",
        "devices": [],
        "usable": gpu.available(),
        "why": "",
    }
    try:
        gpu.info()
    except Error as error:
        report["why"] = str(error)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        report["driver"] = "absent: no libcuda.so.1"
        return report
    status = driver.cuInit(0)
    if status != 0:
        report["driver"] = f"present, but cuInit failed with code {status}"
        return report
    number, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDriverGetVersion(ctypes.byref(number))
    report["driver"] = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        device, capability = ctypes.c_int(), []
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        for attribute in (75, 76):  # compute capability, major and minor
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability.append(str(number.value))
        report["devices"].append(f"{name.value.decode()} (sm_{''.join(capability)})")
    return report


def _optional() -> dict[str, str]:
    found = {}
    for name, extra in OPTIONAL.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f'absent: pip install "pyruntime[{extra}]"'
    return found


def _fallbacks(cpu: dict[str, Any], memory: dict[str, Any], cuda: dict[str, Any]) -> list[str]:
    notes = []
    if cpu["simd_in_use"] != cpu["simd_detected"]:
        notes.append(f"SIMD: {cpu['simd_in_use']}, lowered by PYRUNTIME_SIMD")
    elif cpu["simd_in_use"] == "scalar":
        notes.append("SIMD: scalar code, this CPU has no level we use")
    probe = memory["thp_probe"]
    if probe["huge_bytes"] < probe["asked_bytes"]:
        notes.append(
            f"memory: {probe['huge_bytes'] >> 20} of {probe['asked_bytes'] >> 20} MiB came as huge "
            f"pages (THP mode {memory['thp_mode']}), the rest as {memory['page_bytes']}-byte pages"
        )
    if not any(memory["hugetlb_pages"].values()):
        notes.append("hugetlb: no pages are reserved, pages='hugetlb' falls back to THP")
    if cpu["numa_nodes"] == 1:
        notes.append("NUMA: one node, placement is off")
    if not cuda["usable"]:
        notes.append(f"CUDA: CPU only, {cuda['why']}")
    return notes


def examine() -> dict[str, Any]:
    """Look at the machine.

    Returns
    -------
    dict
        Sections ``versions``, ``cpu``, ``memory``, ``tools``, ``cuda``, ``optional`` and the list
        ``falls_back_to``; plain JSON types throughout.
    """
    cpu, memory, cuda = _cpu(), _memory(), _cuda()
    return {
        "versions": {
            "pyruntime": pyruntime.__version__,
            "abi": _native.abi_version(),
            "python": sys.version.split()[0],
            "numpy": importlib.metadata.version("numpy"),
            "kernel": platform.release(),
        },
        "cpu": cpu,
        "memory": memory,
        "tools": {
            "c++": _first_line([os.environ.get("CXX", "c++"), "--version"]) or "absent",
            "nvcc": shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
            or "absent",
        },
        "cuda": cuda,
        "optional": _optional(),
        "falls_back_to": _fallbacks(cpu, memory, cuda),
    }


def as_json(report: dict[str, Any]) -> str:
    """Render a report of `examine` as indented JSON."""
    return json.dumps(report, indent=2)


def as_text(report: dict[str, Any]) -> str:
    """Render a report of `examine` for a terminal."""
    lines = []
    for section, content in report.items():
        lines.append(section.replace("_", " "))
        if isinstance(content, list):
            lines += [f"  {note}" for note in content] or ["  nothing"]
        else:
            width = max(len(key) for key in content)
            lines += [f"  {key:<{width}}  {_flat(value)}" for key, value in content.items()]
    return "\n".join(lines)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item != "")
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)
