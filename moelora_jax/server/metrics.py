"""What ``/metrics`` tells Prometheus: the engine's counters, and the times that clients wait."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moelora_jax.engine.requests import EngineStats

#: Upper bounds in seconds: of a first token on a busy server, and of the next one of a fast engine.
_FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
    30.0, 60.0, 120.0,
)  # fmt: skip
_NEXT_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        stats: the engine's statistics, asked for when Prometheus asks.
        is_loaded: whether an adapter has a name.
        base_model: what the label ``adapter`` says of requests to the base model.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        is_loaded: Callable[[str], bool],
        base_model: str,
    ) -> None:
        self._is_loaded = is_loaded
        self._base_model = base_model
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, base_model))
        self._first_token = self._histogram(
            "time_to_first_token", "From the request's arrival to its first token.",
            _FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self._next_token = self._histogram(
            "inter_token_latency", "From one token of a completion to the next.",
            _NEXT_TOKEN_BUCKETS,
        )  # fmt: skip
        self._request = self._histogram(
            "request_duration", "From the request's arrival to its end.", _REQUEST_BUCKETS
        )
        self._responses = Counter(
            "moelora_http_responses_total",
            "Answered HTTP requests, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"moelora_{name}_seconds", text, ["adapter"], registry=self.registry, buckets=buckets
        )

    def _observe(self, histogram: Histogram, adapter: str | None, seconds: float) -> None:
        if adapter is None:
            histogram.labels(self._base_model).observe(seconds)
        elif self._is_loaded(adapter):  # Or one that was unloaded meanwhile would come back.
            histogram.labels(adapter).observe(seconds)

    def first_token(self, adapter: str | None, seconds: float) -> None:
        """A completion's first token came."""
        self._observe(self._first_token, adapter, seconds)

    def next_token(self, adapter: str | None, seconds: float) -> None:
        """Another token came, so long after the one before."""
        self._observe(self._next_token, adapter, seconds)

    def finished(self, adapter: str | None, seconds: float) -> None:
        """A completion ended, in whatever way."""
        self._observe(self._request, adapter, seconds)

    def responded(self, path: str, status: int) -> None:
        """A response began; ``path`` is that of a route, not what a client made up."""
        self._responses.labels(path, str(status)).inc()

    def forget(self, adapter: str) -> None:
        """Drop the histograms of an adapter that was unloaded, so that names do not pile up."""
        for histogram in (self._first_token, self._next_token, self._request):
            histogram.remove_by_labels({"adapter": adapter})


class _EngineCollector(Collector):
    """The engine's statistics as metrics."""

    def __init__(self, stats: Callable[[], EngineStats], base_model: str) -> None:
        self._stats = stats
        self._base_model = base_model

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("requests_waiting", "Requests in the queue.", stats.waiting),
            ("requests_running", "Requests that hold cache blocks.", stats.running),
            ("kv_blocks_used", "Cache blocks in use.", stats.kv_blocks_used),
            ("kv_blocks", "Cache blocks that there are.", stats.kv_blocks_total),
            (
                "adapter_host_bytes",
                "Host memory that loaded adapters take.",
                stats.adapter_host_bytes,
            ),
        ):
            yield GaugeMetricFamily(f"moelora_{name}", text, value=value)
        for name, text, value in (
            ("requests_submitted", "Requests that the engine accepted.", stats.submitted),
            ("prompt_tokens", "Prompt tokens of accepted requests.", stats.prompt_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            ("preemptions", "Requests that gave up their cache blocks.", stats.preemptions),
            ("prefix_hit_tokens", "Prompt tokens found in the cache.", stats.prefix_hits),
            ("compilations", "Programs compiled since the start.", stats.compilations),
            ("address_changes", "Buffers moved since the start.", stats.address_changes),
            (
                "unplanned_reads",
                "Reads from the device besides what was asked for.",
                stats.unplanned_reads,
            ),
            ("adapter_loads", "Adapters loaded, reloads included.", stats.adapter_loads),
            ("adapter_writes", "Adapters written to the device.", stats.adapter_writes),
            (
                "adapter_evictions",
                "Adapters moved off the device to make room.",
                stats.adapter_evictions,
            ),
        ):
            yield CounterMetricFamily(f"moelora_{name}", text, value=value)
        yield _counters("requests_finished", "Requests ended, by reason.", "reason", stats.finished)
        yield _counters("steps", "Programs run, by kind.", "kind", stats.steps)
        traffic = {
            self._base_model if name is None else name: counters
            for name, counters in stats.by_adapter.items()
        }
        for field, text in (
            ("requests", "Accepted requests, by adapter."),
            ("prompt_tokens", "Prompt tokens of accepted requests, by adapter."),
            ("generated_tokens", "Tokens generated, by adapter."),
        ):
            yield _counters(
                f"adapter_{field}",
                text,
                "adapter",
                {name: getattr(counters, field) for name, counters in traffic.items()},
            )
        for state, values in (
            ("used", [pool.used_bytes for pool in stats.pools]),
            ("free", [pool.total_bytes - pool.used_bytes for pool in stats.pools]),
        ):
            pools = GaugeMetricFamily(
                f"moelora_pool_{state}_bytes",
                f"Bytes of adapter pages that are {state}, by the pages' width.",
                labels=["width"],
            )
            for pool, value in zip(stats.pools, values, strict=True):
                pools.add_metric([str(pool.width)], value)
            yield pools


def _counters(name: str, text: str, label: str, values: object) -> CounterMetricFamily:
    family = CounterMetricFamily(f"moelora_{name}", text, labels=[label])
    assert isinstance(values, dict)
    for key, value in values.items():
        family.add_metric([key], value)
    return family
