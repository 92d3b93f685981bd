"""Latencies and counters of the server, for Prometheus and the status page."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pyruntime.kv.metrics import Family, families

__all__ = ["ServerMetrics"]

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class ServerMetrics:
    """Metrics of one server.

    Parameters
    ----------
    stats : callable
        Returns the engine's snapshot.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self._ttft = _Latency("pyruntime_serve_ttft_seconds", "Time to first token", 2048)
        self._tbt = _Latency("pyruntime_serve_tbt_seconds", "Time between tokens", 8192)
        self.registry.register(self._ttft)
        self.registry.register(self._tbt)
        self.requests = Counter(
            "pyruntime_serve_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(stats))
        #: Notes the time to a request's first token, in seconds.
        self.first_token = self._ttft.observe
        #: Notes the time since a request's token before, in seconds.
        self.next_token = self._tbt.observe

    def percentiles(self) -> dict[str, list[float] | None]:
        """Return p50, p90 and p99 of the latest requests and tokens, in seconds."""
        return {
            name: np.percentile(values, [50, 90, 99]).tolist() if values else None
            for name, values in (
                ("ttft_s", list(self._ttft.recent)),
                ("tbt_s", list(self._tbt.recent)),
            )
        }


class _Latency(Collector):
    """A histogram that the event loop alone writes.

    One of prometheus_client takes a lock for each of two values, which was a twentieth of the
    server's time per token.
    """

    def __init__(self, name: str, text: str, keep: int) -> None:
        self._name = name
        self._text = text
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self.recent: deque[float] = deque(maxlen=keep)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds
        self.recent.append(seconds)

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram."""
        bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)


class _EngineCollector(Collector):
    GAUGES = (
        ("running", "Requests that compute"),
        ("waiting", "Requests in the queue"),
        ("kv_blocks", "KV blocks"),
        ("kv_free_blocks", "Free KV blocks"),
        ("hidden_bytes", "Hidden states kept between layer slices"),
    )
    WORKERS = (
        ("alive", "Whether the engine process runs"),
        ("active", "Requests that have not ended"),
        ("routed", "Requests sent there"),
        ("hit_blocks", "Blocks that requests were sent there for"),
        ("restarts", "Times it was started anew"),
    )
    COUNTERS = (
        ("steps", "Steps"),
        ("step_errors", "Steps that failed"),
        ("preemptions", "Requests preempted"),
        ("swaps", "Requests swapped out"),
        ("prompt_tokens", "Prompt tokens accepted"),
        ("cached_tokens", "Prompt tokens found in KV memory"),
        ("generated_tokens", "Tokens generated"),
        ("expert_bytes", "Weight bytes of the experts used"),
        ("degraded_tokens", "Tokens computed at a lower width because of damaged experts"),
    )

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Yield the engine's metrics."""
        stats = self._stats()
        for name, text in self.GAUGES:
            yield GaugeMetricFamily(f"pyruntime_engine_{name}", text, stats[name])
        for name, text in self.COUNTERS:
            yield CounterMetricFamily(f"pyruntime_engine_{name}", text, stats[name])
        for name, label in (("seconds", "stage"), ("finished", "reason"), ("waits", "reason")):
            family = CounterMetricFamily(
                f"pyruntime_engine_{name}", f"Engine {name} by {label}", labels=[label]
            )
            for key, value in stats[name].items():
                family.add_metric([key], value)
            yield family

        for name, value in stats["expert_memory"].items():
            yield GaugeMetricFamily(
                f"pyruntime_engine_experts_{name}", f"Expert backend: {name}", value
            )

        for name, about, values in families(stats["kv"]):
            yield _kv_family(f"pyruntime_kv_{name}", about, values)

        workers = stats.get("workers", ())
        for name, text in self.WORKERS if workers else ():
            gauge = GaugeMetricFamily(f"pyruntime_serve_worker_{name}", text, labels=["worker"])
            for index, worker in enumerate(workers):
                gauge.add_metric([str(index)], worker[name])
            yield gauge

    def describe(self) -> Iterable[Metric]:
        """Nothing is described beforehand: the names are fixed and ours."""
        return []


def _kv_family(name: str, family: Family, values: list[tuple[tuple[str, ...], float]]) -> Metric:
    if family.kind == "histogram":
        buckets = [(labels[0], value) for labels, value in values if labels != ("sum",)]
        total = next(value for labels, value in values if labels == ("sum",))
        return HistogramMetricFamily(name, family.text, buckets=buckets, sum_value=total)
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.text, labels=family.labels)
    for labels, value in values:
        metric.add_metric(labels, value)
    return metric
