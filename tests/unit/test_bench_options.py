"""What `baton bench` makes of its options, before it connects, and how it shows that it runs."""

import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.bench.arrivals import ArrivalPattern
from baton.bench.levels import Level, Plan
from baton.bench.openai_target import OpenAiTarget
from baton.bench.prompts import PromptKind
from baton.bench.runner import Limits, Phase
from baton.bench.target import Described, Options
from baton.cli.app import app
from baton.cli.bench_options import BenchOptions, load_trace, plan_of, prompt_kind, requests_of
from baton.cli.bench_view import ProgressView
from baton.errors import InvalidRequestError

TRACE = Path("trace.jsonl")
GRPC = Described(name="here", model="m", vocab_size=50, eos_token_ids=(0,))
HTTP = Described(name="here", model="m")


def plan(**given: object) -> Plan:
    return plan_of(BenchOptions(**given), None)  # type: ignore[arg-type]


def test_nothing_asked_is_one_request_after_another() -> None:
    assert plan() == Plan(levels=(Level(concurrency=1),), requests=100)
    assert plan(duration_s=5).requests is None


def test_lists_are_sweeps() -> None:
    assert plan(concurrency="1,2,8").levels == tuple(Level(concurrency=n) for n in (1, 2, 8))
    assert plan(rate="0.5, 2").levels == tuple(Level(rate_per_s=rate) for rate in (0.5, 2.0))
    assert plan(rate="3", max_concurrency=4).levels == (Level(rate_per_s=3.0, concurrency=4),)
    assert plan(trace=TRACE, max_concurrency=4).levels == (Level(replayed=True, concurrency=4),)


def test_arrivals_are_poisson_unless_something_else_is_asked() -> None:
    assert plan(rate="1").pattern is ArrivalPattern.POISSON
    assert plan(rate="1", fixed_rate=True).pattern is ArrivalPattern.FIXED
    gamma = plan(rate="1", burstiness=0.5)
    assert (gamma.pattern, gamma.burstiness) == (ArrivalPattern.GAMMA, 0.5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"rate": "1", "concurrency": "1"},
            "--concurrency: cannot go with --rate; .*--max-concurrency",
        ),
        ({"rate": "1", "trace": TRACE}, "--trace: cannot go with --rate"),
        ({"burstiness": 1.0}, "--burstiness: .*without --rate"),
        ({"fixed_rate": True, "concurrency": "2"}, "--fixed-rate: .*without --rate"),
        ({"rate": "1", "fixed_rate": True, "burstiness": 2.0}, "--burstiness: cannot go with"),
        ({"speed": 2.0}, "--speed: .*without --trace"),
        ({"length_scale": 2.0}, "--length-scale: .*without --trace"),
        ({"max_concurrency": 2}, "--max-concurrency: .*without"),
        ({"prompts": TRACE, "isl": "3"}, "--isl: cannot go with --prompts"),
        ({"prompts": TRACE, "trace": TRACE}, "--prompts: cannot go with --trace"),
        ({"trace": TRACE, "isl": "3"}, "--isl: cannot go with --trace"),
        ({"trace": TRACE, "osl": "3"}, "--osl: cannot go with --trace"),
        ({"rate": "0"}, "--rate: '0' is no positive number"),
        ({"rate": "nan"}, "--rate: "),
        ({"rate": "1,,2"}, "--rate: "),
        ({"concurrency": "1.5"}, "--concurrency: "),
        ({"concurrency": "2000000"}, "--concurrency: "),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    given: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        plan(**given)


def test_prompts_travel_as_the_server_likes_them_best() -> None:
    assert prompt_kind(BenchOptions()) is PromptKind.TOKENS
    assert prompt_kind(BenchOptions(tokenizer="t")) is PromptKind.TEXT
    assert prompt_kind(BenchOptions(prompts=TRACE)) is PromptKind.TEXT
    assert prompt_kind(BenchOptions(url="http://x")) is PromptKind.CHAT
    assert prompt_kind(BenchOptions(url="http://x", prompt_as=PromptKind.TEXT)) is PromptKind.TEXT


@pytest.mark.parametrize(
    ("given", "described", "named"),
    [
        ({"url": "http://x"}, HTTP, "--tokenizer: is needed to write"),
        ({"url": "http://x", "prompt_as": PromptKind.TOKENS}, HTTP, "does not tell its vocabulary"),
        ({"prompt_as": PromptKind.TOKENS, "prompts": TRACE}, GRPC, "--prompts: are texts"),
        ({"isl": "x"}, GRPC, "--isl: "),
        ({"osl": "x"}, GRPC, "--osl: "),
    ],
)
def test_requests_that_cannot_be_written_are_refused(
    given: dict[str, object], described: Described, named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        requests_of(BenchOptions(**given), None, described, None)  # type: ignore[arg-type]


def test_a_trace_is_scaled_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = '{"timestamp": %d, "input_length": 1000, "output_length": 100, "hash_ids": [1, 2]}\n'
    path.write_text("".join(line % at_ms for at_ms in (500, 1500, 2500)))
    options = BenchOptions(trace=path, requests=2, speed=2, length_scale=0.1)
    trace = load_trace(options)
    assert trace is not None
    assert plan_of(options, trace).trace_times_s == (0, 0.5)
    assert trace.block_tokens == 51
    requests, warm_up = requests_of(options, trace, GRPC, None)
    assert [each.input_tokens for each in requests] == [100, 100]
    assert next(warm_up).input_tokens == 128


@pytest.mark.parametrize(
    ("args", "module"),
    [(["--url", "http://127.0.0.1:1"], "aiohttp"), (["--plots", "x"], "matplotlib")],
)
def test_what_the_extra_brings_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, args: list[str], module: str
) -> None:
    monkeypatch.setattr("baton.cli.bench_run.find_spec", lambda _: None)
    done = CliRunner().invoke(app, ["bench", "-a", "127.0.0.1:1", *args])
    assert done.exit_code == 2
    assert f"{args[0]}: needs {module}: pip install -e '.[bench]'" in done.output


@pytest.mark.parametrize("terminal", [True, False])
async def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(*, terminal: bool) -> None:
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    view = ProgressView(console, 5.0)
    phase = Phase(OpenAiTarget("http://x", Options()), Limits(concurrency=1))
    view.preparing("4 at once", 32, 64)
    view.began("4 at once", phase, 64)
    view.ended()
    phase.began_s, phase.ended, phase.running, phase.failed = time.perf_counter() - 3, 7, 2, 1
    view.began("4 at once", phase, 64)
    view.ended()
    view.began("4 at once", phase, None)
    view.ended()
    assert "7 ended" in shown.getvalue() or "7 of 64 ended, 2 running, 1 failed" in shown.getvalue()
    assert ("preparing requests" in shown.getvalue()) == terminal
