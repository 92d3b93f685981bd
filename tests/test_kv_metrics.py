"""A block pool's statistics as metrics."""

import numpy as np
import pytest

from pyruntime.kv import Admission, BlockPool, Retention
from pyruntime.kv.metrics import FAMILIES, families, flatten, to_prometheus


def busy():
    """A pool that has seen something of everything."""
    pool = BlockPool(16, block_size=4)
    kept = Retention(pool)
    for i in range(8):
        tokens = np.repeat(np.arange(i, i + 3, dtype=np.int32), 4)
        outcome = pool.step(admissions=[Admission(tokens)])
        [(seq, _)] = outcome.admitted
        pool.commit(seq, 12, ids=tokens)
        if i == 7:
            kept.leave(seq, "tool", arrival=1, seconds=9)
        pool.free(seq)
    pool.step(admissions=[Admission(tokens)])
    assert not pool.step(grows=[(pool.open(), 400)]).fitted
    return pool


def test_text_is_what_prometheus_reads():
    parser = pytest.importorskip("prometheus_client.parser")
    pool = busy()
    stats = pool.stats()
    read = {f.name: f for f in parser.text_string_to_metric_families(to_prometheus(stats))}
    assert len(read) == len(FAMILIES)
    values = {
        (s.name, *s.labels.values()): s.value for family in read.values() for s in family.samples
    }
    assert values["pyruntime_kv_steps_total", "refused"] == 1
    assert values["pyruntime_kv_prompt_tokens_total", "found"] == stats["hit_tokens"] > 0
    assert values["pyruntime_kv_evicted_blocks_total", "capacity"] > 0
    assert values[("pyruntime_kv_pins",)] == 1
    blocks = [v for key, v in values.items() if key[0] == "pyruntime_kv_blocks"]
    assert sum(blocks) == 16 and len(blocks) == 4
    buckets = [v for key, v in values.items() if key[0] == "pyruntime_kv_step_seconds_bucket"]
    assert buckets == sorted(buckets) and len(buckets) == 20
    assert buckets[-1] == values[("pyruntime_kv_step_seconds_count",)] == sum(stats["step_us"])
    assert values[("pyruntime_kv_step_seconds_sum",)] == stats["step_ns"] / 1e9


def test_numbers_of_several_pools_add_up():
    flat = flatten(busy().stats())
    assert all(isinstance(value, int | float) for value in flat.values())
    both = {key: 2 * value for key, value in flat.items()}
    for (name, family, one), (_, _, two) in zip(families(flat), families(both), strict=True):
        assert all(len(labels) == len(family.labels) for labels, _ in one), name
        assert [2 * value for _, value in one] == [value for _, value in two]
    assert dict(families({})) == {}


def test_the_server_gives_them_away():
    pytest.importorskip("fastapi")
    from prometheus_client import generate_latest

    from pyruntime.engine.llm import make_loop
    from pyruntime.models import shipped
    from pyruntime.serve.metrics import ServerMetrics

    loop = make_loop(shipped())
    text = generate_latest(ServerMetrics(loop.snapshot).registry).decode()
    for name in ("kv_blocks{", "kv_steps_total{", "kv_step_seconds_bucket{", "kv_pins "):
        assert f"pyruntime_{name}" in text
