"""What a process tells Prometheus. One object per process, with a registry of its own and one HTTP port.

Labels are closed sets (roles, states, outcomes, error reasons), never ids. Recorded on the event loop; the scrape runs on the
HTTP server's thread and only reads.
"""

from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.errors import BatonError, UnavailableError
from baton.lifecycle import Event, Timeline
from baton.types import Role, WorkerLoad

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Histogram buckets: down to what a tiny model on one machine needs."""

ERROR_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Histogram buckets, in both directions."""

CLOSE_S = 0.02
"""How often the HTTP thread looks whether it is to end."""

OK = "ok"
"""The outcome, and the failure reason, of what did not fail."""


def outcome_of(error: BatonError | None) -> str:
    """A label value."""
    return OK if error is None else error.reason.lower()


def _priority_class(priority: int) -> str:
    """A label value."""
    return "normal" if priority == 0 else "high" if priority > 0 else "low"


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A slow scraper does not hold up another."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    """Writes no access log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Nothing."""


class MetricsServer:
    """Serves one registry at /metrics on a port of its own, from a thread of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._http: _HttpServer | None = None

    def serve(self, host: str, port: int) -> int:
        """Returns the bound port. Raises `UnavailableError` where it cannot be bound."""
        app = make_wsgi_app(self.registry)
        try:
            self._http = make_server(host, port, app, _HttpServer, _QuietHandler)
        except OSError as error:
            raise UnavailableError(f"cannot serve metrics on {host}:{port}: {error}") from error
        self._thread = Thread(
            target=self._http.serve_forever, args=(CLOSE_S,), name="metrics", daemon=True
        )
        self._thread.start()
        return self._http.server_port

    def close(self) -> None:
        """Blocks for `CLOSE_S` at most. Idempotent."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = None


class RouterMetrics(MetricsServer):
    """The router's view: whole requests, attempts, the fleet."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self._requests = Counter(
            "baton_requests_total", "Requests by outcome.", ["outcome"], registry=registry
        )
        self._tokens = {
            kind: Counter(f"baton_{kind}_tokens_total", text, registry=registry)
            for kind, text in {
                "prompt": "Prompt tokens of requests that finished.",
                "cached": "Prompt tokens whose KV came from a prefix cache.",
                "completion": "Generated tokens.",
            }.items()
        }
        self._stages = {
            stage: Histogram(f"baton_{stage}_seconds", text, buckets=SECONDS, registry=registry)
            for stage, text in {
                "queue": "From receipt to placement on workers.",
                "time_to_first_token": "From receipt to the first token.",
                "inter_token_latency": "Between consecutive messages with tokens.",
                "time_per_output_token": "Mean after the first token, of each request.",
                "request": "From receipt to the end, of requests that finished.",
                "prefill": "Computing a prompt, by the prefill worker's clock.",
                "handoff": "From the end of prefill to the KV in decode's pool.",
            }.items()
        }
        self._handoff_bytes = Counter(
            "baton_handoff_bytes_total",
            "KV bytes handed from prefill to decode.",
            registry=registry,
        )
        self._attempts = Counter(
            "baton_attempts_total",
            "Tries at a request on one pair of workers.",
            ["outcome", "reason"],
            registry=registry,
        )
        self.running = Gauge("baton_running_requests", "Requests being served.", registry=registry)
        self._queued = Gauge(
            "baton_queued_requests",
            "Requests that wait for their turn.",
            ["priority"],
            registry=registry,
        )
        self._queue_wait_s = Histogram(
            "baton_queue_wait_seconds",
            "From arrival to their turn, of requests that had to wait.",
            ["priority"],
            buckets=SECONDS,
            registry=registry,
        )
        self._rejections = Counter(
            "baton_rejected_requests_total",
            "Requests that admission refused before any work.",
            ["reason"],
            registry=registry,
        )
        self._ttft_error_s = Histogram(
            "baton_ttft_prediction_error_seconds",
            "By how much the first token came later than placement predicted; negative is sooner.",
            buckets=[-s for s in reversed(ERROR_SECONDS)] + [0.0, *ERROR_SECONDS],
            registry=registry,
        )
        self._workers = Gauge(
            "baton_workers", "Members of the fleet.", ["role", "state"], registry=registry
        )
        self._role_changes = Counter(
            "baton_role_changes_total",
            "Workers that turned to a role.",
            ["role"],
            registry=registry,
        )

    def record_request(
        self,
        timeline: Timeline,
        error: BatonError | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
    ) -> None:
        """Counts a request at its end, and times its stages by its lifecycle events."""
        self._requests.labels(outcome_of(error)).inc()
        self._tokens["completion"].inc(completion_tokens)
        self._observe("queue", timeline.at_s(Event.PLACED))
        self._observe("time_to_first_token", timeline.at_s(Event.FIRST_TOKEN))
        if error is not None:
            return
        self._tokens["prompt"].inc(prompt_tokens)
        self._tokens["cached"].inc(cached_tokens)
        self._observe("request", timeline.at_s(Event.FINISHED))
        generating_s = timeline.between_s(Event.FIRST_TOKEN, Event.LAST_TOKEN)
        if generating_s is not None and completion_tokens > 1:
            self._observe("time_per_output_token", generating_s / (completion_tokens - 1))

    def record_token_gap(self, seconds: float) -> None:
        """Time since the message with tokens before this one."""
        self._observe("inter_token_latency", seconds)

    def record_prefill(self, seconds: float) -> None:
        self._observe("prefill", seconds)

    def record_handoff(self, seconds: float, num_bytes: int) -> None:
        self._observe("handoff", seconds)
        self._handoff_bytes.inc(num_bytes)

    def record_attempt(self, error: BatonError | None) -> None:
        """Counts an attempt at its end."""
        self._attempts.labels(OK if error is None else "failed", outcome_of(error)).inc()

    def record_role_change(self, role: Role) -> None:
        """A worker turned to a role."""
        self._role_changes.labels(role.value).inc()

    def queued(self, priority: int) -> Gauge:
        """Of the requests of that priority's class that wait."""
        return self._queued.labels(_priority_class(priority))

    def record_queue_wait(self, priority: int, seconds: float) -> None:
        """A request that had to wait got its turn."""
        self._queue_wait_s.labels(_priority_class(priority)).observe(seconds)

    def record_rejection(self, reason: str) -> None:
        """`reason` is one of a closed set."""
        self._rejections.labels(reason).inc()

    def record_ttft_error(self, seconds: float) -> None:
        """Actual less predicted, from placement to the first token."""
        self._ttft_error_s.observe(seconds)

    def set_workers(self, counts: dict[tuple[Role, str], int]) -> None:
        """The fleet's size by role and state; a pair that is absent counts nobody."""
        self._workers.clear()
        for (role, state), count in counts.items():
            self._workers.labels(role.value, state).set(count)

    def _observe(self, stage: str, seconds: float | None) -> None:
        if seconds is not None:
            self._stages[stage].observe(seconds)


class WorkerMetrics(MetricsServer):
    """One worker's view: its engine, its pool, its handoffs. Every series carries the role."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.role = role
        """What the worker does now; later values count for it."""
        self._requests = self._counter("requests", "Calls by outcome.", "outcome")
        self._failures = self._counter("handoff_failures", "Handoffs that failed.", "reason")
        self._handoff_bytes = self._counter("handoff_bytes", "KV bytes handed over.")
        self._prefill_tokens = self._counter("prefill_tokens", "Prompt tokens computed.")
        self._decode_tokens = self._counter("decode_tokens", "Tokens generated after the prompt.")
        self._hit_tokens = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self._preemptions = self._counter(
            "preemptions", "Times a request lost its blocks and was recomputed."
        )
        self._orphaned_blocks = 0
        self._queue_s = self._histogram("queue_seconds", "From arrival to the first step.")
        self._prefill_s = self._histogram("prefill_seconds", "Computing a prompt.")
        self._handoff_s = self._histogram(
            "handoff_seconds", "From the end of prefill until decode has taken the KV."
        )

    def watch(self, load: Callable[[], WorkerLoad], stalled_s: Callable[[], float]) -> None:
        """Exports the engine's load at every scrape. Both are called on the scrape's thread."""
        self.registry.register(
            _LoadCollector(lambda: self.role, load, stalled_s, lambda: self._orphaned_blocks)
        )

    def record_call(self, outcome: str) -> None:
        self._requests.labels(self.role.value, outcome).inc()

    def set_orphaned_blocks(self, count: int) -> None:
        """Blocks that were just found to be held and to belong to no call."""
        self._orphaned_blocks = count

    def record_queue(self, seconds: float, *, hit_tokens: int) -> None:
        """A request got its blocks."""
        self._queue_s.labels(self.role.value).observe(seconds)
        self._hit_tokens.labels(self.role.value).inc(hit_tokens)

    def record_prefill(self, seconds: float, *, computed_tokens: int) -> None:
        self._prefill_s.labels(self.role.value).observe(seconds)
        self._prefill_tokens.labels(self.role.value).inc(computed_tokens)

    def record_decode_tokens(self, count: int) -> None:
        self._decode_tokens.labels(self.role.value).inc(count)

    def record_preemption(self) -> None:
        self._preemptions.labels(self.role.value).inc()

    def record_handoff(self, seconds: float, num_bytes: int) -> None:
        self._handoff_s.labels(self.role.value).observe(seconds)
        self._handoff_bytes.labels(self.role.value).inc(num_bytes)

    def record_handoff_failure(self, reason: str) -> None:
        """`reason` is a `BatonError.reason`."""
        self._failures.labels(self.role.value, reason.lower()).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = f"baton_worker_{name}_total"
        return Counter(full, text, ["role", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        full = f"baton_worker_{name}"
        return Histogram(full, text, ["role"], buckets=SECONDS, registry=self.registry)


class _LoadCollector(Collector):
    """Gauges from one snapshot a scrape, so that the block counts add up."""

    def __init__(
        self,
        role: Callable[[], Role],
        load: Callable[[], WorkerLoad],
        stalled_s: Callable[[], float],
        orphaned_blocks: Callable[[], int],
    ) -> None:
        self._role = role
        self._load = load
        self._stalled_s = stalled_s
        self._orphaned_blocks = orphaned_blocks

    def collect(self) -> Iterator[Metric]:
        load, role = self._load(), self._role().value
        blocks = GaugeMetricFamily(
            "baton_worker_kv_blocks", "Blocks of the KV pool by state.", labels=["role", "state"]
        )
        for state, count in (
            ("free", load.free_blocks),
            ("cached", load.cached_blocks),
            ("reserved", load.reserved_blocks),
            ("used", load.used_blocks),
            ("in_flight", load.in_flight_blocks),
        ):
            blocks.add_metric([role, state], count)
        yield blocks
        for name, text, value in (
            ("running_requests", "Requests that hold blocks.", load.running_requests),
            ("waiting_requests", "Requests that wait for blocks.", load.waiting_requests),
            (
                "queued_prefill_tokens",
                "Tokens whose KV is not yet computed.",
                load.queued_prefill_tokens,
            ),
            (
                "orphaned_kv_blocks",
                "Blocks that are held and belong to no call: 0, or there is a leak.",
                self._orphaned_blocks(),
            ),
            ("engine_stalled_seconds", "How long the current step runs.", self._stalled_s()),
        ):
            gauge = GaugeMetricFamily(f"baton_worker_{name}", text, labels=["role"])
            gauge.add_metric([role], value)
            yield gauge
