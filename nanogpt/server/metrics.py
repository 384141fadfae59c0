"""Metrics for Prometheus: GET /metrics, under vLLM's names where they mean the same.

Example: metrics = Metrics(lambda: [served]); metrics.count(job); body = metrics.render()
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nanogpt.server.jobs import Job
from nanogpt.server.served import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Bounds of the histograms' buckets."""


class EngineCollector(Collector):
    """The numbers of the engines, read when they are asked for."""

    def __init__(self, loaded: Callable[[], Sequence[Served]]) -> None:
        self.loaded = loaded

    def collect(self) -> Iterator[Metric]:
        """The metrics, each with a value for every model."""
        models = [(served.name, numbers_of(served)) for served in self.loaded()]
        for name, (kind, meaning) in ENGINE_METRICS.items():
            family = kind(f"vllm:{name}", meaning, labels=["model_name"])
            for model, numbers in models:
                family.add_metric([model], numbers[name])
            yield family


ENGINE_METRICS = {
    "num_requests_running": (GaugeMetricFamily, "Texts that are being made"),
    "num_requests_waiting": (GaugeMetricFamily, "Texts that wait for a row of the KV cache"),
    "kv_cache_usage_perc": (GaugeMetricFamily, "Share of the KV cache that is in use, 1 being all"),
    "prompt_tokens": (CounterMetricFamily, "Tokens of prompts"),
    "generation_tokens": (CounterMetricFamily, "New tokens"),
    "prefix_cache_queries": (CounterMetricFamily, "Prompt tokens that were looked for in the cache"),
    "prefix_cache_hits": (CounterMetricFamily, "Prompt tokens that were copied within the cache"),
}
"""Name -> kind, and meaning."""


def numbers_of(served: Served) -> dict[str, float]:
    """The values of ENGINE_METRICS for a model."""
    scheduler, waiting = served.engine.scheduler, len(served.engine.waiting)
    counts = scheduler.counts
    usage = sum(len(row.text) for row in scheduler.rows) / (len(scheduler.contents) * served.context)
    return {
        "num_requests_running": len(scheduler.rows),
        "num_requests_waiting": waiting,
        "kv_cache_usage_perc": min(1.0, usage),
        "prompt_tokens": counts.prompt_tokens,
        "generation_tokens": counts.new_tokens,
        "prefix_cache_queries": counts.prompt_tokens,
        "prefix_cache_hits": counts.reused_tokens,
    }


class Seconds(Collector):
    """A histogram of seconds for each model, which takes many at a time: a text has thousands."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning
        self.counts: dict[str, NDArray[np.int64]] = {}
        """For each model, how many fell into each bucket, the last one being without a bound."""
        self.sums: dict[str, float] = {}

    def observe(self, model: str, seconds: ArrayLike) -> None:
        """Count some."""
        found = np.bincount(np.searchsorted(BUCKETS, seconds), minlength=len(BUCKETS) + 1)
        self.counts[model] = found + self.counts.get(model, np.zeros_like(found))
        self.sums[model] = self.sums.get(model, 0.0) + float(np.sum(seconds))

    def collect(self) -> Iterator[Metric]:
        """The histogram. In Prometheus' format each bucket has what the smaller ones have too."""
        family = HistogramMetricFamily(self.name, self.meaning, labels=["model_name"])
        bounds = [*map(str, map(float, BUCKETS)), "+Inf"]
        for model, counts in self.counts.items():
            totals = cast(list[float], np.cumsum(counts).tolist())
            family.add_metric([model], list(zip(bounds, totals, strict=True)), self.sums[model])
        yield family


class Metrics:
    """All metrics of a server."""

    def __init__(self, loaded: Callable[[], Sequence[Served]]) -> None:
        """loaded: gives the models that are loaded."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(loaded))
        self.first, self.between, self.whole, self.inspected = (
            Seconds(name, meaning)
            for name, meaning in (
                ("vllm:time_to_first_token_seconds", "Seconds from a request to its first token"),
                ("vllm:inter_token_latency_seconds", "Seconds from one token of a text to the next"),
                ("vllm:e2e_request_latency_seconds", "Seconds from a request to its end"),
                ("nanogpt:inspection_seconds", "Seconds from a request to inspect a text to its end"),
            )
        )
        for histogram in (self.first, self.between, self.whole, self.inspected):
            self.registry.register(histogram)
        self.inspecting = Gauge(
            "nanogpt:num_inspections_running",
            "Inspections of texts that are made or wait",
            ["model_name"],
            registry=self.registry,
        )
        self.ended = Counter(
            "vllm:request_success",
            "Texts that ended, by why",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )

    def count(self, job: Job, started: float, ended: float) -> None:
        """Count a request that has ended. started, ended: values of time.perf_counter()."""
        name = job.served.name
        self.whole.observe(name, [ended - started])
        for text in job.texts:
            self.first.observe(name, [heard - started for heard in text.times[:1]])
            self.between.observe(name, np.diff(text.times))
            if text.error or text.finish_reason is None:
                reason = "abort"
            else:
                reason = "length" if text.finish_reason == "length" else "stop"
            self.ended.labels(name, reason).inc()

    @contextmanager
    def inspection(self, served: Served) -> Generator[None]:
        """Count an inspection, which takes as long as this context."""
        started = time.perf_counter()
        try:
            with self.inspecting.labels(served.name).track_inprogress():
                yield
        finally:
            self.inspected.observe(served.name, [time.perf_counter() - started])

    def render(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self.registry)
