"""The fleet at a glance: who is there, what comes in, what is served in time."""

from monitoring.panels import Board, Kind, Panel, Query, Row
from monitoring.promql import gauges, quantile, rate, rates, series, share, total


def _ready(role: str) -> Panel:
    ready = gauges("baton_workers", where=(f'role="{role}"', 'state="ready"'))
    return Panel(
        title=f"Ready {role} workers",
        unit="short",
        queries=(Query(ready),),
        kind=Kind.NUMBER,
        width=4,
        height=4,
        description="As routers count them; several routers count each worker.",
    )


NOW = Row(
    "Now",
    (
        _ready("prefill"),
        _ready("decode"),
        Panel(
            title="Running requests",
            unit="short",
            queries=(Query(gauges("baton_running_requests")),),
            kind=Kind.NUMBER,
            width=4,
            height=4,
        ),
        Panel(
            title="Waiting for their turn",
            unit="short",
            queries=(Query(gauges("baton_queued_requests")),),
            kind=Kind.NUMBER,
            width=4,
            height=4,
        ),
        Panel(
            title="Requests that end well",
            unit="percentunit",
            queries=(
                Query(
                    share(
                        rates("baton_requests_total", where=('outcome="ok"',)),
                        rates("baton_requests_total"),
                    )
                ),
            ),
            kind=Kind.NUMBER,
            width=4,
            height=4,
        ),
        Panel(
            title="First tokens in time",
            unit="percentunit",
            queries=(
                Query(
                    share(
                        rates(
                            "baton_slo_requests_total",
                            where=('objective="ttft"', 'outcome="met"'),
                        ),
                        rates("baton_slo_requests_total", where=('objective="ttft"',)),
                    )
                ),
            ),
            kind=Kind.NUMBER,
            width=4,
            height=4,
            description="Of requests with an objective, their own or the settings'.",
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            title="Requests by outcome",
            unit="reqps",
            queries=(Query(rates("baton_requests_total", "outcome"), "{{outcome}}"),),
            kind=Kind.STACK,
        ),
        Panel(
            title="Tokens",
            unit="short",
            description="Tokens a second, as routers count them at each request's end.",
            queries=(
                Query(rates("baton_prompt_tokens_total"), "prompt"),
                Query(rates("baton_cached_tokens_total"), "prompt, cached"),
                Query(rates("baton_completion_tokens_total"), "generated"),
            ),
        ),
        Panel(
            title="Goodput",
            unit="reqps",
            description="Requests that ended well and met every objective that they have.",
            queries=(
                Query(rates("baton_goodput_requests_total"), "good"),
                Query(rates("baton_requests_total"), "all"),
            ),
        ),
        Panel(
            title="Good tokens",
            unit="short",
            description="Tokens a second of requests that count for goodput.",
            queries=(
                Query(rates("baton_goodput_tokens_total"), "good"),
                Query(rates("baton_completion_tokens_total"), "all"),
            ),
        ),
        Panel(
            title="Objectives met",
            unit="percentunit",
            max=1,
            queries=(
                Query(
                    share(
                        rates("baton_slo_requests_total", "objective", where=('outcome="met"',)),
                        rates("baton_slo_requests_total", "objective"),
                    ),
                    "{{objective}}",
                ),
            ),
        ),
        Panel(
            title="Refused before any work",
            unit="reqps",
            queries=(
                Query(rates("baton_rejected_requests_total", "reason"), "{{reason}}"),
                Query(rates("baton_refused_calls_total", "reason"), "{{reason}}"),
            ),
        ),
    ),
)

WORKERS = Row(
    "Workers",
    (
        Panel(
            title="Members",
            unit="short",
            queries=(Query(gauges("baton_workers", "role", "state"), "{{role}} {{state}}"),),
        ),
        Panel(
            title="Prefill for each decode worker",
            unit="none",
            queries=(
                Query(
                    share(
                        gauges("baton_workers", where=('role="prefill"', 'state="ready"')),
                        gauges("baton_workers", where=('role="decode"', 'state="ready"')),
                    ),
                    "ratio",
                ),
            ),
        ),
        Panel(
            title="Changes of role",
            unit="short",
            description="A second: all of them, and those that the autoscaler began.",
            queries=(
                Query(rates("baton_role_changes_total", "role"), "to {{role}}"),
                Query(
                    rates("baton_autoscaler_changes_total", "role", "outcome"),
                    "autoscaler to {{role}}: {{outcome}}",
                ),
            ),
        ),
        Panel(
            title="Running",
            unit="short",
            queries=(Query(series("baton_worker_running_requests"), "{{role}} {{instance}}"),),
        ),
        Panel(
            title="Waiting for blocks",
            unit="short",
            queries=(Query(series("baton_worker_waiting_requests"), "{{role}} {{instance}}"),),
        ),
        Panel(
            title="Prompt tokens to compute",
            unit="short",
            queries=(Query(series("baton_worker_queued_prefill_tokens"), "{{role}} {{instance}}"),),
        ),
        Panel(
            title="Tokens computed",
            unit="short",
            description="A second, on the workers.",
            queries=(
                Query(rates("baton_worker_prefill_tokens_total", "role"), "prompt, {{role}}"),
                Query(rates("baton_worker_decode_tokens_total", "role"), "output, {{role}}"),
            ),
        ),
        Panel(
            title="Processor",
            unit="short",
            description="Cores in use by each process.",
            queries=(Query(rate("process_cpu_seconds_total"), "{{job}} {{instance}}"),),
        ),
        Panel(
            title="Memory",
            unit="bytes",
            queries=(Query(series("process_resident_memory_bytes"), "{{job}} {{instance}}"),),
        ),
    ),
)

PLACEMENT = Row(
    "Placement",
    (
        Panel(
            title="Time to decide",
            unit="s",
            description="Of the decision alone; it holds up everything else on the router.",
            queries=(
                Query(quantile(0.5, "baton_placement_seconds"), "p50"),
                Query(quantile(0.99, "baton_placement_seconds"), "p99"),
            ),
        ),
        Panel(
            title="First token, later than predicted",
            unit="s",
            min=None,
            queries=(
                Query(quantile(0.5, "baton_ttft_prediction_error_seconds"), "p50"),
                Query(quantile(0.9, "baton_ttft_prediction_error_seconds"), "p90"),
            ),
        ),
        Panel(
            title="Waiting by priority",
            unit="short",
            queries=(Query(total(series("baton_queued_requests"), "priority"), "{{priority}}"),),
        ),
    ),
)

BOARD = Board(
    uid="baton-fleet",
    title="Baton / Fleet",
    description="Who is there, what comes in, and what is served in time.",
    rows=(NOW, TRAFFIC, WORKERS, PLACEMENT),
)
