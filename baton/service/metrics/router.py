"""The router's series: whole requests, their attempts, the fleet. Recorded on the event loop."""

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from baton.errors import BatonError
from baton.lifecycle import REQUEST_STAGES, STAGES, Event, Timeline
from baton.service.metrics.exposition import MetricsServer
from baton.service.metrics.objectives import NO_OBJECTIVES, Objectives, attainment
from baton.service.metrics.series import (
    DECISION_SECONDS,
    ERROR_SECONDS,
    OK,
    SECONDS,
    Children,
    outcome_of,
    priority_class,
)
from baton.types import Role

REJECTIONS = ("queue_full", "ttft", "token_rate", "draining", "duplicate")
"""Why a request is refused before any work."""
RECOVERIES = ("failure", "drain")
"""Why an attempt is followed by another."""
WORKER_STATES = ("ready", "draining")


class RouterMetrics(MetricsServer):
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._make_request_series()
        self._make_attempt_series()
        self._make_fleet_series()

    def _make_request_series(self) -> None:
        self._requests = self._labelled("requests", "Requests by outcome.", "outcome")
        self._requests(OK)
        self._tokens = {
            kind: Counter(f"baton_{kind}_tokens_total", text, registry=self.registry)
            for kind, text in {
                "prompt": "Prompt tokens of requests that finished.",
                "cached": "Prompt tokens whose KV came from a prefix cache.",
                "completion": "Generated tokens.",
            }.items()
        }
        self._times = {
            name: Histogram(f"baton_{name}_seconds", text, buckets=SECONDS, registry=self.registry)
            for name, text in {
                "time_to_first_token": "From receipt to the first token.",
                "inter_token_latency": "Between consecutive messages with tokens.",
                "time_per_output_token": "Mean after the first token, of each request.",
                "request": "From receipt to the end, of requests that finished.",
                "handoff": "From the end of prefill to the KV in decode's pool, by their clocks.",
            }.items()
        }
        self._stages = Children(
            Histogram(
                "baton_stage_seconds",
                "What requests spent in each stage, by their lifecycle events.",
                ["stage"],
                buckets=SECONDS,
                registry=self.registry,
            )
        )
        for stage in STAGES:
            self._stages(stage)
        self._slo = self._labelled(
            "slo_requests", "Requests that met or missed an objective.", "objective", "outcome"
        )
        self._good_requests = Counter(
            "baton_goodput_requests_total",
            "Requests that finished and met every objective that they have.",
            registry=self.registry,
        )
        self._good_tokens = Counter(
            "baton_goodput_tokens_total", "The tokens that they generated.", registry=self.registry
        )
        self.running = Gauge(
            "baton_running_requests", "Requests being served.", registry=self.registry
        )
        self._queued = Children(
            Gauge(
                "baton_queued_requests",
                "Requests that wait for their turn.",
                ["priority"],
                registry=self.registry,
            )
        )
        self._queued(priority_class(0))
        self._queue_wait_s = Children(
            Histogram(
                "baton_queue_wait_seconds",
                "From arrival to their turn, of requests that had to wait.",
                ["priority"],
                buckets=SECONDS,
                registry=self.registry,
            )
        )
        self._queue_wait_s(priority_class(0))
        self._rejections = self._labelled(
            "rejected_requests", "Requests that were refused before any work.", "reason"
        )
        for reason in REJECTIONS:
            self._rejections(reason)
        self._refused_calls = self._labelled(
            "refused_calls", "Calls that were refused for who made them.", "reason"
        )
        self._refused_calls("unauthenticated")

    def _make_attempt_series(self) -> None:
        self._attempts = self._labelled(
            "attempts",
            "Tries at a request on one pair of workers, and the stage that they ended in.",
            "outcome",
            "reason",
            "stage",
        )
        self._handoff_bytes = Counter(
            "baton_handoff_bytes_total",
            "KV bytes handed from prefill to decode.",
            registry=self.registry,
        )
        self._recovery_s = Children(
            Histogram(
                "baton_recovery_seconds",
                "From an attempt's failure to the next new token.",
                ["cause"],
                buckets=SECONDS,
                registry=self.registry,
            )
        )
        for cause in RECOVERIES:
            self._recovery_s(cause)

    def _make_fleet_series(self) -> None:
        self._placement_s = Histogram(
            "baton_placement_seconds",
            "Choosing workers for an attempt: the decision alone.",
            buckets=DECISION_SECONDS,
            registry=self.registry,
        )
        self._ttft_error_s = Histogram(
            "baton_ttft_prediction_error_seconds",
            "By how much the first token came later than placement predicted; negative is sooner.",
            buckets=[-s for s in reversed(ERROR_SECONDS)] + [0.0, *ERROR_SECONDS],
            registry=self.registry,
        )
        self._workers = Children(
            Gauge(
                "baton_workers",
                "Members of the fleet.",
                ["role", "state"],
                registry=self.registry,
            )
        )
        self.set_workers({})
        self._role_changes = self._labelled(
            "role_changes", "Workers that turned to a role.", "role"
        )
        self._autoscaler = self._labelled(
            "autoscaler_changes", "Changes of role that the autoscaler began.", "role", "outcome"
        )
        for role in Role:
            self._role_changes(role.value)
            self._autoscaler(role.value, OK)

    def record_request(
        self,
        timeline: Timeline,
        error: BatonError | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        longest_tokens: int,
        objectives: Objectives = NO_OBJECTIVES,
        goes_on: bool = False,
    ) -> None:
        """Counts a request at its end, and times its stages by its lifecycle events. `longest_tokens` are those of its longest completion;
        `completion_tokens` those of all that are new. Where it `goes_on` with an answer, the first token was another's.
        """
        self._requests(outcome_of(error)).inc()
        self._tokens["completion"].inc(completion_tokens)
        self.record_stages(timeline.durations(REQUEST_STAGES))
        ttft_s = None if goes_on else timeline.at_s(Event.FIRST_TOKEN)
        tpot_s = None
        generating_s = timeline.between_s(Event.FIRST_TOKEN, Event.LAST_TOKEN)
        if generating_s is not None and longest_tokens > 1 and not goes_on:
            tpot_s = generating_s / (longest_tokens - 1)
        self._observe("time_to_first_token", ttft_s)
        kept = attainment(objectives, error, ttft_s=ttft_s, tpot_s=tpot_s)
        for objective, met in (("ttft", kept.ttft), ("tpot", kept.tpot)):
            if met is not None:
                self._slo(objective, "met" if met else "missed").inc()
        if kept.good:
            self._good_requests.inc()
            self._good_tokens.inc(completion_tokens)
        if error is not None:
            return
        self._tokens["prompt"].inc(prompt_tokens)
        self._tokens["cached"].inc(cached_tokens)
        self._observe("request", timeline.at_s(Event.FINISHED))
        self._observe("time_per_output_token", tpot_s)

    def record_stages(self, durations: Iterable[tuple[str, float]]) -> None:
        """Seconds by the names of `baton.lifecycle`'s stages."""
        for stage, seconds in durations:
            self._stages(stage).observe(seconds)

    def record_token_gap(self, seconds: float) -> None:
        """Time since the message with tokens before this one."""
        self._observe("inter_token_latency", seconds)

    def record_handoff(self, seconds: float, num_bytes: int) -> None:
        self._observe("handoff", seconds)
        self._handoff_bytes.inc(num_bytes)

    def record_attempt(self, error: BatonError | None, stage: str) -> None:
        """Counts an attempt at its end; `stage` is what it was waiting for then, one of a closed set."""
        self._attempts(OK if error is None else "failed", outcome_of(error), stage).inc()

    def record_recovery(self, cause: str, seconds: float) -> None:
        """`cause` is one of `RECOVERIES`."""
        self._recovery_s(cause).observe(seconds)

    def record_role_change(self, role: Role) -> None:
        """A worker turned to a role."""
        self._role_changes(role.value).inc()

    def record_autoscaling(self, role: Role, error: BatonError | None) -> None:
        """The autoscaler told a worker to turn to a role, which it did or did not."""
        self._autoscaler(role.value, outcome_of(error)).inc()

    def queued(self, priority: int) -> Gauge:
        """Of the requests of that priority's class that wait."""
        return self._queued(priority_class(priority))

    def record_queue_wait(self, priority: int, seconds: float) -> None:
        """A request that had to wait got its turn."""
        self._queue_wait_s(priority_class(priority)).observe(seconds)

    def record_rejection(self, reason: str) -> None:
        """`reason` is one of `REJECTIONS`."""
        self._rejections(reason).inc()

    def record_refused_call(self, error: BatonError) -> None:
        """Somebody called who may not."""
        self._refused_calls(outcome_of(error)).inc()

    def record_placement(self, seconds: float) -> None:
        """What a decision took."""
        self._placement_s.observe(seconds)

    def record_ttft_error(self, seconds: float) -> None:
        """Actual less predicted, from placement to the first token."""
        self._ttft_error_s.observe(seconds)

    def set_workers(self, counts: dict[tuple[Role, str], int]) -> None:
        """The fleet's size by role and state; a pair that is absent counts nobody."""
        for role in Role:
            for state in WORKER_STATES:
                self._workers(role.value, state).set(counts.get((role, state), 0))

    def _labelled(self, name: str, text: str, *labels: str) -> Children[Counter]:
        return Children(Counter(f"baton_{name}_total", text, labels, registry=self.registry))

    def _observe(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            self._times[name].observe(seconds)
