"""`baton bench` as a person uses it, against a running server."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.bench.figures import figures_of
from baton.bench.report import read_report
from baton.cli.app import app
from baton.cli.config import shipped_model
from tests.served import Serve, Served, baton

pytestmark = [pytest.mark.e2e]

SIM = ("--engine", "sim", "--transport", "memory")


def bench(served: Served, *args: str, timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    return baton("bench", "-a", served.address, "--seed", "1", *args, timeout_s=timeout_s)


def start(served: Served, *args: str) -> "subprocess.Popen[str]":
    """A run in the background; its progress comes on stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "baton", "bench", "-a", served.address, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_shows_each_level_and_writes_what_all_of_it_follows_from(
    shared: Served, tmp_path: Path
) -> None:
    """The file's records give the file's figures; the plots are there; objectives may stand one after another."""
    path, plots = tmp_path / "run.json", tmp_path / "plots"
    done = bench(
        shared,
        *("-c", "1,3", "-n", "8", "--isl", "40", "--osl", "uniform:2:6", "--warmup", "2"),
        *("--goodput", "ttft:60000", "tpot:60000", "--json", str(path), "--plots", str(plots)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 at once: 8 of 8 answered" in done.stdout
    assert "3 at once: 8 of 8 answered" in done.stdout
    assert "100.0 % of all (8; 8 since due) met ttft:60000 tpot:60000" in done.stdout
    assert "All levels" in done.stdout
    report = read_report(path, ())
    written = json.loads(path.read_text())
    for level, raw in zip(report.levels, written["levels"], strict=True):
        figures = figures_of(level.records)
        assert figures.answered == raw["figures"]["answered"] == 8
        assert figures.input_tokens == 8 * 40
        assert figures.output_tokens == sum(r.planned_output_tokens or 0 for r in level.records)
        assert figures.ttft_s is not None
        assert figures.ttft_s.p90 == pytest.approx(raw["figures"]["ttft_s"]["p90"], abs=1e-5)
        assert all(record.timings is not None for record in level.records)
    assert {each.name for each in plots.iterdir()} == {
        "latencies.png",
        "sweep.png",
        "requests-1.png",
        "requests-2.png",
    }
    again = baton("bench", "--from", str(path), "--goodput", "ttft:0.0001")
    assert again.returncode == 0
    assert "0.0 % of all (0; 0 since due) met ttft:0.0001" in again.stdout


def test_the_same_seed_is_the_same_load(shared: Served) -> None:
    def load() -> object:
        done = bench(shared, "--rate", "200", "-n", "6", "--osl", "uniform:1:9", "--json", "-")
        (level,) = json.loads(done.stdout)["levels"]
        return [(r["planned_output_tokens"], round(r["scheduled_s"], 5)) for r in level["requests"]]

    assert load() == load()


def test_a_trace_is_replayed_with_its_prefixes(shared: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"timestamp": %d, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2, %d]}\n'
    trace.write_text("".join(line % (at_ms, at_ms) for at_ms in (0, 2000, 4000)))
    done = bench(shared, "--trace", str(trace), "--speed", "8", "--json", "-")
    assert done.returncode == 0
    assert "replay: 3 of 3 answered" in done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    assert [request["prompt_tokens"] for request in level["requests"]] == [1100] * 3
    assert [request["cached_tokens"] for request in level["requests"]][1:] == [1024] * 2
    assert level["requests"][2]["sent_s"] >= 0.5


def test_texts_and_chats_and_files_travel_too(shared: Served, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe cat\n")
    model = str(shipped_model())
    for args in (
        ("--tokenizer", model, "--isl", "20"),
        ("--tokenizer", model, "--prompt-as", "chat"),
        ("--prompts", str(prompts), "--prompt-as", "chat"),
        ("--prompts", str(prompts), "--ignore-eos"),
    ):
        done = bench(shared, "-n", "4", "--osl", "3", *args, "--json", "-")
        assert done.returncode == 0, done.stderr
        (level,) = json.loads(done.stdout)["levels"]
        assert [request["status"] for request in level["requests"]] == ["OK"] * 4
        if "--isl" in args:
            assert [request["prompt_tokens"] for request in level["requests"]] == [20] * 4


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("--rate", "1", "--concurrency", "2"), 2, "--concurrency: cannot go with --rate"),
        (("--goodput", "fast:1"), 2, "none of ttft:MS"),
        (("tpot:5",), 2, "tpot:5: is no option"),
        (("--isl", "many"), 2, "--isl"),
        (("--trace", "nowhere.jsonl"), 2, "No such file"),
        (("--json", "/nowhere/run.json"), 2, "cannot be written"),
        (("--plots", "/dev/null/x", "-n", "1"), 2, "cannot be written"),
        (("--model", "another"), 2, "no model named 'another'"),
        (("--prompt-as", "text"), 2, "--tokenizer"),
        (("--tokenizer", "/nowhere"), 1, "/nowhere"),
        (("--url", "ftp://here"), 2, "--url"),
        (("--url", "http://127.0.0.1:1", "-m", "m"), 1, "127.0.0.1:1"),
        (("--address", "127.0.0.1:1"), 1, "Is a server running there?"),
        (("--from", "/dev/null"), 2, "no report of"),
        (("--isl", "100000", "-n", "2"), 1, "leaves no room for output"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    shared: Served, args: tuple[str, ...], code: int, told: str
) -> None:
    done = CliRunner().invoke(app, ["bench", "-a", shared.address, *args])
    assert done.exit_code == code, done.output
    assert told in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_ctrl_c_shows_what_there_is_so_far(shared: Served, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    running = start(shared, "--rate", "20", "--duration", "600", "--json", str(path))
    with running:
        assert running.stderr is not None
        assert "running" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert re.search(r"20/s: \d+ of \d+ answered", out)
    assert "Stopped before the end" in err
    assert "Traceback" not in err
    (level,) = json.loads(path.read_text())["levels"]
    assert level["interrupted"]
    assert level["figures"]["answered"] > 0


def test_simulated_steps_take_as_long_as_they_are_told(serve: Serve) -> None:
    served = serve(*SIM, "--step-ms", "20")
    done = bench(served, "-n", "3", "--osl", "10", "--json", "-")
    (level,) = json.loads(done.stdout)["levels"]
    assert level["figures"]["answered"] == 3
    assert level["figures"]["itl_s"]["min"] >= 0.015
    assert level["figures"]["e2e_s"]["min"] >= 9 * 0.02
    refused = baton("serve", "--step-ms", "20")
    assert refused.returncode == 2
    assert "--step-ms" in refused.stderr


def test_a_server_that_dies_midway_is_told_with_what_there_was(serve: Serve) -> None:
    served = serve(*SIM)
    running = start(served, "-c", "2", "--duration", "600", "--give-up", "0.5", "--osl", "200")
    with running:
        assert running.stderr is not None
        line = running.stderr.readline()
        assert "running" in line, line
        served.stop(signal.SIGKILL)
        out, err = running.communicate(timeout=40)
    assert running.returncode == 1, err
    assert re.search(r"2 at once: [1-9]\d* of \d+ answered", out)
    assert "UNAVAILABLE" in out
    assert "error: the server was lost" in err
    assert "Traceback" not in err
