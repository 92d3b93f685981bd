"""With huge pages off, without hugetlb pages, without NUMA, with static TLS used up: all works, and
`stats` and `doctor` say what was fallen back to. Each in a process of its own; nothing about the
machine is changed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyruntime.pool import Pool

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGETLB = Path("/proc/sys/vm/nr_hugepages")
CC = shutil.which("cc") or shutil.which("gcc")

# What must work whatever the machine lacks.
EXERCISE = """
def exercise(**options):
    with Pool(2048, 3000, max_capacity=9000, **options) as pool:
        indices = np.empty(9000, np.uint32)
        pool.acquire_into(indices)
        data = np.random.default_rng(0).integers(0, 256, (9000, 2048), np.uint8)
        pool.write(indices, data)
        assert (pool.read(indices) == data).all()
        assert pool.try_acquire() is None
        pool.prefault()
        stats = pool.stats()
        pool.release_from(indices)
        pool.trim()
        pool.verify()
        return stats
"""


def run(code, **environment):
    source = (
        "import ctypes, json\nimport numpy as np\nfrom pyruntime import doctor\n"
        "from pyruntime.pool import Pool\n" + EXERCISE + code
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NO_THP = "assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE\n"


@pytest.mark.skipif(not THP.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("pages", ["auto", "thp"])
@pytest.mark.parametrize("prefault", ["none", "sync", "background"])
def test_huge_pages_off(pages, prefault):
    mode = THP.read_text()
    stats, notes = run(
        NO_THP + f"stats = exercise(pages={pages!r}, prefault={prefault!r})\n"
        "print(json.dumps([stats, doctor.examine()['falls_back_to']]))"
    )
    assert stats["huge_bytes"] == 0
    assert stats["in_use"] == 9000
    assert stats["fallbacks"] > 0
    assert any("0 of 16 MiB came as huge pages" in note for note in notes), notes
    assert THP.read_text() == mode, "nothing global is changed"


def test_no_hugetlb_pages():
    free = int(HUGETLB.read_text()) if HUGETLB.exists() else 0
    if free > 0:
        pytest.skip(f"{free} hugetlb pages are reserved on this machine")
    stats, notes = run(
        "stats = exercise(pages='hugetlb')\n"
        "print(json.dumps([stats, doctor.examine()['falls_back_to']]))"
    )
    assert stats["fallbacks"] > 0
    assert stats["in_use"] == 9000
    assert any(note.startswith("hugetlb: ") for note in notes), notes


def test_4k_pages_are_a_wish_that_is_met():
    stats = run("print(json.dumps(exercise(pages='4k')))")
    assert stats["huge_bytes"] == 0
    assert stats["fallbacks"] == 0


def test_a_numa_node_that_is_not_there():
    nodes = {p.name for p in Path("/sys/devices/system/node").glob("node[0-9]*")}
    absent = next(n for n in range(63, -1, -1) if f"node{n}" not in nodes)
    stats, notes, count = run(
        f"stats = exercise(node={absent})\nreport = doctor.examine()\n"
        "print(json.dumps([stats, report['falls_back_to'], report['cpu']['numa_nodes']]))"
    )
    assert stats["fallbacks"] > 0
    assert stats["in_use"] == 9000
    assert (count == 1) == any(note.startswith("NUMA: ") for note in notes)


def test_the_node_that_is_there():
    with Pool(64, 1000, node=0) as pool:
        assert pool.acquire().nbytes == 64


# A library that needs static TLS, as ones built with -ftls-model=initial-exec do.
HOARD = """
__thread char hoard[SIZE] __attribute__((tls_model("initial-exec"))) = {1};
char* touch(void) { return hoard; }
"""


@pytest.mark.skipif(CC is None, reason="no C compiler")
def test_static_tls_used_up(tmp_path):
    """Whatever the loader keeps in reserve is taken before the first of our modules is imported."""
    sizes = (512, 64, 8)
    for size in sizes:
        source = tmp_path / f"hoard{size}.c"
        source.write_text(HOARD.replace("SIZE", str(size)))
        library = tmp_path / f"hoard{size}.so"
        subprocess.run([CC, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    code = f"""
import ctypes, json, pathlib, shutil, sys
import numpy as np
import ctypes.util
directory = pathlib.Path({str(tmp_path)!r})
kept, refused = [], 0
for size in {sizes!r}:
    for number in range(4000):
        copy = directory / f"copy-{{size}}-{{number}}.so"
        shutil.copy(directory / f"hoard{{size}}.so", copy)
        try:
            kept.append(ctypes.CDLL(str(copy)))
        except OSError as error:
            assert "static TLS" in str(error), error
            refused += 1
            break
        finally:
            copy.unlink()
assert not any(name.startswith("pyruntime") for name in sys.modules)
from pyruntime import doctor
from pyruntime.pool import Pool
{EXERCISE}
stats = exercise()
import threading
results = []
thread = threading.Thread(target=lambda: results.append(exercise()))
thread.start()
thread.join()
assert results
print(json.dumps([len(kept), refused, stats["in_use"], len(doctor.as_text(doctor.examine()))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, refused, in_use, length = json.loads(done.stdout)
    if refused < len(sizes):
        pytest.skip("this C library gives static TLS without limit")
    assert kept > 0
    assert in_use == 9000
    assert length > 0
