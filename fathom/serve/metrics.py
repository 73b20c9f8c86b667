"""What Prometheus reads from /metrics. Counts of the engine are taken when it asks; times are noted as they pass."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fathom.serve.worker import Job, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One server's counts."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(worker))
        self._answers = Counter(
            "fathom_requests", "Answered requests, by path and status", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "fathom_time_to_first_token_seconds",
            "From a request's arrival in the engine to its first token",
            registry=self._registry,
            buckets=_FIRST,
        )
        self._each = Histogram(
            "fathom_time_per_output_token_seconds",
            "Time per token after the first, one observation per request",
            registry=self._registry,
            buckets=_EACH,
        )

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self._answers.labels(path, str(status)).inc()

    def finished(self, job: Job) -> None:
        """Note the times of a request that is over."""
        if job.first_token is None:
            return
        self._first.observe(job.first_token - job.submitted)
        tokens = max(len(handle.token_ids) for handle in job.handles)
        if job.finished is not None and tokens > 1:
            self._each.observe((job.finished - job.first_token) / (tokens - 1))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        stats = self._worker.stats
        gauges = {
            "requests_running": (stats.running, "Requests that read their prompt or decode"),
            "requests_waiting": (stats.waiting, "Requests without pages"),
            "tokens_per_second": (self._worker.tokens_per_second(), "Generated, over the last seconds"),
            "cache_pages": (stats.pages, "Pages of the latent cache"),
            "cache_pages_used": (stats.pages_used, "Pages that requests hold"),
            "cache_pages_reusable": (stats.pages_reusable, "Pages kept in case their content is asked for again"),
            "cache_bytes": (stats.cache_bytes, "Allocated for the latent cache"),
        }
        for name, (value, help_) in gauges.items():
            yield GaugeMetricFamily(f"fathom_{name}", help_, value=value)
        counters = {
            "engine_steps": (stats.steps, "Steps of the engine"),
            "prompt_tokens": (stats.prompt_tokens, "Tokens of prompts read"),
            "cached_prompt_tokens": (stats.cached_prompt_tokens, "Tokens of prompts found in the cache"),
            "generated_tokens": (stats.generated_tokens, "Tokens generated"),
            "drafted_tokens": (stats.drafted, "Drafts put before the main model"),
            "accepted_tokens": (stats.accepted, "Drafts accepted"),
            "preemptions": (stats.preempted, "How often a request gave back its pages and waited"),
        }
        for name, (count, help_) in counters.items():
            yield CounterMetricFamily(f"fathom_{name}", help_, value=count)
        load = CounterMetricFamily("fathom_expert_tokens", "Tokens an expert served", labels=["layer", "expert"])
        for layer, row in enumerate(stats.tokens_per_expert_LE.tolist()):
            for expert, count in enumerate(row):
                load.add_metric([str(layer), str(expert)], count)
        yield load
