"""What `baton bench` shows: progress on stderr, a bar on a terminal and a line now and then elsewhere, and tables on stdout.

Belongs to the run's event loop, and draws there, seldom: a drawing thread would hold up the timed requests just as much, unseen.
"""

import asyncio
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from baton.bench.figures import Distribution, Figures, Goodput
from baton.bench.levels import Measured
from baton.bench.runner import Phase

BAR_PERIOD_S = 0.5
FIRST_LINE_S, LINE_PERIOD_S = 1.0, 5.0
BUSY_SHARE = 0.8
"""Of a core; a load generator that uses more adds waits of its own."""
LATE_S = 0.01


class ProgressView:
    """Shows one phase after another; a `Watcher`."""

    def __init__(self, console: Console, duration_s: float | None) -> None:
        self._console = console
        self._duration_s = duration_s
        self._timer: asyncio.TimerHandle | None = None
        self._bar: Progress | None = None

    def preparing(self, what: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            self._show(what, "preparing requests", done, total)

    def began(self, what: str, phase: Phase, total: int | None) -> None:
        self._close()
        self._tick(asyncio.get_running_loop(), what, phase, total)

    def ended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._close()

    def _tick(
        self, loop: asyncio.AbstractEventLoop, what: str, phase: Phase, total: int | None
    ) -> None:
        # Where it has only been called, it does not run yet.
        passed_s = time.perf_counter() - phase.began_s if phase.began_s else 0.0
        told = f"{phase.ended} ended, {phase.running} running"
        told += f", [red]{phase.failed} failed[/]" if phase.failed else ""
        if self._console.is_terminal:
            if total is None:
                self._show(what, told, passed_s, self._duration_s)
            else:
                self._show(what, told, phase.ended, total)
        elif passed_s:
            of = "" if total is None else f" of {total}"
            self._console.print(
                f"{escape(what)}: {passed_s:.0f} s, {phase.ended}{of} ended, "
                f"{phase.running} running, {phase.failed} failed"
            )
        period_s = LINE_PERIOD_S if passed_s else FIRST_LINE_S
        period_s = BAR_PERIOD_S if self._console.is_terminal else period_s
        self._timer = loop.call_later(period_s, self._tick, loop, what, phase, total)

    def _show(self, what: str, told: str, done: float, total: float | None) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(
                *columns, console=self._console, auto_refresh=False, transient=True
            )
            self._bar.start()
            self._bar.add_task(escape(what), total=total, told=told)
        task = self._bar.tasks[0]
        self._bar.update(task.id, completed=done, told=told, refresh=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def level_table(measured: Measured, figures: Figures) -> Table:
    """All figures of a level."""
    ended = figures.answered + figures.failed
    title = (
        f"{measured.level}: {figures.answered} of {ended} answered in {figures.duration_s:.2f} s"
    )
    if figures.unfinished:
        title += f", {figures.unfinished} cut off"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    rows = (
        ("TTFT, ms", figures.ttft_s),
        ("  since due", figures.ttft_since_due_s),
        ("ITL (TPOT), ms", figures.itl_s),
        ("ICL (gaps), ms", figures.icl_s),
        ("E2E, ms", figures.e2e_s),
        ("  since due", figures.e2e_since_due_s),
    )
    for name, distribution in rows:
        table.add_row(name, *_cells(distribution, 1e3, 2))
    table.add_row("input tokens", *_cells(figures.input_lengths, 1, 1))
    table.add_row("output tokens", *_cells(figures.output_lengths, 1, 1))
    return table


def level_lines(measured: Measured, figures: Figures) -> list[str]:
    """What stands below the table, as markup."""
    rates = (
        f"{figures.requests_per_s:.2f} requests/s",
        f"{figures.input_tokens_per_s:.0f} input tokens/s",
        f"{figures.output_tokens_per_s:.0f} output tokens/s",
    )
    lines = [f"throughput  {', '.join(rates)}"]
    if figures.goodput is not None:
        lines.append(_goodput_line(figures.goodput))
    if figures.errors:
        told = ", ".join(f"{count} {escape(status)}" for status, count in figures.errors.items())
        lines.append(f"[red]errors      {told}[/]")
        first = next((record.message for record in measured.records if record.message), "")
        if first:
            lines.append(f"[red]the first   {escape(first)}[/]")
    lines += [f"[yellow]beware      {warning}[/]" for warning in _warnings(measured, figures)]
    return lines


def sweep_table(levels: list[tuple[Measured, Figures]]) -> Table:
    """A line for each level."""
    table = Table(title="All levels", title_justify="left", title_style="bold", box=None)
    table.add_column("load")
    for name in (
        "requests/s",
        "output tokens/s",
        "TTFT p50",
        "p99, ms",
        "ITL p50",
        "p99, ms",
        "failed",
        "goodput/s",
    ):
        table.add_column(name, justify="right")
    for measured, figures in levels:
        goodput = figures.goodput
        table.add_row(
            str(measured.level),
            f"{figures.requests_per_s:.2f}",
            f"{figures.output_tokens_per_s:.0f}",
            *_middle_and_tail(figures.ttft_s),
            *_middle_and_tail(figures.itl_s),
            str(figures.failed),
            "-" if goodput is None else f"{goodput.requests_per_s:.2f}",
        )
    return table


def _cells(distribution: Distribution | None, factor: float, digits: int) -> list[str]:
    if distribution is None:
        return ["-"] * 6
    d = distribution
    return [f"{factor * v:.{digits}f}" for v in (d.mean, d.p50, d.p90, d.p95, d.p99, d.max)]


def _middle_and_tail(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-", "-"]
    return [f"{1e3 * distribution.p50:.2f}", f"{1e3 * distribution.p99:.2f}"]


def _goodput_line(goodput: Goodput) -> str:
    return (
        f"goodput     {goodput.requests_per_s:.2f} requests/s, {100 * goodput.share:.1f} % of all "
        f"({goodput.requests}; {goodput.requests_since_due} since due) met {' '.join(goodput.slos)}"
    )


def _warnings(measured: Measured, figures: Figures) -> list[str]:
    warnings = []
    share = measured.client_cpu_s / measured.wall_s if measured.wall_s else 0.0
    if share > BUSY_SHARE:
        warnings.append(
            f"this load generator used {100 * share:.0f} % of a core: some of the latency is its own"
        )
    late = figures.late_s
    if late is not None and late.p99 > LATE_S and measured.level.concurrency is None:
        warnings.append(
            f"requests were sent late, p99 {1e3 * late.p99:.1f} ms: read what is since due"
        )
    return warnings
