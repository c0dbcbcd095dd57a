"""What fails, and how soon requests go on."""

from monitoring.panels import Board, Kind, Panel, Query, Row
from monitoring.promql import gauges, quantile, rates, series

FAILED = ('outcome="failed"',)

BOARD = Board(
    uid="baton-faults",
    title="Baton / Recovery and faults",
    description="What fails, and how soon requests go on.",
    rows=(
        Row(
            "Recovery",
            (
                Panel(
                    title="Pause, p50",
                    unit="s",
                    description="From an attempt's failure to the next new token: failure, or a worker that drains.",
                    queries=(Query(quantile(0.5, "baton_recovery_seconds", "cause"), "{{cause}}"),),
                ),
                Panel(
                    title="Pause, p99",
                    unit="s",
                    queries=(
                        Query(quantile(0.99, "baton_recovery_seconds", "cause"), "{{cause}}"),
                    ),
                ),
                Panel(
                    title="Recoveries",
                    unit="reqps",
                    queries=(Query(rates("baton_recovery_seconds_count", "cause"), "{{cause}}"),),
                ),
                Panel(
                    title="Failed attempts by reason",
                    unit="reqps",
                    kind=Kind.STACK,
                    queries=(
                        Query(rates("baton_attempts_total", "reason", where=FAILED), "{{reason}}"),
                    ),
                ),
                Panel(
                    title="Failed attempts by stage",
                    unit="reqps",
                    kind=Kind.STACK,
                    queries=(
                        Query(rates("baton_attempts_total", "stage", where=FAILED), "{{stage}}"),
                    ),
                ),
                Panel(
                    title="Attempts for each request",
                    unit="none",
                    queries=(
                        Query(
                            f"{rates('baton_attempts_total')} / {rates('baton_requests_total')}",
                            "attempts",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    title="Requests that failed",
                    unit="reqps",
                    kind=Kind.STACK,
                    width=12,
                    queries=(
                        Query(
                            rates("baton_requests_total", "outcome", where=('outcome!="ok"',)),
                            "{{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    title="Handoffs that failed",
                    unit="short",
                    width=12,
                    queries=(
                        Query(
                            rates(
                                "baton_worker_handoff_failures_total",
                                "reason",
                                where=('reason!="cancelled"',),
                            ),
                            "{{reason}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel(
                    title="Answer Prometheus",
                    unit="bool_yes_no",
                    queries=(Query(series("up"), "{{job}} {{instance}}"),),
                ),
                Panel(
                    title="Make progress",
                    unit="bool_yes_no",
                    queries=(
                        Query(series("baton_worker_making_progress"), "{{role}} {{instance}}"),
                    ),
                ),
                Panel(
                    title="Current step",
                    unit="s",
                    description="How long the step that runs has been running.",
                    queries=(
                        Query(
                            series("baton_worker_engine_stalled_seconds"), "{{role}} {{instance}}"
                        ),
                    ),
                ),
                Panel(
                    title="Ready workers",
                    unit="short",
                    queries=(
                        Query(
                            gauges("baton_workers", "role", where=('state="ready"',)), "{{role}}"
                        ),
                    ),
                ),
                Panel(
                    title="Calls on workers by outcome",
                    unit="reqps",
                    queries=(
                        Query(
                            rates("baton_worker_requests_total", "role", "outcome"),
                            "{{role}} {{outcome}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
