"""One snapshot as text, for pipes and for terminals that show one thing after another. Pure."""

from collections.abc import Iterator
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from baton.cli.watch.marks import bytes_per_s, compact, duration, span, sparkline
from baton.cli.watch.tables import REQUESTS, SESSIONS, WORKERS, Order, Table
from router.status.snapshot import LatencyStatus, RateStatus, StatusSnapshot

T = TypeVar("T")
SPARK_CELLS = 40
UNSORTED = Order()


def plain(snapshot: StatusSnapshot) -> Iterator[RenderableType]:
    """What is to be printed, one after another."""
    router, traffic = snapshot.router, snapshot.traffic
    parts = [router.model.name if router.model else "no model yet", f"up {span(router.uptime_s)}"]
    if snapshot.tenant is not None:
        parts.insert(0, f"tenant {snapshot.tenant}")
    if router.draining:
        parts.append("draining")
    yield Text(f"Baton {router.version}: {', '.join(parts)}\n")
    yield _latency("TTFT", traffic.ttft)
    yield _latency("ITL", traffic.itl)
    output, handoff = traffic.completion_tokens, traffic.handoff_bytes
    yield _rate("output", f"{compact(output.per_s)} tokens/s", output)
    yield _rate("handoff", bytes_per_s(handoff.per_s), handoff)
    requests = snapshot.requests
    if snapshot.fleet is not None:
        yield from _table(WORKERS, snapshot, "")
    yield from _table(REQUESTS, snapshot, f": {requests.running} running, {requests.queued} queued")
    yield from _table(SESSIONS, snapshot, "")


def _latency(name: str, latency: LatencyStatus) -> Text:
    shares = [("p50", latency.p50_s), ("p90", latency.p90_s), ("p99", latency.p99_s)]
    told = "  ".join(f"{share} {duration(value)}" for share, value in shares)
    spark = sparkline(latency.p50_series_s, SPARK_CELLS)
    return Text(f"{name:<8} {told:<42} {spark}".rstrip())


def _rate(name: str, told: str, rate: RateStatus) -> Text:
    return Text(f"{name:<8} {told:<42} {sparkline(rate.series_per_s, SPARK_CELLS)}".rstrip())


def _table(table: Table[T], snapshot: StatusSnapshot, note: str) -> Iterator[RenderableType]:
    yield Text(f"\n{table.name}{note}", "bold")
    rows = table.sorted(snapshot, UNSORTED)
    if not rows:
        yield Text(table.empty)
        return
    drawn = RichTable(box=None, padding=(0, 2, 0, 0))
    columns = table.columns_of(snapshot)
    for column in columns:
        justify = "right" if column.is_number else "left"
        drawn.add_column(column.title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        drawn.add_row(*(column.cell(row, snapshot) for column in columns))
    yield drawn
