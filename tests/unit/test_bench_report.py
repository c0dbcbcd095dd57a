"""The load generator's files: what is written can be computed again, and drawn."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.figures import parse_slos
from baton.bench.levels import Level
from baton.bench.plots import draw, stages
from baton.bench.records import UNFINISHED, Record
from baton.bench.report import Report, read_report, write_report
from baton.bench.target import Described
from baton.cli.bench_view import level_lines
from baton.errors import InvalidRequestError
from tests.unit.bench_records import TIMINGS, measured, record, records

SLOS = parse_slos(["ttft:150", "tpot:30"], "--goodput")
HERE = Described(name="here", model="m", vocab_size=256, eos_token_ids=(0,))


def report_of(*given_: Record) -> Report:
    level = measured(*given_, level=Level(rate_per_s=2.5, concurrency=3))
    return Report(target=HERE, settings={"rate": "2.5"}, slos=SLOS, levels=(level,))


def close(first: object, second: object) -> bool:
    """Equal but for the microseconds that are written."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(close(first[k], second[k]) for k in first)
    if isinstance(first, float) and isinstance(second, int | float):
        return first == pytest.approx(second, rel=1e-3, abs=1e-4)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return list(first) == list(second)
    return first == second


@given(st.lists(records, max_size=6))
def test_every_figure_follows_from_the_file(
    tmp_path_factory: pytest.TempPathFactory, given_: list[Record]
) -> None:
    path = tmp_path_factory.mktemp("report") / "run.json"
    # Microseconds are written, so that an objective is met or not by more than that.
    written = report_of(*given_)
    path.write_text(write_report(written))
    read = read_report(path, ())
    assert replace(read, levels=()) == replace(written, levels=(), slos=())
    (before,), (after,) = written.levels, read.levels
    assert (after.level, after.wall_s) == (before.level, before.wall_s)
    assert close(asdict(after.figures()), asdict(before.figures()))
    assert close(json.loads(path.read_text())["levels"][0]["figures"], asdict(before.figures(SLOS)))


def test_a_record_comes_back_whole(tmp_path: Path) -> None:
    one = replace(record(3, late_s=0.25), timings=TIMINGS, workers=["p>d"], request_id="r")
    path = tmp_path / "run.json"
    path.write_text(write_report(report_of(one)))
    ((back,),) = (level.records for level in read_report(path, ()).levels)
    assert back.timings == TIMINGS
    assert back.chunk_s == pytest.approx([at_s - 10 for at_s in one.chunk_s])
    assert replace(back, scheduled_s=0, sent_s=0, ended_s=0, chunk_s=[]) == replace(
        one, scheduled_s=0, sent_s=0, ended_s=0, chunk_s=[]
    )


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "other"}', '{"format": "baton-bench-1"}']
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match="no report of"):
        read_report(path, ())


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    level = measured(
        replace(record(0), timings=TIMINGS),
        record(1, late_s=0.3, gaps_s=()),
        record(2, status="RESOURCE_EXHAUSTED"),
        record(3, status=UNFINISHED),
        Record(index=4, scheduled_s=10.0),
    )
    failed = measured(record(0, status="ABORTED"))
    names = [path.name for path in draw([level, level, failed], tmp_path / "new", "a run")]
    assert names == [
        "latencies.png",
        "sweep.png",
        "requests-1.png",
        "requests-2.png",
        "requests-3.png",
    ]
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert draw([measured()], tmp_path, "nothing") == []


def test_a_requests_stages_follow_each_other_from_due_to_its_last_part() -> None:
    one = replace(record(late_s=0.25, ttft_s=0.1, gaps_s=[0.2]), timings=TIMINGS)
    spans = stages(one)
    assert [name for name, _, _ in spans] == [
        "late or waiting for room",
        "queue and place",
        "reserve blocks",
        "wait for prefill",
        "prefill",
        "to the first token",
        "tokens",
    ]
    assert spans[0][1] == one.scheduled_s
    assert spans[-1][2] == one.chunk_s[-1]
    for (_, _, end_s), (_, next_s, _) in pairwise(spans):
        assert end_s == next_s


@given(records, st.booleans())
def test_stages_never_run_backwards(one: Record, told: bool) -> None:  # noqa: FBT001
    one = replace(one, timings=TIMINGS if told else None)
    assert all(first_s < last_s for _, first_s, last_s in stages(one))


def test_a_busy_or_late_load_generator_says_so() -> None:
    open_loop = Level(rate_per_s=3.0)
    busy = measured(record(), client_cpu_s=1.9)
    late = measured(record(late_s=0.5), level=open_loop)
    fine = measured(record(), level=open_loop)
    capped = measured(record(late_s=0.5), level=Level(rate_per_s=3.0, concurrency=1))
    assert "95 % of a core" in level_lines(busy, busy.figures())[-1]
    assert "sent late" in level_lines(late, late.figures())[-1]
    for level in (fine, capped):
        assert not any("beware" in line for line in level_lines(level, level.figures()))


@pytest.mark.parametrize("message", ["", "no room"])
def test_failures_are_told_whether_or_not_the_server_said_why(message: str) -> None:
    failed = replace(record(status="503"), message=message)
    level = measured(failed, failed)
    told = [line for line in level_lines(level, level.figures()) if line.startswith("[red]")]
    assert "2 503" in told[0]
    assert ["no room" in line for line in told[1:]] == [True] * bool(message)
