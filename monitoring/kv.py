"""KV: the pools, the prefix caches, the handoffs, and the object store that they go through."""

from monitoring.panels import Board, Kind, Panel, Query, Row
from monitoring.promql import gauges, mean, quantile, rates, series, share

BLOCKS = "baton_worker_kv_blocks"
HELD = 'state=~"reserved|used|in_flight"'


def _blocks(role: str) -> Panel:
    return Panel(
        title=f"Blocks, {role}",
        unit="short",
        kind=Kind.STACK,
        description="free and cached are there for the asking; reserved waits for KV, in_flight for its pull.",
        queries=(Query(gauges(BLOCKS, "state", where=(f'role="{role}"',)), "{{state}}"),),
    )


POOLS = Row(
    "Pools",
    (
        _blocks("prefill"),
        _blocks("decode"),
        Panel(
            title="Held by requests",
            unit="percentunit",
            max=1,
            queries=(
                Query(
                    share(
                        gauges(BLOCKS, "role", "instance", where=(HELD,)),
                        gauges(BLOCKS, "role", "instance"),
                    ),
                    "{{role}} {{instance}}",
                ),
            ),
        ),
        Panel(
            title="Preemptions",
            unit="short",
            description="A second: requests that lost their blocks and are computed again.",
            queries=(Query(rates("baton_worker_preemptions_total", "role"), "{{role}}"),),
        ),
        Panel(
            title="Orphaned blocks",
            unit="short",
            description="Held, and no call's: anything but 0 is a leak.",
            queries=(Query(series("baton_worker_orphaned_kv_blocks"), "{{role}} {{instance}}"),),
        ),
        Panel(
            title="Prefix cache",
            unit="percentunit",
            max=1,
            description="Share of the prompt tokens looked up that were found.",
            queries=(
                Query(
                    share(
                        rates("baton_worker_prefix_cache_hit_tokens_total", "role"),
                        rates("baton_worker_prefix_cache_query_tokens_total", "role"),
                    ),
                    "{{role}}",
                ),
            ),
        ),
    ),
)

HANDOFFS = Row(
    "Handoffs",
    (
        Panel(
            title="Time",
            unit="s",
            description="From the end of prefill until decode has the KV, by each side.",
            queries=(
                Query(quantile(0.5, "baton_worker_handoff_seconds", "role"), "p50 {{role}}"),
                Query(quantile(0.99, "baton_worker_handoff_seconds", "role"), "p99 {{role}}"),
                Query(mean("baton_worker_handoff_seconds", "role"), "mean {{role}}"),
            ),
        ),
        Panel(
            title="Bytes",
            unit="Bps",
            queries=(Query(rates("baton_worker_handoff_bytes_total", "role"), "{{role}}"),),
        ),
        Panel(
            title="Failures",
            unit="short",
            description="A second, by reason; cancelled ones are mostly clients that left.",
            queries=(
                Query(
                    rates("baton_worker_handoff_failures_total", "role", "reason"),
                    "{{role}} {{reason}}",
                ),
            ),
        ),
        Panel(
            title="Mean size",
            unit="bytes",
            queries=(
                Query(
                    share(
                        rates("baton_worker_handoff_bytes_total", "role"),
                        rates("baton_worker_handoff_seconds_count", "role"),
                    ),
                    "{{role}}",
                ),
            ),
        ),
        Panel(
            title="Through the router's eyes",
            unit="Bps",
            queries=(Query(rates("baton_handoff_bytes_total"), "handed over"),),
        ),
    ),
)

STORE = Row(
    "Ray's object store",
    (
        Panel(
            title="In use",
            unit="bytes",
            description="On each worker's node; workers of one node tell the same.",
            queries=(
                Query(series("baton_worker_object_store_used_bytes"), "used {{instance}}"),
                Query(series("baton_worker_object_store_capacity_bytes"), "size {{instance}}"),
            ),
        ),
        Panel(
            title="Full",
            unit="percentunit",
            max=1,
            queries=(
                Query(
                    share(
                        series("baton_worker_object_store_used_bytes"),
                        series("baton_worker_object_store_capacity_bytes"),
                    ),
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            title="Spilled to disk",
            unit="Bps",
            description="Handoffs wait for the disk then: the store is too small, or is shared.",
            queries=(
                Query(
                    rates("baton_worker_object_store_spilled_bytes_total", "instance"),
                    "{{instance}}",
                ),
            ),
        ),
    ),
)

BOARD = Board(
    uid="baton-kv",
    title="Baton / KV and handoff",
    description="The KV pools, the prefix caches, the handoffs, and the object store that carries them.",
    rows=(POOLS, HANDOFFS, STORE),
)
