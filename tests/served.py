"""The `baton` command under test: commands that run to their end, and `baton serve`, whose processes are found again by a mark in their
environment and killed by process id.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from baton.client import Client, ModelInfo
from baton.errors import BatonError
from baton.types import Role, WorkerInfo

READY_S = 100.0
MARK = "BATON_TEST_MARK"


def until(
    condition: Callable[[], bool],
    timeout_s: float,
    what: str,
    details: Callable[[], str] = str,
) -> None:
    """Waits for a condition; fails with its name, and with what is known of why."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {what}\n{details()}"
        time.sleep(0.02)


def baton(*args: str, stdin: str = "", timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "baton", *args],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


@dataclass(frozen=True, slots=True)
class Served:
    """A `baton serve` that was started; see `served` and `started`."""

    process: subprocess.Popen[bytes]
    mark: str
    stdout: Path
    stderr: Path

    @property
    def address(self) -> str:
        """The router's, as told by the ready line; empty while there is none."""
        line, complete, _ = self.stdout.read_text().partition("\n")
        if not complete:
            return ""
        return str(json.loads(line)["address"]) if line.startswith("{") else line.split()[1]

    def output(self) -> str:
        """What it has told people so far, on stderr."""
        return self.stderr.read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(40)

    def processes(self) -> dict[int, str]:
        """The command lines, by process id, of everything that it started and that runs, itself included."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            # A process that has ended meanwhile, or is another user's, has nothing to read.
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found[int(entry.name)] = line
        return {pid: line for pid, line in found.items() if line}

    def model(self) -> ModelInfo:
        with Client(self.address) as client:
            return client.model()

    def workers(self, role: Role | None = None) -> list[WorkerInfo]:
        """Members of the fleet now."""
        assert self.process.poll() is None, self.output()
        try:
            members = self.model().workers
        except BatonError:
            return []
        return [w for w in members if role in (None, w.role)]

    def kill(self, worker: WorkerInfo, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals a worker's process, once it is sure that it is one of ours."""
        assert worker.pid in self.processes()
        os.kill(worker.pid, number)

    def end(self) -> None:
        """Stops what the test has left running, which must go in order and leave nothing; a serve that the test has ended itself was
        the test's to check. Either way, no process is left.
        """
        try:
            if self.process.poll() is None:
                assert self.stop() == 0, self.output()
                until(lambda: not self.processes(), 5, "every process is gone")
        finally:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(10)


Serve = Callable[..., Served]
"""Takes flags."""


@contextmanager
def served(directory: Path, *flags: str) -> Iterator[Served]:
    """As `started`, when every worker has joined."""
    with started(directory, *flags) as running:
        process = running.process
        until(lambda: bool(running.address) or process.poll() is not None, READY_S, "ready")
        assert running.address, f"exit code {process.poll()}\n{running.output()}"
        yield running


@contextmanager
def started(directory: Path, *flags: str) -> Iterator[Served]:
    """Runs `baton serve` with these flags inside the context, on free ports, and keeps its output in the directory."""
    mark = secrets.token_hex(8)
    stdout, stderr = directory / f"serve-{mark}.stdout", directory / f"serve-{mark}.stderr"
    command = [sys.executable, "-m", "baton", "serve", "--port", "0", "--metrics-port", "0"]
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [*command, *flags],
            env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    running = Served(process, mark, stdout, stderr)
    try:
        yield running
    finally:
        running.end()
