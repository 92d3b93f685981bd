"""Run benchmarks and keep their results: ``python -m bench.record NAME [pytest arguments]``.

``python -m bench.record pool bench/bench_pool.py -k bulk`` writes
``bench/results/<date>-pool.json``: machine, versions, command, load, and for each benchmark the
median, quartiles and `extra_info` (its peers and ratios). Without a path, all of ``bench``.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "numpy",
    "torch",
    "numba",
    "transformers",
    "pytest-benchmark",
    "hnswlib",
    "cupy-cuda13x",
)


def machine():
    """Say what the figures were measured on."""
    cpus = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "CPU part"))
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "transparent_huge_pages": thp.read_text().strip() if thp.exists() else "none",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions():
    """Versions of what took part, where installed, and the commit."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    if commit.returncode == 0:
        found["pyruntime"] = commit.stdout.strip() + (" with changes" if changes.stdout else "")
    return found


def summary(benchmark):
    """Keep of one benchmark what a reader compares."""
    stats = benchmark["stats"]
    kept = {key: stats[key] for key in ("min", "q1", "median", "q3", "rounds", "iterations")}
    return {
        "name": benchmark["fullname"],
        "seconds": kept,
        "extra_info": benchmark["extra_info"],
    }


def destination(name, when):
    """Return a path that does not exist yet."""
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    stem = f"{when:%Y-%m-%d}-{name}"
    for number in range(1, 1000):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return path
    raise FileExistsError(f"{folder}/{stem}-*.json: a thousand of them")


def main(arguments=None):
    """Run pytest and write the file; returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__)
    parser.add_argument("name", help="goes into the file's name")
    known, rest = parser.parse_known_args(arguments)
    if not known.name.replace("_", "").replace("-", "").isalnum():
        parser.error(f"NAME is {known.name!r}; it must be letters, digits, - and _")
    if not any((ROOT / argument.split("::")[0]).exists() for argument in rest):
        rest = ["bench", *rest]
    when = datetime.now(UTC)
    about = {"date": when.isoformat(timespec="seconds"), "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--benchmark-only",
            f"--benchmark-json={raw}",
            *rest,
        ]
        status = subprocess.run(command, cwd=ROOT).returncode
        benchmarks = json.loads(raw.read_text())["benchmarks"] if raw.exists() else []
    if not benchmarks:
        print("nothing was measured, so nothing is kept", file=sys.stderr)
        return status or 1
    about["command"] = " ".join(["python -m bench.record", known.name, *rest])
    about["versions"] = versions()
    about["benchmarks"] = [summary(benchmark) for benchmark in benchmarks]
    path = destination(known.name, when)
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(f"kept in {path.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
