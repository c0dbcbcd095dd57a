"""Sessions: how many, their turns, what their history costs, and the store."""

from monitoring.panels import Board, Panel, Query, Row
from monitoring.promql import quantile, rates, series, share

BOARD = Board(
    uid="baton-sessions",
    title="Baton / Sessions",
    description="Sessions and their turns, what their history costs, and the store.",
    rows=(
        Row(
            "Sessions",
            (
                Panel(
                    title="In the store",
                    unit="short",
                    description="As each router counts them; those that share a store tell the same.",
                    queries=(Query(series("baton_sessions"), "{{state}} {{instance}}"),),
                ),
                Panel(
                    title="Turns by outcome",
                    unit="reqps",
                    queries=(Query(rates("baton_session_turns_total", "outcome"), "{{outcome}}"),),
                ),
                Panel(
                    title="Expired",
                    unit="short",
                    description="Sessions a second whose time had come.",
                    queries=(Query(rates("baton_sessions_expired_total"), "expired"),),
                ),
            ),
        ),
        Row(
            "History",
            (
                Panel(
                    title="Prompt tokens of turns",
                    unit="short",
                    description="A second, with their history.",
                    width=12,
                    queries=(
                        Query(rates("baton_session_prompt_tokens_total"), "all"),
                        Query(rates("baton_session_cached_tokens_total"), "cached"),
                    ),
                ),
                Panel(
                    title="Found in a prefix cache",
                    unit="percentunit",
                    max=1,
                    width=12,
                    queries=(
                        Query(
                            share(
                                rates("baton_session_cached_tokens_total"),
                                rates("baton_session_prompt_tokens_total"),
                            ),
                            "share",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Store",
            (
                Panel(
                    title="Operations",
                    unit="ops",
                    queries=(
                        Query(
                            rates("baton_session_store_seconds_count", "operation"), "{{operation}}"
                        ),
                    ),
                ),
                Panel(
                    title="Time, p99",
                    unit="s",
                    queries=(
                        Query(
                            quantile(0.99, "baton_session_store_seconds", "operation"),
                            "{{operation}}",
                        ),
                    ),
                ),
                Panel(
                    title="Failures",
                    unit="ops",
                    description="Operations that the store did not answer.",
                    queries=(
                        Query(
                            rates("baton_session_store_failures_total", "operation"),
                            "{{operation}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
