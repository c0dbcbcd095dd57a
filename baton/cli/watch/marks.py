"""Bars, sparklines and numbers in a terminal's cells. Pure. Stages differ in their marks, not in their colours only."""

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from router.status.snapshot import KvBlocks, RequestState, RequestStatus, WorkerState

QUEUE, RESERVE, PREFILL, HANDOFF, DECODE, FAILURE = (
    "#8a94a0",
    "#cc79a7",
    "#56a8e0",
    "#e69f00",
    "#1fae85",
    "#ff6a33",
)
"""After Okabe and Ito: people of every kind of sight tell them apart."""
DIM = "#7d8793"

STAGES = {
    "queue": ("░", QUEUE),
    "reserve": ("▒", RESERVE),
    "prefill": ("▓", PREFILL),
    "handoff": ("◆", HANDOFF),
    "decode": ("█", DECODE),
    "failure": ("✕", FAILURE),
}
WORKER_STATES = {
    WorkerState.READY: ("●", DECODE),
    WorkerState.SUSPECT: ("◐", HANDOFF),
    WorkerState.SILENT: ("○", FAILURE),
    WorkerState.STALLED: ("✕", FAILURE),
    WorkerState.DRAINING: ("◌", HANDOFF),
}
REQUEST_STATES = {
    RequestState.QUEUED: ("○", QUEUE),
    RequestState.RUNNING: ("●", DECODE),
    RequestState.FINISHED: ("✓", DIM),
    RequestState.CANCELLED: ("⊘", DIM),
    RequestState.FAILED: ("✕", FAILURE),
}
SHORTEST_S = 0.005
_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(series: Sequence[float | None], cells: int) -> str:
    """The highest value of each cell's part of the series; blank where there is none."""
    edges = [round(cell * len(series) / cells) for cell in range(cells + 1)]
    parts = [[v for v in series[a:b] if v is not None] for a, b in pairwise(edges)]
    tops = [max(part, default=None) for part in parts]
    most = max((top for top in tops if top is not None), default=0.0)
    return "".join(" " if top is None else _level(top, most) for top in tops)


def _level(value: float, most: float) -> str:
    return _LEVELS[min(len(_LEVELS) - 1, int(value / most * len(_LEVELS)))] if most else _LEVELS[0]


def kv_bar(kv: KvBlocks, cells: int) -> Text:
    """The pool by state: used █, in flight ◆, reserved ▒, cached ▪, free ·. What there is at all has a cell."""
    parts = [
        (kv.used, "█", DECODE),
        (kv.in_flight, "◆", HANDOFF),
        (kv.reserved, "▒", RESERVE),
        (kv.cached, "▪", PREFILL),
    ]
    bar, left = Text(), cells
    for blocks, mark, colour in parts:
        width = min(left, max(blocks > 0, round(blocks / max(1, kv.total) * cells)))
        bar.append(mark * width, colour)
        left -= width
    return bar.append("·" * left, DIM)


def held_share(kv: KvBlocks) -> float:
    """Of the pool, what requests hold."""
    return (kv.used + kv.in_flight + kv.reserved) / max(1, kv.total)


def timeline(request: RequestStatus, now_unix_s: float, window_s: float, cells: int) -> Text:
    """The stages of the request's first completion, on a clock that ends now. None is too short for a cell: those before it give way."""
    begin_s = now_unix_s - window_s - request.received_unix_s

    def cell_of(at_s: float) -> int:
        return min(cells - 1, math.floor((at_s - begin_s) / window_s * cells))

    drawn: list[str | None] = [None] * cells
    end = cell_of(request.age_s)
    for stage, from_s in reversed(_beginnings(request)):
        begin = min(cell_of(from_s), end)
        for cell in range(max(0, begin), end + 1):
            drawn[cell] = stage
        end = begin - 1
    text = Text()
    for each in drawn:
        mark, colour = (" ", "") if each is None else STAGES[each]
        text.append(mark, colour)
    return text


def _beginnings(request: RequestStatus) -> list[tuple[str, float]]:
    """Stages and when they began, in seconds after receipt, without those that are shorter than anybody could see."""
    begun = [("queue", 0.0)]
    for attempt in request.attempts:
        if attempt.choice:
            continue
        begun += [(stage.stage.value, stage.start_s) for stage in attempt.stages]
        ended_s = attempt.stages[-1].end_s
        if attempt.failure and ended_s is not None:
            begun.append(("failure", ended_s))
    ends = [at_s for _, at_s in begun[1:]] + [request.age_s]
    return [
        (stage, from_s)
        for (stage, from_s), to_s in zip(begun, ends, strict=True)
        if stage == "failure" or to_s - from_s > SHORTEST_S
    ]


def duration(seconds: float | None) -> str:
    """3.2 ms, 840 ms, 12.5 s; a dash where there is none."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.{1 if seconds < 0.00995 else 0}f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else span(seconds)


def span(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 4 min, 3 d 1 h."""
    whole = int(seconds)
    for unit_s, unit, part_s, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole} s"


def compact(number: float) -> str:
    """940, 12.4 k, 3.1 M."""
    if number < 10_000:
        return f"{number:,.0f}"
    return f"{number / 1e3:.1f} k" if number < 1e6 else f"{number / 1e6:.1f} M"


def bytes_per_s(number: float) -> str:
    """12.4 MiB/s."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000 or unit == "GiB":
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}/s"
        number /= 1024
    raise AssertionError


def short(name: str, most: int = 16) -> str:
    """The ends of an id, by which people tell them apart."""
    return name if len(name) <= most else f"{name[: most - 7]}…{name[-6:]}"
