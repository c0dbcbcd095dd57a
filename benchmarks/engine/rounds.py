"""Runs the cells: engine after engine within a cell, cell after cell within a round, so that what the machine does to one it does to all.

Engines stay loaded between their turns, and wait for a line then. One that fails is told of, and left out of the rest of its shape.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.checkpoints import Checkpoint
from benchmarks.engine.limits import Limits, work
from benchmarks.engine.peers.base import Peer
from benchmarks.engine.processes import Process, Runner, RunnerError
from benchmarks.engine.protocol import Answer, Cell, percentile
from benchmarks.engine.results import Contender, Results, Sample

LIMITS_TIMEOUT_S = 300.0
COLD = "ready-cold"
STARTS = ("ready", COLD)
"""Cells that time a start; the cold one with nothing compiled before."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One sample to take."""

    number: int
    """Of the round."""
    cell: Cell
    contender: Contender


def turns(contenders: Sequence[Contender], cells: Sequence[Cell], rounds: int) -> Iterator[Turn]:
    """In order. Who comes first turns with the rounds: nobody always follows the same neighbour."""
    for number in range(rounds):
        for cell in cells:
            if cell.kind == COLD and number > 0:
                continue
            for place in range(len(contenders)):
                yield Turn(number, cell, contenders[(place + number) % len(contenders)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """One run. `save` is called after every sample: a run that is stopped loses none."""

    peers: Mapping[str, Peer]
    cache: Path
    machine: Process
    results: Results
    run: int
    rounds: int
    resume: bool
    """Leave out what the results have."""
    save: Callable[[], None]
    failures: list[str] = field(default_factory=list)

    def measure(
        self, checkpoint: Checkpoint, contenders: Sequence[Contender], cells: Sequence[Cell]
    ) -> None:
        """All rounds of one model."""
        failed: set[Contender] = set()
        runners: dict[Contender, Runner] = {}
        with ExitStack() as stack:
            for turn in turns(contenders, cells, self.rounds):
                if turn.contender in failed or not self._wanted(checkpoint, turn):
                    continue
                try:
                    if turn.cell.kind in STARTS:
                        sample = self._time_start(checkpoint, turn)
                    else:
                        if turn.contender not in runners:
                            runner = self._start(checkpoint, turn.contender)
                            runners[turn.contender] = stack.enter_context(runner)
                        sample = self._ask(checkpoint, turn, runners[turn.contender])
                except (RunnerError, OSError, subprocess.CalledProcessError) as error:
                    failed.add(turn.contender)
                    failure = f"{checkpoint.name}, {turn.contender}, {turn.cell.name}: {error}"
                    self.failures.append(failure)
                    print(failure, flush=True)
                    continue
                self.results.add(sample)
                self.save()
                print(_line(sample), flush=True)

    def _wanted(self, checkpoint: Checkpoint, turn: Turn) -> bool:
        if turn.cell.kind not in self.peers[turn.contender.peer].kinds:
            return False
        there = self.results.has(checkpoint.name, turn.cell, turn.contender, turn.number)
        return not (self.resume and there)

    def _start(
        self, checkpoint: Checkpoint, contender: Contender, compiled: Path | None = None
    ) -> Runner:
        peer = self.peers[contender.peer]
        peer.convert(checkpoint, contender.weight_format)
        name = f"{checkpoint.name}-{contender.peer}-{contender.weight_format}"
        return Runner(
            peer.command(checkpoint, contender.weight_format),
            peer.environment(compiled or self.cache / "compiled"),
            self.cache / "logs" / f"{name}.log",
        )

    def _time_start(self, checkpoint: Checkpoint, turn: Turn) -> Sample:
        """A process of its own, which ends again."""
        fresh = self.cache / "compiled-cold" if turn.cell.kind == COLD else None
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        with self._start(checkpoint, turn.contender, fresh) as runner:
            return self._sample(
                checkpoint,
                turn,
                Answer(
                    seconds=[runner.ready_s], tokens=0, peak_rss_bytes=runner.ready_peak_rss_bytes
                ),
                limits=None,
            )

    def _ask(self, checkpoint: Checkpoint, turn: Turn, runner: Runner) -> Sample:
        limits = Limits(**self.machine.ask({}, LIMITS_TIMEOUT_S))
        answer = runner.measure(turn.cell)
        return self._sample(checkpoint, turn, answer, limits=limits)

    def _sample(
        self, checkpoint: Checkpoint, turn: Turn, answer: Answer, *, limits: Limits | None
    ) -> Sample:
        weight_format = turn.contender.weight_format
        least = work(turn.cell, checkpoint.config, weight_format)
        gaps_s = answer.gaps_s
        # An engine may measure all repetitions at once.
        stretches = answer.tokens / _tokens(turn.cell) if least else 1.0
        return Sample(
            shape=checkpoint.name,
            cell=turn.cell,
            contender=turn.contender,
            run=self.run,
            round=turn.number,
            seconds=answer.seconds,
            tokens=answer.tokens,
            peak_rss_bytes=answer.peak_rss_bytes,
            limits=limits,
            least_s=least.least_s(limits, weight_format) * stretches if least and limits else None,
            itl_p50_s=percentile(gaps_s, 0.5) if gaps_s else None,
            itl_p99_s=percentile(gaps_s, 0.99) if gaps_s else None,
            sections_s=answer.sections_s,
        )


def _tokens(cell: Cell) -> int:
    """Of one repetition."""
    return cell.context if cell.kind == "prefill" else cell.steps * cell.batch


def _line(sample: Sample) -> str:
    """What the terminal shows of a sample."""
    name = f"{sample.shape:8} {sample.cell.name:22} {sample.contender!s:20} {sample.round + 1}"
    if sample.tokens == 0:
        return f"{name} {sample.seconds[0]:10.1f} s"
    share = "" if sample.share is None else f"{sample.share:6.0%} of the limit"
    return f"{name} {sample.tokens_per_s:10.1f} tokens/s {share}"
