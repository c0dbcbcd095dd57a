"""`baton serve` under test: real processes, found again by a mark in their environment, and killed by process id."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from baton.client import Client, ModelInfo
from baton.errors import BatonError
from baton.types import Role, WorkerInfo

READY_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits for a condition; fails with its name."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Served:
    """A running `baton serve`. Use as a context manager: leaving it stops everything and checks that nothing is left."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._flags = flags
        self._mark = f"BATON_TEST_MARK={uuid.uuid4()}"
        self._log = log

    def __enter__(self) -> Self:
        name, value = self._mark.split("=")
        command = [sys.executable, "-m", "baton", "serve", *self._flags]
        port = self.address.rpartition(":")[2]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", port, "--metrics-port", "0"],
                env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wanted = sum(int(self._flag(f"--{role.value}", "1")) for role in Role)
        until(lambda: len(self.workers()) == wanted, READY_S, f"workers\n{self.output()}")
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.stop()
        finally:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM; everything must be gone soon after."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(40)
        assert self.process.returncode == 0, self.output()
        until(lambda: not self.pids(), 5, "every process is gone")

    def output(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Every process that it started, and that runs."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    running = (entry / "stat").read_text().rpartition(") ")[2][0] not in "ZX"
                    if running and self._mark.encode() in (entry / "environ").read_bytes().split(
                        b"\0"
                    ):
                        found.append(int(entry.name))
        return found

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

    def kill(self, worker: WorkerInfo, sig: signal.Signals = signal.SIGKILL) -> None:
        """Signals a worker's process, once it is sure that it is one of ours."""
        assert worker.pid in self.pids()
        os.kill(worker.pid, sig)

    def _flag(self, name: str, default: str) -> str:
        flags = list(self._flags)
        return flags[flags.index(name) + 1] if name in flags else default


@contextmanager
def served(directory: Path, *flags: str) -> Iterator[Served]:
    """Serves with these flags and keeps the output in the directory."""
    with Served(directory / f"serve-{uuid.uuid4().hex[:6]}.log", *flags) as running:
        yield running
