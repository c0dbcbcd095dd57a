"""The benchmark's ends of its runners' pipes."""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engine.checkpoints import ROOT
from benchmarks.engine.protocol import Answer, Cell

READY_TIMEOUT_S = 1800.0
"""Loading and compiling, on a busy machine."""
ANSWER_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 30.0
LOG_TAIL_BYTES = 2000


class RunnerError(Exception):
    """The runner ended, or took too long; the message has the end of its log."""


class Process:
    """A program that answers lines with lines of JSON. Ends with the context."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """What it prints goes to `log`; it is told where to write its answers."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        answers, answers_end = os.pipe()
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                [*command, "--answers", str(answers_end)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=kept | dict(environment),
                pass_fds=[answers_end],
            )
        os.close(answers_end)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _read(self, answers: int) -> None:
        with os.fdopen(answers) as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def line(self, timeout_s: float) -> Any:
        """The next answer. Raises `RunnerError`."""
        try:
            text = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise RunnerError(f"no answer within {timeout_s:.0f} s: {self._tail()}") from None
        if not text:
            # Its answers' end comes before its last words.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            raise RunnerError(f"ended: {self._tail()}")
        return json.loads(text)

    def ask(self, message: Mapping[str, object], timeout_s: float) -> Any:
        """As `line`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RunnerError(f"ended: {self._tail()}") from None
        return self.line(timeout_s)

    def stop(self) -> None:
        """Idempotent. Its standard input's end asks it to go."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_TIMEOUT_S)

    def _tail(self) -> str:
        return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


class Runner(Process):
    """An engine that is ready."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Returns when it has generated its first token. Raises `RunnerError`; nothing runs then."""
        began_s = time.perf_counter()
        super().__init__(command, environment, log)
        try:
            ready = self.line(READY_TIMEOUT_S)
        except RunnerError:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - began_s
        self.ready_peak_rss_bytes = int(ready["peak_rss_bytes"])

    def measure(self, cell: Cell) -> Answer:
        """Raises `RunnerError`."""
        return Answer(**self.ask(asdict(cell), ANSWER_TIMEOUT_S))
