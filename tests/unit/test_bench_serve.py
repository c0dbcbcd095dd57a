"""What `benchmarks.serve` makes of its samples, and how it counts a server's CPU time."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve.cpu import cpu_by_kind
from benchmarks.serve.load import medians
from benchmarks.serve.plots import plot_growth, plot_load
from benchmarks.serve.split import summarized


def cell(rate: float, number: int, ttft_ms: float | None) -> dict[str, Any]:
    return {
        "rate_per_s": rate,
        "round": number,
        "ttft_ms_p50": ttft_ms,
        "failed": 0,
        "by_process": {"router": 1.0},
    }


def test_a_rate_is_told_by_the_median_of_its_rounds() -> None:
    cells = [cell(1, 0, 10), cell(2, 0, 50), cell(1, 1, 30), cell(2, 1, None), cell(1, 2, 11)]
    first, second = medians(cells)
    assert (first["rate_per_s"], first["rounds"], first["ttft_ms_p50"]) == (1, 3, 11)
    assert (second["rate_per_s"], second["rounds"], second["ttft_ms_p50"]) == (2, 2, 50)
    assert "round" not in first


def sample(tokens_per_s: float, cpu_us: float) -> dict[str, Any]:
    return {
        "tokens_per_s": tokens_per_s,
        "cpu_us_per_token": cpu_us,
        "by_process": {"ray": cpu_us / 2, "engines": cpu_us / 2},
    }


def test_the_split_is_compared_round_by_round() -> None:
    """Promise: a machine whose speed changes between rounds, for both alike, changes no ratio."""
    found = summarized(
        {
            "single": [sample(100, 10), sample(10, 100), sample(50, 20)],
            "split": [sample(90, 11), sample(9, 110), sample(45, 22)],
        }
    )
    split, single = found["split"], found["single"]
    assert (split["tokens_per_s_ratio"], split["cpu_us_per_token_ratio"]) == (0.9, 1.1)
    assert (single["tokens_per_s_ratio"], single["cpu_us_per_token_ratio"]) == (1, 1)
    assert (split["own_share"], single["own_share"]) == (0.05, 0)
    assert split["by_process"] == {"ray": 11, "engines": 11}


def used_by(name: str, program: str) -> dict[str, float]:
    """What a Python program of that name, as `ps` shows it, has used when it says that it is done; it then waits for a line."""
    with subprocess.Popen(
        [name, "-c", program],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        used = cpu_by_kind(process.pid)
        process.communicate("\n", timeout=20)
    assert cpu_by_kind(process.pid) == {}
    return used


def test_cpu_time_of_descendants_counts_and_of_others_does_not() -> None:
    work = "sum(i for i in range(10_000_000)); print('done', flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}, '-m router'])"
    assert used_by(sys.executable, child)["router"] >= 0.05


def test_the_time_of_threads_that_compute_is_told_by_itself() -> None:
    """Promise: of a worker's time, `engines` is what engines' threads take, by the name they have, and `workers` the rest."""
    program = """
import asyncio, sys, time
from contextlib import suppress
from baton.engine.aio import AsyncEngine

def compute():
    end_s = time.thread_time() + 0.4
    while time.thread_time() < end_s:
        pass
    print("done", flush=True)
    input()
    sys.exit(0)

with suppress(SystemExit):
    asyncio.run(AsyncEngine(compute, name="test").start())
"""
    used = used_by("ray::FlexActor", program)
    assert used["engines"] == pytest.approx(0.4, abs=0.1)
    # Imports, on the main thread.
    assert used["workers"] > 0.05


ROWS: list[dict[str, Any]] = [
    {"rate_per_s": 1.0, "ttft_ms_p50": 3.0, "itl_ms_p50": None},
    {"rate_per_s": 2.0},
]


@pytest.mark.parametrize("kind", ["load", "growth"])
def test_pictures_are_drawn_of_whatever_there_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.svg"
    if kind == "load":
        plot_load({"qwen": {"split": ROWS}, "smollm2": {"vllm": ROWS, "single": []}}, path)
    else:
        plot_growth({"streams": [{"streams": 1, "cpu_us_per_token": 2.0}], "context": []}, path)
    assert path.read_text().rstrip().endswith("</svg>")
