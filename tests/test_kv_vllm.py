"""Hit lengths equal vLLM's: recorded from the version the data are named by, live where it is."""

import importlib.util
import json
import os
import sys

import pytest

from tests.kv_traces import DATA, Peer, replay

RECORDED = sorted(DATA.glob("vllm-*.json"))
TRACES = [(path.stem, trace) for path in RECORDED for trace in json.loads(path.read_text())]
PYTHON = os.environ.get("PYRUNTIME_VLLM_PYTHON") or (
    sys.executable if importlib.util.find_spec("vllm") else None
)


@pytest.mark.parametrize(
    "trace", [pytest.param(t, id=f"{v}-{t['num_blocks']}-{t['window']}") for v, t in TRACES]
)
def test_recorded_hit_lengths(trace):
    hits = trace["hits"]
    assert replay(trace["operations"], trace["num_blocks"], trace["window"]) == hits
    assert len(hits) > 100 and sum(hit or 0 for hit in hits) > 500


def test_traces_with_and_without_pressure_were_recorded():
    refused = [t["hits"].count(None) for _, t in TRACES]
    assert max(refused) > 20 and min(refused) == 0
    assert {t["window"] > 0 for _, t in TRACES} == {True, False}


@pytest.mark.skipif(not PYTHON, reason="no vLLM here, nor PYRUNTIME_VLLM_PYTHON")
@pytest.mark.timeout(300)
def test_live_hit_lengths():
    peer = Peer(PYTHON, "vllm_kv.py")
    for _, trace in TRACES:
        where = trace["num_blocks"], trace["window"]
        assert replay(trace["operations"], *where) == peer.hits(trace["operations"], *where)
    peer.close()
