"""Pictures of a run, as PNG files; needs matplotlib, of the extra `bench`.

latencies.png     of each level: which share of requests had TTFT, ITL, E2E of at most so much
sweep.png         of several levels: what throughput costs in TTFT
requests-N.png    of level N: its first requests in time, with the server's stages where the protocol tells them
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from baton.bench.figures import e2e_s, itl_s, ttft_s
from baton.bench.levels import Measured
from baton.bench.records import OK, Record

GANTT_REQUESTS = 80
_WAITING, _FAILED = "#d0d0d0", "#c44e52"
_STAGES = {
    "late or waiting for room": "#eeeeee",
    "to the first token": _WAITING,
    "queue and place": "#bcbddc",
    "reserve blocks": "#9e9ac8",
    "wait for prefill": "#fdd0a2",
    "prefill": "#e6550d",
    "tokens": "#6baed6",
    "failed or cut off": _FAILED,
}


def draw(levels: Sequence[Measured], directory: Path, title: str) -> list[Path]:
    """Writes all that the levels have data for; returns the files. Raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(figure: Figure, name: str) -> None:
        path = directory / name
        figure.savefig(path, dpi=110)
        written.append(path)

    answered = [level for level in levels if any(r.chunk_s for r in _answered(level))]
    if answered:
        save(_latencies(answered, title), "latencies.png")
    if len(answered) > 1:
        save(_sweep(answered, title), "sweep.png")
    for number, level in enumerate(levels, 1):
        if any(record.was_sent for record in level.records):
            save(_requests(level, title), f"requests-{number}.png")
    return written


def _answered(level: Measured) -> list[Record]:
    return [record for record in level.records if record.status == OK]


def _latencies(levels: Sequence[Measured], title: str) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 3, sharey=True)
    kinds: list[tuple[str, Callable[[Record], float | None]]] = [
        ("TTFT", ttft_s),
        ("ITL (TPOT)", itl_s),
        ("E2E", e2e_s),
    ]
    for axis, (name, value_of) in zip(axes, kinds, strict=True):
        for level in levels:
            values = [v for r in _answered(level) if (v := value_of(r)) is not None]
            if values:
                axis.ecdf(np.asarray(values) * 1e3, label=str(level.level))
        axis.set_xlabel(f"{name}, ms")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(fontsize=8)
    return figure


def _sweep(levels: Sequence[Measured], title: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    figures = [level.figures() for level in levels]
    throughput = [each.output_tokens_per_s for each in figures]
    for name, style in (("p50", "o-"), ("p90", "s--"), ("p99", "^:")):
        values = [1e3 * getattr(each.ttft_s, name) for each in figures if each.ttft_s]
        axis.plot(throughput, values, style, label=f"TTFT {name}")
    for level, x, each in zip(levels, throughput, figures, strict=True):
        if each.ttft_s:
            axis.annotate(
                str(level.level),
                (x, 1e3 * each.ttft_s.p50),
                textcoords="offset points",
                xytext=(-4, 6),
                ha="right",
                fontsize=8,
            )
    axis.set_xlim(left=0)
    axis.set_xlabel("output tokens a second")
    axis.set_ylabel("TTFT, ms")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    return figure


def _requests(level: Measured, title: str) -> Figure:
    records = [record for record in level.records if record.was_sent][:GANTT_REQUESTS]
    figure = Figure(figsize=(11, 1.6 + 0.13 * len(records)), layout="constrained")
    axis = figure.subplots()
    used: set[str] = set()
    for row, record in enumerate(records):
        used |= _bar(axis, row, record, level.began_s)
    axis.set_ylim(len(records) - 0.4, -0.6)
    axis.set_xlabel("seconds")
    axis.set_ylabel("request")
    handles = [Patch(color=_STAGES[name], label=name) for name in _STAGES if name in used]
    axis.legend(handles=handles, fontsize=8, ncols=4, loc="upper right")
    axis.set_title(f"{title}, {level.level}", fontsize=10)
    return figure


def _bar(axis: Axes, row: int, record: Record, began_s: float) -> set[str]:
    """Draws a request; returns the stages that it had."""
    used = set()
    for name, first_s, last_s in stages(record):
        axis.barh(row, last_s - first_s, left=first_s - began_s, height=0.8, color=_STAGES[name])
        used.add(name)
    return used


def stages(record: Record) -> list[tuple[str, float, float]]:
    """What a request did when, on the client's clock. The server's stages are placed by the client's send: the way there is within the
    first of them.
    """
    end_s = record.chunk_s[-1] if record.chunk_s else record.ended_s
    spans = [("late or waiting for room", record.scheduled_s, record.sent_s)]
    if record.chunk_s:
        first_s = record.chunk_s[0]
        spans += _until_first_token(record, first_s)
        spans.append(("tokens", first_s, end_s))
    if record.status != OK:
        began_s = record.chunk_s[-1] if record.chunk_s else record.sent_s
        spans.append(("failed or cut off", began_s, max(record.ended_s, began_s)))
    return [span for span in spans if span[2] > span[1]]


def _until_first_token(record: Record, first_s: float) -> list[tuple[str, float, float]]:
    timings = record.timings
    if timings is None:
        return [("to the first token", record.sent_s, first_s)]
    named = [
        ("queue and place", timings.placed_at_s),
        ("reserve blocks", timings.reserved_at_s),
        ("wait for prefill", timings.prefill_started_at_s),
        ("prefill", timings.first_token_at_s),
    ]
    spans, at_s = [], record.sent_s
    for name, offset_s in named:
        if offset_s is not None:
            next_s = min(record.sent_s + offset_s, first_s)
            spans.append((name, at_s, max(at_s, next_s)))
            at_s = max(at_s, next_s)
    # From the router's stream to here.
    spans.append(("to the first token", at_s, first_s))
    return spans
