"""Where the time of Baton's steps goes. Clocks stand around the engine's seams, and each second counts for the innermost one.

What a path computes without passing these seams counts for the section around it; the native kernels count for themselves.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from baton.engine.native.library import Batch, Library
from benchmarks.engine.protocol import Answer, Cell, Measure

SECTIONS = {
    "baton.engine.engine.PagedEngine.step": "scheduling, in Python",
    "baton.engine.runner.ModelRunner.run": "runner, in Python",
    "baton.engine.native.backend.NativeBackend.compute": "batch layout, in Python",
    "baton.engine.torch_backend.plan_batch": "batch plan",
    "baton.engine.model.Decoder.__call__": "norms, rotation, residuals, dispatch",
    "baton.engine.layers.Linear.__call__": "linear",
    "baton.engine.quantize.Int8Linear.__call__": "linear",
    "baton.engine.model.attend": "attention",
    "baton.engine.runner.sample": "sampling",
}
"""Seams, outermost first, and what is inside each but not inside another."""


NATIVE_STEP = "baton.engine.native.library.Library.step"
NATIVE_SECTIONS = ("linear", "attention", "norms, rotation, residuals, dispatch")


class Clocks:
    """Exclusive seconds by section. For one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._native = np.zeros(len(NATIVE_SECTIONS))
        self._inside: list[str] = []
        self._since_s = 0.0

    def _turn(self) -> None:
        """The time since the last turn belongs to the section that was innermost."""
        now_s = time.perf_counter()
        if self._inside:
            name = self._inside[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def around(self, section: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, with a clock around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._inside.append(section)
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._inside.pop()

        return timed

    def counting(self, step: Callable[..., None]) -> Callable[..., None]:
        """A native step that says what it spent."""

        def counted(library: Library, engine: int, batch: Batch) -> None:
            self._turn()
            batch.seconds = self._native.ctypes.data
            step(library, engine, batch)
            for section, seconds in zip(NATIVE_SECTIONS, self._native, strict=True):
                self.seconds[section] = self.seconds.get(section, 0.0) + float(seconds)
            self._native[:] = 0
            # What the kernels did is told by them.
            self._since_s = time.perf_counter()

        return counted

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Clocks stand around every seam."""
        with ExitStack() as stack:
            for seam, section in SECTIONS.items():
                patcher = patch(seam)
                original, _ = patcher.get_original()
                stack.enter_context(patch(seam, self.around(section, original)))
            original, _ = patch(NATIVE_STEP).get_original()
            stack.enter_context(patch(NATIVE_STEP, self.counting(original)))
            yield


def profiled(measure: Measure, cell: Cell) -> Answer:
    """The cell, and exclusive seconds by section of all its steps, those that compute the streams' prompts included."""
    clocks = Clocks()
    with clocks.standing():
        answer = measure(cell)
    return replace(answer, sections_s=clocks.seconds)
