"""Measures an engine that is stepped: the same load for Baton and for vLLM. Runs in a runner, free of everything but Python.

A stream counts from its second token on: its first belongs to the prompt.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from benchmarks.engine.protocol import READY_PROMPT_TOKENS, Answer, Cell, peak_rss_bytes, prompt

MIXED_STREAM_CONTEXT = 128
MIXED_STREAM_TOKENS = 1900
"""More than a stream generates while prompts arrive, and within every model's context."""


class Stepper(Protocol):
    """An engine with continuous batching, greedy, that ignores the end of sequence and caches no prefix."""

    @property
    def vocab_size(self) -> int: ...

    def use_chunk(self, tokens: int | None) -> None:
        """Computes at most so many tokens in a step from now on; None is the default. Precondition: nothing runs."""
        ...

    def add(self, request: str, prompt: Sequence[int], max_tokens: int) -> None: ...

    def step(self) -> Sequence[tuple[str, int]]:
        """Which requests got how many tokens in this step."""
        ...

    def abort(self, request: str) -> None:
        """Idempotent."""
        ...


class SteppedMeasure:
    """Measures cells on one stepper."""

    def __init__(self, stepper: Stepper) -> None:
        """Generates the first token."""
        self._stepper = stepper
        self._names = (f"request-{n}" for n in itertools.count())
        self._seeds = itertools.count()
        self._prefill(READY_PROMPT_TOKENS)

    def __call__(self, cell: Cell) -> Answer:
        self._stepper.use_chunk(cell.chunk)
        match cell.kind:
            case "prefill":
                seconds = [self._prefill(cell.context) for _ in range(cell.repetitions)]
                answer = Answer(seconds=seconds, tokens=cell.context)
            case "decode":
                answer = self._decode(cell)
            case "mixed":
                answer = self._mixed(cell)
            case _:
                raise ValueError(f"no such cell: {cell.kind}")
        return replace(answer, peak_rss_bytes=peak_rss_bytes())

    def _add(self, length: int, max_tokens: int) -> str:
        """What is computed once is not computed faster the next time: every prompt is new."""
        name = next(self._names)
        tokens = prompt(length, self._stepper.vocab_size, next(self._seeds))
        self._stepper.add(name, tokens, max_tokens)
        return name

    def _prefill(self, length: int) -> float:
        tokens = prompt(length, self._stepper.vocab_size, next(self._seeds))
        name = next(self._names)
        began_s = time.perf_counter()
        self._stepper.add(name, tokens, 1)
        while not self._stepper.step():
            pass
        return time.perf_counter() - began_s

    def _streams(self, cell: Cell, max_tokens: int) -> list[str]:
        """Starts streams and steps until all of them decode."""
        streams = [self._add(cell.context, max_tokens) for _ in range(cell.batch)]
        counts = dict.fromkeys(streams, 0)
        while min(counts.values()) < 2:
            for name, count in self._stepper.step():
                counts[name] += count
        return streams

    def _decode(self, cell: Cell) -> Answer:
        """Streams that started first are ahead by what the others' prompts took; none may end before the last repetition."""
        behind = cell.batch * (-(-cell.context // 64) + 2)
        streams = self._streams(cell, cell.repetitions * cell.steps + behind)
        seconds = []
        for _ in range(cell.repetitions):
            left = cell.steps * cell.batch
            began_s = time.perf_counter()
            while left > 0:
                left -= sum(count for _, count in self._stepper.step())
            seconds.append(time.perf_counter() - began_s)
        self._end(streams)
        return Answer(seconds=seconds, tokens=cell.steps * cell.batch)

    def _mixed(self, cell: Cell) -> Answer:
        """Prompts arrive at fixed times while streams decode; counts prompt tokens once their first token is out."""
        streams = self._streams(replace(cell, context=MIXED_STREAM_CONTEXT), MIXED_STREAM_TOKENS)
        last_s = dict.fromkeys(streams, time.perf_counter())
        gaps_s: list[float] = []
        tokens = arrived = answered = 0
        waiting: dict[str, int] = {}
        began_s = time.perf_counter()
        while answered < cell.repetitions:
            due = int((time.perf_counter() - began_s) / cell.interval_s) + 1
            while arrived < min(due, cell.repetitions):
                waiting[self._add(cell.context, cell.steps)] = 0
                arrived += 1
            events = self._stepper.step()
            now_s = time.perf_counter()
            for name, count in events:
                tokens += count
                if name in last_s:
                    gaps_s.append(now_s - last_s[name])
                    last_s[name] = now_s
                    continue
                tokens += cell.context if waiting[name] == 0 else 0
                waiting[name] += count
                answered += waiting[name] == cell.steps
        seconds = time.perf_counter() - began_s
        self._end(streams)
        return Answer(seconds=[seconds], tokens=tokens, gaps_s=gaps_s)

    def _end(self, streams: Sequence[str]) -> None:
        for name in streams:
            self._stepper.abort(name)
        # What a step had begun for them comes out, and counts for nobody.
        self._stepper.step()
