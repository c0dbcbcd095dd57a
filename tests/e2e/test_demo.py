"""`baton demo` with the shipped model, at full length: what a newcomer sees first."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e]


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton", "demo", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
        env=os.environ | {"COLUMNS": "140", "NO_COLOR": "1"},
    )


def check(done: subprocess.CompletedProcess[str], questions: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of {questions} answers are the same" in done.stdout
    right = re.search(rf"(\d+) of {questions} answers are right", done.stdout)
    assert right is not None
    # The model is right more than nine times in ten; the questions are fixed, so this cannot flicker.
    assert int(right[1]) >= questions - 1
    rows = [line for line in done.stdout.splitlines() if ">D" in line]
    assert len(rows) == questions
    assert any(re.search(r"P+h", row) for row in rows), rows
    for row in rows:
        # A handoff shorter than a column may not be seen.
        assert re.search(r"P+h*D*", row), row
        assert re.search(r"[KM]iB in", row), row
    assert "\x1b" not in done.stdout
    assert "stopped" in done.stderr


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_split_over_ray_the_shipped_model_answers_as_one_process_does() -> None:
    """Promise: prefill and decode in different processes give the very tokens of one engine."""
    check(demo(), 8)


@pytest.mark.timeout(180)
def test_sampled_answers_are_the_same_too() -> None:
    """Promise: the noise depends on the seed and the position alone."""
    done = demo(
        "--transport",
        "memory",
        "-q",
        "4",
        "--temperature",
        "0.8",
        "--prefill",
        "2",
        "--decode",
        "2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 4 answers are the same" in done.stdout
