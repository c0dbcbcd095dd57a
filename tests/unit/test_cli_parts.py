"""The parts of the command line that need no server."""

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
from datetime import datetime
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from rich.console import Console
from typer.testing import CliRunner

from baton.cli import leash
from baton.cli.app import app
from baton.cli.backoff import Backoff
from baton.cli.banner import Announcer, effective
from baton.cli.config import ServeConfig, Transport, with_ports
from baton.cli.console import delays_told, report, seconds, size
from baton.cli.demo_examples import load_questions
from baton.cli.demo_view import Asked, bar, segments, timelines
from baton.cli.ports import DRAWN
from baton.cli.router_process import environment
from baton.cli.serve import serve
from baton.client import Attempt, Result, Timings, Usage
from baton.engine.config import EngineConfig
from baton.engine.sim import SimConfig
from baton.errors import CapacityError, ModelLoadError, UnavailableError
from baton.service.settings import LogFormat, LogLevel, RouterSettings
from baton.service.status import DETAILS_KEY, to_status
from baton.types import FinishReason, Role

NOTHING = Timings(
    admitted_at_s=None,
    placed_at_s=None,
    reserved_at_s=None,
    prefill_started_at_s=None,
    first_token_at_s=None,
    kv_received_at_s=None,
    last_token_at_s=None,
    finished_at_s=None,
    prefill_queue_s=0.0,
    prefill_s=0.0,
    handoff_s=0.0,
    handoff_bytes=0,
    preemptions=0,
)
SPLIT = Timings(
    admitted_at_s=0.01,
    placed_at_s=0.1,
    reserved_at_s=0.2,
    prefill_started_at_s=0.3,
    first_token_at_s=0.6,
    kv_received_at_s=0.7,
    last_token_at_s=1.0,
    finished_at_s=1.0,
    prefill_queue_s=0.1,
    prefill_s=0.3,
    handoff_s=0.1,
    handoff_bytes=1024,
    preemptions=0,
)
LOCAL = Timings(
    admitted_at_s=0.01,
    placed_at_s=0.1,
    reserved_at_s=0.2,
    prefill_started_at_s=None,
    first_token_at_s=0.6,
    kv_received_at_s=0.6,
    last_token_at_s=1.0,
    finished_at_s=1.0,
    prefill_queue_s=0.0,
    prefill_s=0.0,
    handoff_s=0.0,
    handoff_bytes=0,
    preemptions=0,
)


def config(**changes: object) -> ServeConfig:
    return ServeConfig(engine=SimConfig(), tokenizer="bytes", **changes)  # type: ignore[arg-type]


def names(timings: Timings) -> str:
    return "".join(stage.letter for stage, _, _ in segments(timings))


def test_a_timeline_has_the_stages_that_happened_in_order() -> None:
    assert names(SPLIT) == "qrwPhD"
    assert names(LOCAL) == "qrPD"
    assert names(NOTHING) == ""


def test_a_timeline_leaves_no_gap_between_stages() -> None:
    found = segments(SPLIT)
    assert [start for _, start, _ in found[1:]] == [end for _, _, end in found[:-1]]


def test_a_bar_has_its_width_whatever_the_times_are() -> None:
    for offset_s, total_s in [(0.0, 1.0), (0.5, 1.5), (0.0, 1e-9), (5.0, 1.0), (0.0, 1000.0)]:
        for timings in (SPLIT, LOCAL, NOTHING):
            assert len(bar(timings, offset_s=offset_s, total_s=total_s, width=20)) == 20


def test_a_bar_is_to_scale() -> None:
    assert bar(SPLIT, offset_s=0.0, total_s=1.0, width=10).plain == "qrwPPPhDDD"
    assert bar(SPLIT, offset_s=1.0, total_s=2.0, width=20).plain == " " * 10 + "qrwPPPhDDD"


def result(text: str) -> Result:
    return Result(
        request_id="r",
        model="m",
        text=text,
        token_ids=(1, 2),
        logprobs=(),
        finish_reason=FinishReason.STOP,
        stop_string=None,
        stop_token_id=None,
        completions=(),
        seed=1,
        usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=2),
        timings=SPLIT,
        attempts=(
            Attempt(
                prefill_worker="prefill-0", decode_worker="decode-0", failure="", resumed_tokens=0
            ),
        ),
    )


def write_examples(path: Path) -> Path:
    tales = [
        {
            "story": f"Tale {tale}.",
            "questions": [
                {"question": f"Q{turn}?", "answer": f"A{turn}.", "key": f"A{turn}"}
                for turn in range(2)
            ],
        }
        for tale in range(2)
    ]
    path.write_text(json.dumps(tales))
    return path


def test_questions_take_one_of_each_tale_in_turn(tmp_path: Path) -> None:
    path = write_examples(tmp_path / "examples.json")
    found = load_questions(path, 5, temperature=0.5, seed=10)
    assert [(q.story, q.question) for q in found] == [
        ("Tale 0.", "Q0?"),
        ("Tale 1.", "Q0?"),
        ("Tale 0.", "Q1?"),
        ("Tale 1.", "Q1?"),
        ("Tale 0.", "Q0?"),
    ]
    assert [q.sampling.seed for q in found] == [11, 12, 13, 14, 15]
    assert found[0].is_right("It is A0.")
    assert not found[0].is_right("It is A1.")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '[{"story": "x"}]', "[1]"])
def test_unusable_examples_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "examples.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelLoadError, match=r"examples\.json"):
        load_questions(path, 1, temperature=0.0, seed=0)


def test_the_table_tells_right_from_wrong(tmp_path: Path) -> None:
    right, wrong = load_questions(
        write_examples(tmp_path / "examples.json"), 2, temperature=0.0, seed=0
    )
    console = Console(file=StringIO(), width=160)
    console.print(
        timelines([Asked(right, result("A0"), 0.0), Asked(wrong, result("no"), 0.5)], 160)
    )
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    (first,) = [line for line in lines if line.strip().startswith("1 ")]
    (second,) = [line for line in lines if line.strip().startswith("2 ")]
    assert "right" in first
    assert "wrong" in second
    assert "1.0 KiB in 100.0 ms" in first
    assert re.search(r" 10 +4 ", first)
    assert "P0>D0" in first


def test_pauses_double_and_a_long_life_forgives() -> None:
    backoff = Backoff(first_s=1.0, most_s=4.0, healthy_s=60.0)
    assert [backoff.after(0.1) for _ in range(4)] == [1.0, 2.0, 4.0, 4.0]
    assert backoff.after(61.0) == 1.0
    assert backoff.after(0.1) == 2.0


def test_port_zero_becomes_two_different_free_ports() -> None:
    """Promise: ports that are drawn stay the router's while it is down, for kernels give away others."""
    resolved = with_ports(config(port=0, metrics_port=0))
    assert resolved.port in DRAWN
    assert resolved.metrics_port in DRAWN
    assert resolved.port != resolved.metrics_port
    assert with_ports(config(port=7, metrics_port=8)).port == 7


def test_clients_are_told_an_address_that_they_can_reach() -> None:
    assert config(host="0.0.0.0", port=7).address == "127.0.0.1:7"  # noqa: S104
    assert config(host="10.0.0.1", port=7).address == "10.0.0.1:7"


def test_workers_have_stable_names_and_prefill_comes_first() -> None:
    workers = config(prefill=1, decode=2, fleet_port=7).workers({})
    assert [role for role, _ in workers] == [Role.PREFILL, Role.DECODE, Role.DECODE]
    assert [s.worker_id for _, s in workers] == ["prefill-0", "decode-0", "decode-1"]
    assert {s.routers for _, s in workers} == {("127.0.0.1:7",)}


def test_workers_share_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `taskset` or a container leaves them, not the machine's."""
    run = Mock(return_value=True)
    monkeypatch.setattr("baton.cli.serve.run", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5, 7})
    serve(port=0, metrics_port=0)
    engine = run.call_args.args[0].engine
    assert isinstance(engine, EngineConfig)
    assert (engine.threads, engine.most_threads) == (2, 4)


def test_the_router_process_reads_back_what_serve_was_told() -> None:
    chosen = config(
        port=7,
        metrics_port=8,
        drain_grace_s=1.5,
        local_prefill_tokens=0,
        log_format=LogFormat.JSON,
        log_level=LogLevel.ERROR,
    )
    settings = RouterSettings.from_env(environment(chosen))
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 7, 8)
    assert (settings.drain_grace_s, settings.local_prefill_tokens) == (1.5, 0)
    assert (settings.log_format, settings.log_level) == (LogFormat.JSON, LogLevel.ERROR)
    assert settings.model == "bytes"


def test_the_effective_configuration_has_every_setting() -> None:
    shown = effective(config(transport=Transport.MEMORY))
    assert shown["transport"] == "memory"
    assert shown["num_blocks"] == SimConfig().num_blocks
    assert shown["drain_grace_s"] == 30.0


def test_with_json_logs_every_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    announcer = Announcer(Console(stderr=True), LogFormat.JSON)
    with announcer.starting("loading"):
        announcer.event("hello")
    announcer.ready(config(port=7))
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert [event["message"] for event in events] == ["loading", "hello"]
    # As in the services' own lines, so that one reader takes all.
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in events)
    assert json.loads(captured.out)["address"] == "127.0.0.1:7"


def test_durations_and_sizes_read_as_people_write_them() -> None:
    assert [seconds(value) for value in (None, 0.0032, 1.25)] == ["-", "3.2 ms", "1.25 s"]
    assert [size(value) for value in (5, 2048, 3 * 2**20)] == ["5 B", "2.0 KiB", "3.0 MiB"]


def test_an_error_comes_with_advice_and_without_markup_tricks() -> None:
    console = Console(file=StringIO(), width=100)
    report(console, UnavailableError("no [bold]server[/]"))
    report(console, CapacityError("full", retry_after_s=2.5))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "no [bold]server[/]" in text
    assert "baton serve" in text
    assert "2.5 s" in text


def test_advice_is_for_what_was_unavailable() -> None:
    """Promise: nobody is told to start a server by the word of one that serves."""
    no_worker = UnavailableError("no worker has joined")
    trailers = Metadata((DETAILS_KEY, to_status(no_worker).SerializeToString()))
    no_worker.__cause__ = AioRpcError(
        grpc.StatusCode.UNAVAILABLE, Metadata(), trailers, no_worker.message, ""
    )
    console = Console(file=StringIO(), width=100)
    report(console, no_worker)
    assert isinstance(console.file, StringIO)
    assert "baton serve" not in console.file.getvalue()
    assert "baton fleet" in console.file.getvalue()


def test_a_model_that_is_there_is_not_asked_for_again() -> None:
    console = Console(file=StringIO(), width=100)
    report(console, ModelLoadError("tales", "device is cuda, but this machine has no CUDA device"))
    assert isinstance(console.file, StringIO)
    assert "--model" not in console.file.getvalue()
    report(console, ModelLoadError("tales", "is not a directory"))
    assert "--model" in console.file.getvalue()


@pytest.mark.parametrize(("option", "value"), [("--dtype", "float99"), ("--device", "tpu")])
def test_what_no_engine_has_is_refused_before_anything_starts(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["serve", option, value])
    assert (done.exit_code, option in done.output) == (2, True)


def test_a_delay_is_told_once_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("baton.client.recovery")
    with delays_told():
        for reason in ("no worker", "no worker", "connection reset"):
            log.info("asked for again: %s", reason)
    log.info("asked for again: nobody listens now")
    told = capsys.readouterr()
    assert told.err == "asked for again: no worker\nasked for again: connection reset\n"
    assert told.out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_a_leashed_child_dies_with_its_parent() -> None:
    """Promise: even a `baton serve` that is killed leaves no router behind."""
    parent_code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {leash.__file__!r}, 'http.server', '0', '--bind', '127.0.0.1'],\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)\n"
        "time.sleep(0.5)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        try:
            parent.send_signal(signal.SIGKILL)
            parent.wait(10)
            assert _ends(descriptor, 10)
        finally:
            os.close(descriptor)


def _ends(descriptor: int, timeout_s: float) -> bool:

    readable, _, _ = select.select([descriptor], [], [], timeout_s)
    return bool(readable)
