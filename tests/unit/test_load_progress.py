"""Progress while weights load: when it is told, and how it looks."""

import json
from io import StringIO
from itertools import pairwise

import pytest
from rich.console import Console

from baton.cli.banner import Announcer
from baton.engine.progress import FIRST_S, LINE_INTERVAL_S, Progress, in_words, paced
from baton.service.settings import LogFormat

MIB = 2**20
TOTAL = 15_360 * MIB


class Clock:
    """Stands still between tests' steps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def load_for(seconds: float, progress: Progress, clock: Clock) -> None:
    """Ten reports a second."""
    for step in range(int(seconds * 10)):
        progress(step * MIB, TOTAL)
        clock.now_s += 0.1


def test_a_short_load_is_not_told() -> None:
    told, clock = list[int](), Clock()
    progress = paced(lambda loaded, _: told.append(loaded), clock=clock)
    load_for(FIRST_S - 0.1, progress, clock)
    assert told == []


def test_a_long_load_is_told_once_in_each_interval() -> None:
    told, clock = list[float](), Clock()
    progress = paced(lambda *_: told.append(clock.now_s - 100.0), clock=clock)
    load_for(4 * LINE_INTERVAL_S, progress, clock)
    assert len(told) == 4
    assert told[0] == pytest.approx(FIRST_S, abs=0.11)
    assert all(b - a >= LINE_INTERVAL_S for a, b in pairwise(told))


def test_weights_are_told_in_mebibytes() -> None:
    assert in_words(512 * MIB, TOTAL) == "512 of 15,360 MiB of weights"


def test_without_a_terminal_a_load_is_a_line_now_and_then() -> None:
    clock, out = Clock(), StringIO()
    announcer = Announcer(Console(file=out), LogFormat.PLAIN, clock=clock)
    with announcer.starting("loading"), announcer.loading("decode-0") as progress:
        load_for(2 * LINE_INTERVAL_S, progress, clock)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("loading")
    assert len(lines) == 3
    assert all("decode-0 loaded" in line and "of 15,360 MiB" in line for line in lines[1:])


def test_with_json_logs_it_is_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    announcer = Announcer(Console(stderr=True), LogFormat.JSON, clock=clock)
    with announcer.loading("decode-0") as progress:
        load_for(1, progress, clock)
    (line,) = capsys.readouterr().err.splitlines()
    assert "of 15,360 MiB" in json.loads(line)["message"]


def test_on_a_terminal_each_worker_has_a_bar_until_it_is_up() -> None:
    clock, out = Clock(), StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    announcer = Announcer(console, LogFormat.PLAIN, clock=clock)

    def shown() -> str:
        """What the next redraw shows; a line printed above it forces one."""
        out.seek(0)
        out.truncate()
        announcer.event("-")
        return out.getvalue()

    with announcer.starting("loading"):
        with announcer.loading("prefill-0") as prefill, announcer.loading("decode-0") as decode:
            load_for(FIRST_S - 0.1, prefill, clock)
            assert "prefill-0" not in shown()
            load_for(1, prefill, clock)
            decode(0, TOTAL)
            text = shown()
            assert "prefill-0" in text
            assert "9 of 15,360 MiB" in text
            assert "━" in text
            assert "decode-0" not in text
        text = shown()
        assert "loading" in text
        assert "prefill-0" not in text
