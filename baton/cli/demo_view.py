"""How the demo looks: answers as they stream, then where each request's time went. Pure rendering; no I/O but the console's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from baton.cli.console import seconds, size
from baton.cli.demo_examples import Question
from baton.client import Result, Timings

MOST_CELLS, LEAST_CELLS = 48, 12
"""Of a timeline."""
OTHER_COLUMNS = 82
"""What the rest of the table takes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and what became of it."""

    question: Question
    result: Result
    sent_s: float
    """After the first question of the demo was sent."""


@dataclass(frozen=True, slots=True)
class _Stage:
    letter: str
    name: str
    style: str


QUEUE = _Stage("q", "queue and place", "bright_black")
RESERVE = _Stage("r", "reserve blocks on decode", "yellow")
WAIT = _Stage("w", "wait for prefill", "magenta")
PREFILL = _Stage("P", "prefill", "blue")
HANDOFF = _Stage("h", "KV handoff", "red")
DECODE = _Stage("D", "decode", "green")
STAGES = (QUEUE, RESERVE, WAIT, PREFILL, HANDOFF, DECODE)


class AnswerBoard:
    """The answers while they stream: a live board on a terminal; elsewhere, one line when an answer is complete."""

    def __init__(self, console: Console, questions: Sequence[Question]) -> None:
        self._console = console
        self._questions = questions
        self._texts = {question.number: "" for question in questions}
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The board is on the screen inside the context, and its last state stays."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._render(), console=self._console, refresh_per_second=12) as self._live:
            yield
            self._live.update(self._render())

    def add(self, question: Question, text: str) -> None:
        """More of an answer."""
        self._texts[question.number] += text
        if self._live is not None:
            self._live.update(self._render())

    def finish(self, question: Question) -> None:
        """The answer is complete."""
        if self._live is None:
            answer = self._texts[question.number].strip()
            self._console.print(
                f"[{question.number:2}] {question.question}  ->  {answer}",
                markup=False,
                soft_wrap=True,
            )

    def _render(self) -> Panel:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="dim")
        grid.add_column(style="cyan", ratio=1)
        grid.add_column(style="bold", ratio=1)
        for question in self._questions:
            grid.add_row(
                str(question.number),
                escape(question.question),
                escape(self._texts[question.number].strip()),
            )
        return Panel(grid, title="Answers, as they arrive", title_align="left", border_style="dim")


def segments(timings: Timings) -> list[tuple[_Stage, float, float]]:
    """(stage, start, end) in seconds after the request was received; stages that did not happen are left out."""
    first = timings.first_token_at_s
    # The router hears of a prompt's start only with its first chunk done; the worker's own clock says how long it computed.
    started = first - timings.prefill_s if first is not None and timings.prefill_s else None
    # Where decode computed the prompt itself, its first token ends the prefill and there is no handoff.
    edges = (
        (QUEUE, timings.placed_at_s),
        (RESERVE, timings.reserved_at_s),
        (WAIT, started),
        (PREFILL, first),
        (HANDOFF, timings.kv_received_at_s if timings.handoff_bytes else None),
        (DECODE, timings.last_token_at_s),
    )
    found: list[tuple[_Stage, float, float]] = []
    at_s = 0.0
    for stage, end_s in edges:
        if end_s is not None and end_s > at_s:
            found.append((stage, at_s, end_s))
            at_s = end_s
    return found


def bar(timings: Timings, *, offset_s: float, total_s: float, width: int) -> Text:
    """A timeline of `width` cells for [0, total_s). A stage too short for a cell of its own still gets one where there is room."""
    text = Text()
    scale = width / max(total_s, 1e-9)
    text.append(" " * min(width, int(offset_s * scale)))
    for stage, _start_s, end_s in segments(timings):
        cells = max(1, round((offset_s + end_s) * scale) - len(text))
        cells = min(cells, width - len(text))
        text.append(stage.letter * cells, style=stage.style)
    text.append(" " * (width - len(text)))
    return text


def timelines(asked: Sequence[Asked], width: int) -> Group:
    """The table of all requests on one time axis, for a console of that width."""
    cells = max(LEAST_CELLS, min(MOST_CELLS, width - OTHER_COLUMNS))
    total_s = max(each.sent_s + (each.result.timings.finished_at_s or 0.0) for each in asked)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column(f"0 to {seconds(total_s)}", no_wrap=True, min_width=cells)
    for name in ("prompt", "cached", "first token", "handoff", "new"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("workers", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for each in asked:
        table.add_row(*_row(each, total_s, cells))
    legend = Text("   ").join(Text(f"{s.letter} {s.name}", style=s.style) for s in STAGES)
    return Group(table, Text(), legend)


def _row(each: Asked, total_s: float, cells: int) -> tuple[str | Text, ...]:
    result, timings = each.result, each.result.timings
    moved = (
        f"{size(timings.handoff_bytes)} in {seconds(timings.handoff_s)}"
        if timings.handoff_bytes
        else "-"
    )
    workers = " ".join(
        f"{_short(a.prefill_worker)}>{_short(a.decode_worker)}" for a in result.attempts
    )
    right = each.question.is_right(result.text)
    return (
        str(each.question.number),
        bar(timings, offset_s=each.sent_s, total_s=total_s, width=cells),
        str(result.usage.prompt_tokens),
        str(result.usage.cached_tokens),
        seconds(timings.first_token_at_s),
        moved,
        str(result.usage.completion_tokens),
        workers,
        Text("right", style="green") if right else Text("wrong", style="bold red"),
    )


def _short(worker_id: str) -> str:
    """`prefill-0` as P0."""
    return worker_id.replace("prefill-", "P").replace("decode-", "D") or "-"
