"""Puts a load of `baton bench` on a server, in this process, and tells what it cost the server."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import uvloop

from baton.bench.figures import Figures, Slo
from baton.bench.grpc_target import GrpcTarget
from baton.bench.levels import Measured, Run
from baton.bench.openai_target import OpenAiTarget
from baton.bench.prompts import PromptKind
from baton.bench.runner import Phase
from baton.bench.target import Options, Target
from baton.cli.bench_options import BenchOptions, plan_of, requests_of
from benchmarks.serve.cpu import cpu_by_kind
from benchmarks.serve.systems import Server
from router.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A level of load, and what it took."""

    measured: Measured
    cpu_s: dict[str, float]
    """Of the server's processes, by kind."""

    def figures(self, slos: Sequence[Slo] = ()) -> Figures:
        return self.measured.figures(tuple(slos))

    @property
    def tokens(self) -> int:
        """Generated."""
        return self.figures().output_tokens

    @property
    def cpu_us_per_token(self) -> dict[str, float]:
        return {kind: 1e6 * spent / self.tokens for kind, spent in self.cpu_s.items()}


class _CpuWatch:
    """A `baton.bench.levels.Watcher` that reads the server's CPU time where a phase begins and where it ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before: dict[str, float] = {}
        self.spent: list[dict[str, float]] = []

    def preparing(self, what: str, done: int, total: int) -> None:
        """Nobody looks."""

    def began(self, what: str, phase: Phase, total: int | None) -> None:  # noqa: ARG002
        self._before = cpu_by_kind(self._pid)

    def ended(self) -> None:
        now = cpu_by_kind(self._pid)
        self.spent.append({kind: now[kind] - self._before.get(kind, 0.0) for kind in now})


def put_load(
    server: Server, options: BenchOptions, *, tokenizer: str | None = None
) -> list[Loaded]:
    """Each level of the options; prompts are token ids, of the server's vocabulary or the tokenizer's. Greedy, answers as long as asked."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_put_load(server, options, tokenizer))


async def _put_load(server: Server, options: BenchOptions, tokenizer: str | None) -> list[Loaded]:
    options = replace(options, prompt_as=PromptKind.TOKENS)
    asked = Options(temperature=0.0)
    target: Target = (
        OpenAiTarget(server.url, asked)
        if server.url
        else GrpcTarget(server.address, asked, connections=options.connections)
    )
    watch = _CpuWatch(server.pid)
    async with target:
        words = None if tokenizer is None else Tokenizer.load(tokenizer)
        requests, warm_up = requests_of(options, None, target.described, words)
        run = Run(
            target,
            plan_of(options, None),
            requests,
            warm_up=warm_up,
            watcher=watch,
            stop=asyncio.Event(),
        )
        await run.warm_up()
        watch.spent.clear()
        levels = [measured async for measured in run.levels()]
    for level in levels:
        if level.lost or not level.figures().answered:
            raise RuntimeError(f"{level.level}: no answers: {level.lost or level.figures().errors}")
    return [
        Loaded(measured=level, cpu_s=spent)
        for level, spent in zip(levels, watch.spent, strict=True)
    ]
