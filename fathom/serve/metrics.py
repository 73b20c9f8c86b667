"""Prometheus metrics at /metrics. The engine's counts are read at each scrape; latencies are observed per request."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fathom.serve.engine_thread import EngineThread, Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One server's counts."""

    def __init__(self, engine_thread: EngineThread) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_thread))
        described = "Responses, by path and status"
        self.responses = Counter("fathom_requests", described, ["path", "status"], registry=self._registry)
        described = "From submission to the engine to the first token"
        name = "fathom_time_to_first_token_seconds"
        self._first = Histogram(name, described, registry=self._registry, buckets=_FIRST)
        described = "Mean time per token after the first, one observation per request"
        name = "fathom_time_per_output_token_seconds"
        self._each = Histogram(name, described, registry=self._registry, buckets=_EACH)

    def finished(self, job: Job) -> None:
        """Observe the latencies of a finished request."""
        if job.first_token is None:
            return
        self._first.observe(job.first_token - job.submitted)
        tokens = max(len(generation.token_ids) for generation in job.generations)
        if job.finished is not None and tokens > 1:
            self._each.observe((job.finished - job.first_token) / (tokens - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine_thread: EngineThread) -> None:
        self._engine_thread = engine_thread

    def collect(self) -> Iterator[Metric]:
        stats, rate = self._engine_thread.stats, self._engine_thread.tokens_per_second()
        gauges = {
            "requests_running": (stats.running, "Requests in prefill or decode"),
            "requests_waiting": (stats.waiting, "Requests in the queue"),
            "tokens_per_second": (rate, "Generation throughput over the last seconds"),
            "cache_pages": (stats.pages, "Pages of the latent cache"),
            "cache_pages_used": (stats.pages_used, "Pages held by requests"),
            "cache_pages_reusable": (stats.pages_reusable, "Evictable pages of the prefix cache"),
            "cache_bytes": (stats.cache_bytes, "Bytes allocated for the latent cache"),
        }
        for name, (value, help_) in gauges.items():
            yield GaugeMetricFamily(f"fathom_{name}", help_, value=value)
        counters = {
            "engine_steps": (stats.steps, "Steps of the engine"),
            "prompt_tokens": (stats.prompt_tokens, "Prompt tokens prefilled"),
            "cached_prompt_tokens": (stats.cached_prompt_tokens, "Prompt tokens found in the prefix cache"),
            "generated_tokens": (stats.generated_tokens, "Tokens generated"),
            "drafted_tokens": (stats.drafted, "Draft tokens proposed"),
            "accepted_tokens": (stats.accepted, "Draft tokens accepted"),
            "preemptions": (stats.preempted, "Requests that gave back their pages and returned to the queue"),
        }
        for name, (count, help_) in counters.items():
            yield CounterMetricFamily(f"fathom_{name}", help_, value=count)
        load = CounterMetricFamily("fathom_expert_tokens", "Tokens routed to an expert", labels=["layer", "expert"])
        for layer, row in enumerate(stats.tokens_per_expert_LE.tolist()):
            for expert, count in enumerate(row):
                load.add_metric([str(layer), str(expert)], count)
        yield load
