import json
import os
import subprocess
import sys

import pytest

from pyruntime import doctor
from pyruntime.__main__ import main


def test_report_is_plain_json_and_complete():
    report = json.loads(doctor.as_json(doctor.examine()))
    assert report["cpu"]["cores_usable"] == len(os.sched_getaffinity(0))
    assert report["memory"]["thp_mode"] in {"always", "madvise", "never", "absent"}
    assert isinstance(report["falls_back_to"], list)


def test_huge_pages_are_never_claimed_when_thp_is_off_for_the_process():
    code = (
        "import ctypes, pyruntime.doctor as d\n"
        "PR_SET_THP_DISABLE = 41\n"
        "assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0\n"
        "assert d.huge_page_probe()['huge_bytes'] == 0\n"
        "assert any('huge' in note for note in d.examine()['falls_back_to'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_lowered_simd_is_reported(level):
    if level == "avx2" and doctor.examine()["cpu"]["simd_detected"] in {"scalar", "avx2", "neon"}:
        pytest.skip("this CPU has no level above avx2")
    code = (
        "import pyruntime.doctor as d; r = d.examine();"
        f"assert r['cpu']['simd_in_use'] == '{level}', r['cpu']"
    )
    environment = {**os.environ, "PYRUNTIME_SIMD": level}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_command_line(capsys):
    assert main(["doctor"]) == 0
    assert "falls back to" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["--help"]) == 0
    assert main(["nonsense"]) == 2


def test_a_reader_that_leaves_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "pyruntime", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # before a line is written, as `| head -0` would
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
