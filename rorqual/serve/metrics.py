"""Counts what a server does, in the format of Prometheus.

rorqual_requests_total{route, status}       rorqual_finished_total{reason}
rorqual_prompt_tokens_total                 rorqual_generated_tokens_total
rorqual_time_to_first_token_seconds         rorqual_inter_token_latency_seconds
rorqual_request_seconds                     rorqual_requests_running, _waiting
rorqual_cache_usage_ratio                   rorqual_prefix_hit_rate
rorqual_cache_pages, _capacity_pages        rorqual_cache_allocated_bytes
rorqual_preemptions_total                   rorqual_table_hit_rate{table}
rorqual_drafts_total                        rorqual_drafts_accepted_total
rorqual_draft_acceptance_rate
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rorqual.serve.engine import Stats
from rorqual.serve.prefixes import PAGE

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(
        self,
        stats: Callable[[], Stats],
        tables: Callable[[], Sequence[dict[str, Any]]],
    ) -> None:
        """Registers all metrics; `stats` and `tables` are called each time that they are read."""
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "rorqual"}
        self.requests = Counter(
            "requests", "Requests, by route and status", ["route", "status"], **options
        )
        self.finished = Counter("finished", "Texts, by why they ended", ["reason"], **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **options)
        self.generated_tokens = Counter("generated_tokens", "New tokens", **options)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the queue to the first token",
            buckets=FIRST,
            **options,
        )
        self.between_tokens = Histogram(
            "inter_token_latency_seconds",
            "Between two tokens of a text",
            buckets=BETWEEN,
            **options,
        )
        self.whole_request = Histogram(
            "request_seconds", "From the queue to the last token", buckets=WHOLE, **options
        )
        self.registry.register(_Load(stats, tables))

    def text(self) -> bytes:
        """Returns all values in the text format."""
        return generate_latest(self.registry)


class _Load(Collector):
    """Reads what is true at the moment: the load of the engine, and of the tables."""

    def __init__(
        self, stats: Callable[[], Stats], tables: Callable[[], Sequence[dict[str, Any]]]
    ) -> None:
        self._stats = stats
        self._tables = tables

    def collect(self) -> Iterator[Metric]:
        """Yields the gauges and counters, read from the engine and the tables at this moment."""
        stats = self._stats()
        for name, what, value in (
            ("requests_running", "Requests that run", stats.running),
            ("requests_waiting", "Requests in the queue", stats.waiting),
            ("cached_tokens", "Tokens of the requests that run", stats.cached_tokens),
            (
                "cache_usage_ratio",
                "Tokens of the requests that run, of those that there is space for",
                stats.cached_tokens / stats.capacity,
            ),
            ("cache_pages", "Pages of the requests that run", stats.pages),
            (
                "cache_capacity_pages",
                "Pages that requests may have in all",
                stats.capacity // PAGE,
            ),
            (
                "cache_allocated_bytes",
                "Memory of all caches; pages that are not counted yet take some, too",
                stats.allocated_bytes,
            ),
            (
                "prefix_hit_rate",
                "Tokens of prompts that did not have to be read again, of all",
                stats.prefix_tokens / max(1, stats.prompt_tokens),
            ),
            (
                "draft_acceptance_rate",
                "Drafts that were accepted, of all",
                stats.accepted / max(1, stats.drafted),
            ),
        ):
            yield GaugeMetricFamily(f"rorqual_{name}", what, value=value)
        for name, what, count in (
            ("preemptions", "How often a request was sent back to the queue", stats.preemptions),
            ("drafts", "Drafts that were verified", stats.drafted),
            ("drafts_accepted", "Drafts that were accepted", stats.accepted),
        ):
            yield CounterMetricFamily(f"rorqual_{name}", what, value=count)
        rates = GaugeMetricFamily(
            "rorqual_table_hit_rate",
            "Rows of a table that were in memory, of those that were read",
            labels=["table"],
        )
        for number, counts in enumerate(self._tables()):
            rates.add_metric([str(number)], counts.get("hit_rate", 0.0))
        yield rates
