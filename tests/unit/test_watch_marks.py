"""Bars, sparklines and timelines in a terminal's cells."""

from dataclasses import replace

from baton.cli.watch.marks import bytes_per_s, duration, kv_bar, short, span, sparkline, timeline
from router.status.snapshot import (
    AttemptStatus,
    KvBlocks,
    RequestState,
    RequestStatus,
    StageName,
    StageStatus,
)


def attempt(failure: str, *begun: tuple[str, float], end_s: float | None) -> AttemptStatus:
    ends = [at_s for _, at_s in begun[1:]] + [end_s]
    return AttemptStatus(
        choice=0,
        prefill_worker="p",
        decode_worker="d",
        stages=tuple(
            StageStatus(stage=StageName(stage), start_s=at_s, end_s=ended_s)
            for (stage, at_s), ended_s in zip(begun, ends, strict=True)
        ),
        failure=failure,
        resumed_tokens=0,
        handoff_s=0.0,
        handoff_bytes=0,
    )


REQUEST = RequestStatus(
    serial=1,
    request_id="r",
    tenant="",
    state=RequestState.RUNNING,
    waits_for="decode",
    session_id="",
    priority=0,
    received_unix_s=100.0,
    age_s=8.0,
    admitted_s=0.0,
    placed_s=2.0,
    first_token_s=4.0,
    last_token_s=8.0,
    prompt_tokens=1,
    cached_tokens=0,
    completion_tokens=1,
    max_tokens=2,
    choices=1,
    attempts=(
        attempt(
            "", ("reserve", 2.0), ("prefill", 2.001), ("handoff", 4.0), ("decode", 4.02), end_s=None
        ),
    ),
    error="",
)


def test_a_timeline_ends_now_and_loses_no_stage() -> None:
    """Two seconds of queue and prefill each, a handoff too short for its cell, decode until now; what nobody could see is left out."""
    assert timeline(REQUEST, 108.0, 10.0, 10).plain == "  ░░▓◆████"


def test_a_failed_attempt_is_marked_where_it_ended() -> None:
    first = attempt("UNAVAILABLE: gone", ("decode", 0.0), end_s=4.0)
    second = attempt("", ("decode", 5.0), end_s=8.0)
    told = replace(REQUEST, placed_s=0.0, attempts=(first, second), state=RequestState.FINISHED)
    assert timeline(told, 110.0, 10.0, 10).plain == "████✕████ "


def test_what_ended_before_the_window_leaves_it_blank() -> None:
    assert timeline(REQUEST, 300.0, 10.0, 10).plain == " " * 10


def test_a_pool_fills_its_bar_and_what_there_is_at_all_is_seen() -> None:
    kv = KvBlocks(total=1000, free=697, cached=200, reserved=1, used=100, in_flight=2)
    assert kv_bar(kv, 10).plain == "█◆▒▪▪·····"
    empty = KvBlocks(total=1000, free=1000, cached=0, reserved=0, used=0, in_flight=0)
    assert kv_bar(empty, 10).plain == "·" * 10


def test_a_sparkline_shows_the_highest_of_each_part_and_gaps() -> None:
    assert sparkline([0.0, 4.0, None, None, 8.0, 1.0], 3) == "▅ █"
    assert sparkline([None] * 4, 2) == "  "
    assert sparkline([0.0] * 4, 2) == "▁▁"


def test_numbers_read_as_people_write_them() -> None:
    told = [duration(each) for each in (None, 0.0032, 0.84, 12.5, 185.0)]
    assert told == ["-", "3.2 ms", "840 ms", "12.5 s", "3 min 5 s"]
    assert [span(each) for each in (12, 7440, 90000)] == ["12 s", "2 h 4 min", "1 d 1 h"]
    assert [bytes_per_s(each) for each in (0, 2048, 3.5 * 2**20)] == [
        "0 B/s",
        "2.0 KiB/s",
        "3.5 MiB/s",
    ]
    assert short("c-0123456789abcdef0123") == "c-0123456…ef0123"
