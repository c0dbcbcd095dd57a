"""`baton top` on a terminal: polls the router, and draws what it tells. Whatever becomes of the router, it stays, says so, and tries
again.

Everything runs on textual's event loop; one worker of it asks, and no two questions are under way at once.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, ClassVar, Generic, TypeVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.coordinate import Coordinate
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Sparkline, Static

from baton.cli.watch import marks
from baton.cli.watch.marks import bytes_per_s, compact, duration, span
from baton.cli.watch.source import StatusSource
from baton.cli.watch.tables import REQUESTS, SESSIONS, WORKERS, Order, Table
from baton.errors import BatonError
from router.status.snapshot import LatencyStatus, StatusSnapshot

MAX_PAUSE_S = 8.0
"""Between two tries at a router that does not answer."""

T = TypeVar("T")


class Tile(Vertical):
    """A figure, and how it went in the last two minutes."""

    def __init__(self, title: str, name: str) -> None:
        super().__init__(id=name, classes="tile")
        self.border_title = title

    def compose(self) -> ComposeResult:
        yield Static("-", classes="figure")
        yield Sparkline([])

    def show(self, figure: str, note: str, series: Sequence[float | None]) -> None:
        self.query_one(".figure", Static).update(Text.assemble((figure, "bold"), f"  {note}"))
        self.query_one(Sparkline).data = [value or 0.0 for value in series]


class Listing(DataTable[Any], Generic[T]):
    """One of the tables, sorted as its user likes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort_next", "Sort by"),
        Binding("r", "reverse", "Reverse"),
    ]

    def __init__(self, table: Table[T]) -> None:
        super().__init__(
            id=table.name.lower(), cursor_type="row", cursor_foreground_priority="renderable"
        )
        self._table = table
        self._order = Order()
        self._latest: StatusSnapshot | None = None
        self.border_title = table.name

    def show(self, snapshot: StatusSnapshot) -> None:
        """Draws the rows; the cursor stays on the row that it was on, wherever that is now."""
        self._latest = snapshot
        chosen = self._chosen()
        scrolled = self.scroll_offset
        self.clear(columns=True)
        for column in self._table.columns_of(snapshot):
            sorts = column.title == self._order.column
            arrow = ("▼" if self._order.descending else "▲") if sorts else ""
            justify = "right" if column.is_number else "left"
            label = Text(column.title + arrow, justify=justify)  # type: ignore[arg-type]
            self.add_column(label, key=column.title)
        rows = self._table.sorted(snapshot, self._order)
        for row in rows:
            self.add_row(*self._cells(row, snapshot), key=self._table.key(row))
        keys = [self._table.key(row) for row in rows]
        if chosen in keys:
            self.move_cursor(row=keys.index(chosen), scroll=False)
        self.scroll_to(scrolled.x, scrolled.y, animate=False)
        self.border_subtitle = "" if rows else self._table.empty

    def action_sort_next(self) -> None:
        """By the next column; after the last, as the router tells it."""
        if self._latest is None:
            return
        titles = [column.title for column in self._table.columns_of(self._latest)]
        following = dict(pairwise(["", *titles, ""]))
        self._sort(Order(following.get(self._order.column, "")))

    def action_reverse(self) -> None:
        self._sort(Order(self._order.column, not self._order.descending))

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """By the column that was clicked; once more turns it round."""
        title = event.column_key.value or ""
        again = title == self._order.column
        self._sort(Order(title, again and not self._order.descending))

    def _sort(self, order: Order) -> None:
        self._order = order
        if self._latest is not None:
            self.show(self._latest)

    def _chosen(self) -> str | None:
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(Coordinate(self.cursor_row, 0)).row_key.value

    def _cells(self, row: T, snapshot: StatusSnapshot) -> list[Text]:
        cells = []
        for column in self._table.columns_of(snapshot):
            cell = column.cell(row, snapshot)
            text = Text(cell) if isinstance(cell, str) else cell
            text.justify = "right" if column.is_number else "left"
            cells.append(text)
        return cells


class Top(App[None]):
    """See the module docstring."""

    TITLE = "baton top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("p", "pause", "Pause"),
        Binding("d", "dark", "Light/dark"),
        Binding("tab", "app.focus_next", "Next table", show=True),
        Binding("1", "show_table('fleet')", "Fleet", show=False),
        Binding("2", "show_table('requests')", "Requests", show=False),
        Binding("3", "show_table('sessions')", "Sessions", show=False),
    ]
    CSS = """
    Screen { layout: vertical; }
    #about { height: 1; padding: 0 2; }
    #problem { height: auto; padding: 0 2; background: $error 20%; color: $text; display: none; }
    #tiles { height: 5; }
    .tile { width: 1fr; height: 5; border: round $surface-lighten-2; border-title-color: $text-muted; padding: 0 1; }
    .tile Sparkline { height: 2; }
    #ttft .sparkline--max-color, #ttft .sparkline--min-color { color: #56a8e0; }
    #itl .sparkline--max-color, #itl .sparkline--min-color { color: #1fae85; }
    #output .sparkline--max-color, #output .sparkline--min-color { color: #1fae85; }
    #handoff .sparkline--max-color, #handoff .sparkline--min-color { color: #e69f00; }
    DataTable { border: round $surface-lighten-2; border-title-color: $text-muted; border-subtitle-color: $text-muted;
        border-subtitle-align: center; background: $background; scrollbar-size-horizontal: 1; scrollbar-size-vertical: 1; }
    DataTable:focus { border: round $primary; border-title-color: $text; }
    DataTable > .datatable--header { background: $background; color: $text-muted; text-style: none; }
    DataTable > .datatable--cursor { background: $background; text-style: none; }
    DataTable:focus > .datatable--cursor { background: $primary 25%; }
    #fleet { height: auto; max-height: 40%; }
    #requests { height: 1fr; min-height: 6; }
    #sessions { height: auto; max-height: 25%; }
    """

    def __init__(self, source: StatusSource, *, interval_s: float) -> None:
        """The source stays the caller's to close."""
        super().__init__()
        self._source = source
        self._interval_s = interval_s
        self._paused = False
        self.snapshot: StatusSnapshot | None = None
        """The last one; None before the first."""

    def compose(self) -> ComposeResult:
        yield Static("", id="about")
        yield Static("", id="problem")
        with Horizontal(id="tiles"):
            yield Tile("Time to first token", "ttft")
            yield Tile("Inter-token latency", "itl")
            yield Tile("Output tokens", "output")
            yield Tile("KV handoff", "handoff")
        yield Listing(WORKERS)
        yield Listing(REQUESTS)
        yield Listing(SESSIONS)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#requests").focus()
        self.run_worker(self._poll(), name="poll", exclusive=True)

    async def _poll(self) -> None:
        # At the end, the screen's parts go before its workers do.
        with suppress(NoMatches):
            await self._poll_forever()

    async def _poll_forever(self) -> None:
        pause_s = self._interval_s
        while True:
            try:
                snapshot = await self._source.fetch()
            except BatonError as error:
                pause_s = min(MAX_PAUSE_S, pause_s * 2)
                self._tell_problem(error, pause_s)
            else:
                pause_s = self._interval_s
                if not self._paused:
                    self._show(snapshot)
            await asyncio.sleep(pause_s)

    def _tell_problem(self, error: BatonError, pause_s: float) -> None:
        problem = self.query_one("#problem", Static)
        problem.update(Text(f"{error.message}; trying again in {pause_s:.0f} s"))
        problem.display = True
        self._tell_about("○ not connected", marks.FAILURE)

    def _show(self, snapshot: StatusSnapshot) -> None:
        self.snapshot = snapshot
        self.query_one("#problem").display = False
        draining = snapshot.router.draining
        self._tell_about(
            "◌ draining" if draining else "● live", marks.HANDOFF if draining else marks.DECODE
        )
        traffic = snapshot.traffic
        self._show_latency("#ttft", traffic.ttft)
        self._show_latency("#itl", traffic.itl)
        for name, rate, form in (
            ("#output", traffic.completion_tokens, lambda value: f"{compact(value)} /s"),
            ("#handoff", traffic.handoff_bytes, bytes_per_s),
        ):
            note = f"{form(rate.mean_per_s)} over 2 min"
            self.query_one(name, Tile).show(form(rate.per_s), note, rate.series_per_s)
        fleet = self.query_one("#fleet", Listing)
        fleet.display = snapshot.fleet is not None
        for listing in self.query(Listing):
            listing.show(snapshot)
        requests, sessions = snapshot.requests, snapshot.sessions
        self.query_one(
            "#requests"
        ).border_title = f"Requests: {requests.running} running, {requests.queued} queued"
        if sessions.idle is not None and sessions.generating is not None:
            kept = sessions.idle + sessions.generating
            self.query_one("#sessions").border_title = f"Sessions: {kept} kept"

    def _show_latency(self, name: str, latency: LatencyStatus) -> None:
        note = f"p50 · p99 {duration(latency.p99_s)}" if latency.count else "none yet"
        self.query_one(name, Tile).show(duration(latency.p50_s), note, latency.p50_series_s)

    def _tell_about(self, state: str, colour: str) -> None:
        snapshot = self.snapshot
        about = Text.assemble(("Baton", "bold"), "  ")
        if snapshot is not None:
            router = snapshot.router
            parts = [
                router.model.name if router.model else "no model yet",
                f"version {router.version}",
                f"up {span(router.uptime_s)}",
            ]
            if snapshot.tenant is not None:
                parts.insert(0, f"tenant {snapshot.tenant}")
            about.append(" · ".join(parts) + "   ", marks.DIM)
        about.append(
            "⏸ paused" if self._paused else state, marks.HANDOFF if self._paused else colour
        )
        about.append(f"   {self._source.url}", marks.DIM)
        self.query_one("#about", Static).update(about)

    def action_pause(self) -> None:
        """The picture stands still, until it is pressed again."""
        self._paused = not self._paused
        self._tell_about("● live", marks.DECODE)

    def action_dark(self) -> None:
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"

    def action_show_table(self, name: str) -> None:
        """The keys go there."""
        self.query_one(f"#{name}").focus()
