"""Metrics for Prometheus: GET /metrics, under vLLM's names where they mean the same.

Example: metrics = Metrics(lambda: [served]); metrics.count(job); body = metrics.render()
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanogpt.server.jobs import Job
from nanogpt.server.served import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
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


class Metrics:
    """All metrics of a server."""

    def __init__(self, loaded: Callable[[], Sequence[Served]]) -> None:
        """loaded: gives the models that are loaded."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(loaded))
        self.first, self.between, self.whole, self.inspected = (
            Histogram(name, meaning, ["model_name"], buckets=SECONDS, registry=self.registry)
            for name, meaning in (
                ("vllm:time_to_first_token_seconds", "Seconds from a request to its first token"),
                ("vllm:inter_token_latency_seconds", "Seconds from one token of a text to the next"),
                ("vllm:e2e_request_latency_seconds", "Seconds from a request to its end"),
                ("nanogpt:inspection_seconds", "Seconds from a request to inspect a text to its end"),
            )
        )
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
        first, between = self.first.labels(name), self.between.labels(name)
        self.whole.labels(name).observe(ended - started)
        for text in job.texts:
            if text.times:
                first.observe(text.times[0] - started)
            for earlier, later in zip(text.times, text.times[1:], strict=False):
                between.observe(later - earlier)
            if text.error or text.finish_reason is None:
                reason = "abort"
            else:
                reason = "length" if text.finish_reason == "length" else "stop"
            self.ended.labels(name, reason).inc()

    @contextmanager
    def inspection(self, served: Served) -> Generator[None]:
        """Count an inspection, which takes as long as this context."""
        name = served.name
        with self.inspecting.labels(name).track_inprogress(), self.inspected.labels(name).time():
            yield

    def render(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self.registry)
