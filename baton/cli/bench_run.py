"""Carries out `baton bench`: connects, runs the levels under Ctrl-C, shows each as it ends, writes files. Its own event loop, in the main
thread.
"""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import uvloop

from baton.bench.figures import Slo
from baton.bench.grpc_target import GrpcTarget
from baton.bench.levels import Measured, Plan, Run
from baton.bench.prompts import TextTokenizer
from baton.bench.report import Report, read_report, write_report
from baton.bench.target import Options, Target
from baton.bench.traces import Trace
from baton.cli.bench_options import BenchOptions, load_trace, plan_of, prompt_kind, requests_of
from baton.cli.bench_view import ProgressView, level_lines, level_table, sweep_table
from baton.cli.connect import client_settings
from baton.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, report, stderr, stdout
from baton.cli.signals import StopSignals
from baton.errors import FieldViolation, InvalidRequestError, UnavailableError

STDOUT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is made of a run."""

    slos: tuple[Slo, ...] = ()
    json_file: str | None = None
    """`STDOUT` sends the tables to stderr."""
    plots: Path | None = None

    def check(self) -> None:
        """Raises `InvalidRequestError` for what cannot be written, before anything is measured."""
        if self.plots is not None:
            _require("matplotlib", "--plots")
        if self.json_file not in (None, STDOUT):
            assert self.json_file is not None
            _writing(self.json_file, lambda: Path(str(self.json_file)).touch())


def measure(options: BenchOptions, asked: Options, output: Output) -> int:
    """Returns the exit code. Raises `BatonError` for what keeps it from beginning."""
    output.check()
    trace = load_trace(options)
    plan = plan_of(options, trace)
    target = _target(options, asked)
    tokenizer = _tokenizer(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(_Job(options, plan, trace, tokenizer, output), target))


def show_again(path: Path, output: Output) -> None:
    """What a report has. Raises `InvalidRequestError`."""
    output.check()
    found = read_report(path, output.slos)
    for measured in found.levels:
        _show(measured, output)
    _conclude(found, output)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is known before there is a connection."""

    options: BenchOptions
    plan: Plan
    trace: Trace | None
    tokenizer: TextTokenizer | None
    output: Output


async def _measure(job: _Job, target: Target) -> int:
    options, plan, output = job.options, job.plan, job.output
    signals = StopSignals()
    levels: list[Measured] = []
    with signals.listening():
        async with target:
            described = target.described
            requests, warm_up = requests_of(options, job.trace, described, job.tokenizer)
            run = Run(
                target,
                plan,
                requests,
                warm_up=warm_up,
                watcher=ProgressView(stderr(), plan.duration_s),
                stop=signals.first,
            )
            warmed = await run.warm_up()
            if warmed is not None and warmed.lost:
                raise UnavailableError(f"the server was lost in the warm-up: {warmed.lost}")
            async for measured in run.levels():
                levels.append(measured)
                _show(measured, output)
    _conclude(
        Report(
            target=described,
            settings=_settings(options) | {"prompt_as": prompt_kind(options).value},
            slos=output.slos,
            levels=tuple(levels),
        ),
        output,
    )
    return _exit_code(levels, interrupted=signals.first.is_set())


def _exit_code(levels: list[Measured], *, interrupted: bool) -> int:
    if interrupted:
        stderr().print("Stopped before the end; what there was so far is above.")
        return EXIT_INTERRUPTED
    last = levels[-1]
    if last.lost:
        ended = sum(len(level.records) for level in levels)
        problem = f"the server was lost, and not there again at the end, after {ended} requests: {last.lost}"
        report(stderr(), UnavailableError(problem))
        return EXIT_FAILED
    return 0 if any(level.figures().answered for level in levels) else EXIT_FAILED


def _show(measured: Measured, output: Output) -> None:
    console = stderr() if output.json_file == STDOUT else stdout()
    figures = measured.figures(output.slos)
    console.print(level_table(measured, figures))
    for line in level_lines(measured, figures):
        console.print(line, soft_wrap=True)
    console.print()


def _conclude(found: Report, output: Output) -> None:
    """The summary of a sweep, and files."""
    console = stderr() if output.json_file == STDOUT else stdout()
    if len(found.levels) > 1:
        console.print(sweep_table([(each, each.figures(output.slos)) for each in found.levels]))
    text = write_report(found)
    if output.json_file == STDOUT:
        sys.stdout.write(text + "\n")
    elif output.json_file is not None:
        path = Path(output.json_file)
        _writing(output.json_file, lambda: path.write_text(text + "\n", encoding="utf-8"))
    if output.plots is not None:
        from baton.bench.plots import draw  # noqa: PLC0415 - matplotlib, of an extra

        directory = output.plots
        title = f"{found.target.model} at {found.target.name}"
        _writing(str(directory), lambda: draw(found.levels, directory, title))


def _target(options: BenchOptions, asked: Options) -> Target:
    api_key, connection = client_settings()
    if options.url is None:
        return GrpcTarget(
            options.address,
            asked,
            api_key=api_key,
            connection=connection,
            connections=options.connections,
        )
    _require("aiohttp", "--url")
    from baton.bench.openai_target import OpenAiTarget  # noqa: PLC0415 - aiohttp, of an extra

    return OpenAiTarget(options.url, asked, api_key=api_key, connection=connection)


def _tokenizer(options: BenchOptions) -> TextTokenizer | None:
    if options.tokenizer is None:
        return None
    from router.text import Tokenizer  # noqa: PLC0415 - a second, which most runs need not pay

    return Tokenizer.load(options.tokenizer)


def _require(module: str, option: str) -> None:
    if find_spec(module) is None:
        problem = f"needs {module}: pip install -e '.[bench]'"
        raise InvalidRequestError(FieldViolation(option, problem))


def _writing(name: str, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise InvalidRequestError(FieldViolation(name, problem)) from None


def _settings(options: BenchOptions) -> dict[str, object]:
    """As JSON has it."""
    return {
        name: str(value) if isinstance(value, Path | Enum) else value
        for name, value in asdict(options).items()
    }
