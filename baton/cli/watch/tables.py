"""The tables of `baton top`, for the terminal and for plain text alike: their columns, what stands in each cell, what sorts them. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.text import Text

from baton.cli.watch import marks
from baton.cli.watch.marks import DIM, compact, duration, short, span
from baton.types import Role
from router.status.snapshot import (
    RequestState,
    RequestStatus,
    SessionStatus,
    StatusSnapshot,
    WorkerStatus,
)

T = TypeVar("T")
WINDOW_S = 20.0
WINDOW_CELLS = 40
"""Of the requests' timelines."""
LIVE = (RequestState.RUNNING, RequestState.QUEUED)


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One column of a table whose rows are of type T."""

    title: str
    cell: Callable[[T, StatusSnapshot], Text | str]
    rank: Callable[[T], Any]
    """What sorts by this column."""
    is_number: bool = False
    of_tenants: bool = False
    """Shown only where there are some."""


@dataclass(frozen=True, slots=True)
class Order:
    """How a table is sorted."""

    column: str = ""
    """By its title; empty is as the router tells it."""
    descending: bool = False


@dataclass(frozen=True, slots=True)
class Table(Generic[T]):
    """A table, and which rows of a snapshot it shows."""

    name: str
    columns: tuple[Column[T], ...]
    rows: Callable[[StatusSnapshot], Sequence[T]]
    key: Callable[[T], str]
    empty: str

    def columns_of(self, snapshot: StatusSnapshot) -> list[Column[T]]:
        """Those that have something to tell."""
        requests = (*snapshot.requests.live, *snapshot.requests.ended)
        tenants = {each.tenant for each in requests}
        tenants |= {session.tenant for session in snapshot.sessions.recent}
        has_tenants = any(tenants)
        return [column for column in self.columns if has_tenants or not column.of_tenants]

    def sorted(self, snapshot: StatusSnapshot, order: Order) -> list[T]:
        """The rows, in an order that does not change from one snapshot to the next without a reason."""
        rows = list(self.rows(snapshot))
        column = next((each for each in self.columns if each.title == order.column), None)
        if column is None:
            return rows[::-1] if order.descending else rows
        return sorted(rows, key=column.rank, reverse=order.descending)


def _workers(snapshot: StatusSnapshot) -> list[WorkerStatus]:
    return sorted(
        snapshot.fleet or (), key=lambda each: (each.role is Role.DECODE, _natural(each.worker_id))
    )


def _requests(snapshot: StatusSnapshot) -> list[RequestStatus]:
    """The live ones, the newest first; then those that ended."""
    return [*reversed(snapshot.requests.live), *snapshot.requests.ended]


def _natural(name: str) -> list[tuple[int, str]]:
    """decode-9 goes before decode-10."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in name.split("-")]


def _role(worker: WorkerStatus, _: StatusSnapshot) -> Text:
    return Text(worker.role.value, marks.PREFILL if worker.role is Role.PREFILL else marks.DECODE)


def _worker_state(worker: WorkerStatus, _: StatusSnapshot) -> Text:
    mark, colour = marks.WORKER_STATES[worker.state]
    return Text(f"{mark} {worker.state.value}", colour)


def _speed(worker: WorkerStatus, _: StatusSnapshot) -> str:
    if worker.role is Role.PREFILL:
        return (
            f"{compact(worker.prefill_tokens_per_s)} tok/s" if worker.prefill_tokens_per_s else "-"
        )
    return f"{duration(worker.decode_step_s)} step" if worker.decode_step_s else "-"


def _number(value: float) -> Text:
    return Text(f"{value:,.0f}", "" if value else DIM)


WORKERS: Table[WorkerStatus] = Table(
    "Fleet",
    (
        Column("role", _role, lambda w: w.role.value),
        Column("worker", lambda w, _: w.worker_id, lambda w: _natural(w.worker_id)),
        Column("state", _worker_state, lambda w: w.state.value),
        Column(
            "run",
            lambda w, _: _number(w.running_requests),
            lambda w: w.running_requests,
            is_number=True,
        ),
        Column(
            "wait",
            lambda w, _: _number(w.waiting_requests),
            lambda w: w.waiting_requests,
            is_number=True,
        ),
        Column(
            "queued tok",
            lambda w, _: _number(w.queued_prefill_tokens),
            lambda w: w.queued_prefill_tokens,
            is_number=True,
        ),
        Column("KV pool", lambda w, _: marks.kv_bar(w.kv, 24), lambda w: marks.held_share(w.kv)),
        Column(
            "held",
            lambda w, _: f"{marks.held_share(w.kv):.0%}",
            lambda w: marks.held_share(w.kv),
            is_number=True,
        ),
        Column(
            "speed", _speed, lambda w: w.prefill_tokens_per_s or w.decode_step_s, is_number=True
        ),
        Column("member", lambda w, _: span(w.member_s), lambda w: w.member_s, is_number=True),
        Column("weights", lambda w, _: Text(w.weights), lambda w: w.weights),
    ),
    _workers,
    lambda w: w.worker_id,
    "No worker has joined yet.",
)


def _request_state(request: RequestStatus, _: StatusSnapshot) -> Text:
    mark, colour = marks.REQUEST_STATES[request.state]
    told = (
        request.waits_for if request.state in LIVE else request.error.lower() or request.state.value
    )
    return Text(f"{mark} {short(told, 20)}", colour)


def _where(request: RequestStatus, _: StatusSnapshot) -> str:
    if not request.attempts:
        return "-"
    last = request.attempts[-1]
    names = (last.prefill_worker, last.decode_worker)
    return " → ".join(name for name in names if name)


def _output(request: RequestStatus, _: StatusSnapshot) -> str:
    if request.state in LIVE:
        return f"{request.completion_tokens:,} / {request.max_tokens * request.choices:,}"
    return f"{request.completion_tokens:,}"


REQUESTS: Table[RequestStatus] = Table(
    "Requests",
    (
        Column("request", lambda r, _: short(r.request_id) or "-", lambda r: r.request_id),
        Column("stage", _request_state, lambda r: (r.state.value, r.waits_for)),
        Column(
            f"last {WINDOW_S:.0f} s",
            lambda r, s: marks.timeline(r, s.at_unix_s, WINDOW_S, WINDOW_CELLS),
            lambda r: r.received_unix_s,
        ),
        Column("age", lambda r, _: duration(r.age_s), lambda r: r.age_s, is_number=True),
        Column(
            "TTFT",
            lambda r, _: duration(r.first_token_s),
            lambda r: r.first_token_s or 0.0,
            is_number=True,
        ),
        Column(
            "prompt",
            lambda r, _: _number(r.prompt_tokens),
            lambda r: r.prompt_tokens,
            is_number=True,
        ),
        Column("output", _output, lambda r: r.completion_tokens, is_number=True),
        Column("workers", _where, lambda r: [a.decode_worker for a in r.attempts]),
        Column("tenant", lambda r, _: r.tenant or "-", lambda r: r.tenant, of_tenants=True),
    ),
    _requests,
    lambda r: str(r.serial),
    "No request has come yet.",
)


def _session_state(session: SessionStatus, snapshot: StatusSnapshot) -> Text:
    if session.generating:
        return Text("● generating", marks.DECODE)
    return Text(f"○ {span(max(0.0, snapshot.at_unix_s - session.updated_unix_s))} ago", DIM)


def _cached(session: SessionStatus, _: StatusSnapshot) -> str:
    return f"{_cached_share(session):.0%}" if session.prompt_tokens else "-"


def _cached_share(session: SessionStatus) -> float:
    return session.cached_tokens / max(1, session.prompt_tokens)


SESSIONS: Table[SessionStatus] = Table(
    "Sessions",
    (
        Column("session", lambda s, _: short(s.session_id), lambda s: s.session_id),
        Column("last turn", _session_state, lambda s: (not s.generating, -s.updated_unix_s)),
        Column("turns", lambda s, _: _number(s.turns), lambda s: s.turns, is_number=True),
        Column(
            "history",
            lambda s, _: _number(s.history_tokens),
            lambda s: s.history_tokens,
            is_number=True,
        ),
        Column("cached", _cached, _cached_share, is_number=True),
        Column(
            "output",
            lambda s, _: _number(s.completion_tokens),
            lambda s: s.completion_tokens,
            is_number=True,
        ),
        Column("on", lambda s, _: s.decode_worker or "-", lambda s: s.decode_worker),
        Column("tenant", lambda s, _: s.tenant or "-", lambda s: s.tenant, of_tenants=True),
    ),
    lambda snapshot: snapshot.sessions.recent,
    lambda s: f"{s.tenant}/{s.session_id}",
    "No session had a turn here yet.",
)
