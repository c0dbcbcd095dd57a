"""Where a request's time goes, stage by stage."""

from monitoring.panels import Board, Kind, Panel, Query, Row
from monitoring.promql import mean, quantile, rates


def _quantiles(title: str, histogram: str, description: str = "") -> Panel:
    return Panel(
        title=title,
        unit="s",
        description=description,
        queries=(
            *(Query(quantile(q, histogram), f"p{q * 100:g}") for q in (0.5, 0.9, 0.95, 0.99)),
            Query(mean(histogram), "mean"),
        ),
    )


def _heatmap(title: str, histogram: str) -> Panel:
    return Panel(
        title=title,
        unit="s",
        kind=Kind.HEATMAP,
        width=12,
        queries=(Query(rates(f"{histogram}_bucket", "le")),),
    )


def _stages(title: str, expr: str, description: str, kind: Kind = Kind.LINES) -> Panel:
    return Panel(
        title=title,
        unit="s",
        description=description,
        kind=kind,
        queries=(Query(expr, "{{stage}}"),),
    )


STAGE = "baton_stage_seconds"

BOARD = Board(
    uid="baton-latency",
    title="Baton / Request latency",
    description="Where a request's time goes, stage by stage, by its lifecycle events.",
    rows=(
        Row(
            "Requests",
            (
                _quantiles("Time to first token", "baton_time_to_first_token_seconds"),
                _quantiles("Inter-token latency", "baton_inter_token_latency_seconds"),
                _quantiles(
                    "Time per output token",
                    "baton_time_per_output_token_seconds",
                    "After the first token, mean of each request.",
                ),
                _quantiles("End to end", "baton_request_seconds"),
                Panel(
                    title="Wait for their turn",
                    unit="s",
                    description="Of requests that had to wait, p99 by priority.",
                    queries=(
                        Query(
                            quantile(0.99, "baton_queue_wait_seconds", "priority"), "{{priority}}"
                        ),
                    ),
                ),
                _quantiles(
                    "Handoff",
                    "baton_handoff_seconds",
                    "From the end of prefill to the KV in decode's pool, by their clocks.",
                ),
            ),
        ),
        Row(
            "Stages",
            (
                _stages("Stages, p50", quantile(0.5, STAGE, "stage"), "Half of them take longer."),
                _stages("Stages, p99", quantile(0.99, STAGE, "stage"), "One of 100 takes longer."),
                _stages(
                    "A mean request",
                    mean(STAGE, "stage"),
                    "Means on top of each other: queue to first_token are the way to the first "
                    "token; handoff and decode follow or overlap.",
                    Kind.STACK,
                ),
            ),
        ),
        Row(
            "Spread",
            (
                _heatmap("Time to first token", "baton_time_to_first_token_seconds"),
                _heatmap("Inter-token latency", "baton_inter_token_latency_seconds"),
            ),
        ),
        Row(
            "On the workers",
            (
                Panel(
                    title="Wait for blocks, p99",
                    unit="s",
                    queries=(
                        Query(quantile(0.99, "baton_worker_queue_seconds", "role"), "{{role}}"),
                    ),
                ),
                Panel(
                    title="Prefill, p99",
                    unit="s",
                    queries=(
                        Query(quantile(0.99, "baton_worker_prefill_seconds", "role"), "{{role}}"),
                    ),
                ),
                Panel(
                    title="Handoff, p99",
                    unit="s",
                    queries=(
                        Query(quantile(0.99, "baton_worker_handoff_seconds", "role"), "{{role}}"),
                    ),
                ),
            ),
        ),
    ),
)
