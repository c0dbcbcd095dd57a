"""Runs the `baton` command as a person would: in a process of its own, known by a mark in its environment, which its children inherit."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MARK = "BATON_TEST_MARK"


@dataclass
class Served:
    """A `baton serve` that is ready."""

    process: subprocess.Popen[str]
    address: str
    mark: str
    errors: Path
    """What it writes to stderr."""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(40)

    def left_running(self) -> list[str]:
        """The command lines of all processes that it started and that still run, itself included."""
        return list(marked(self.mark).values())


def marked(mark: str) -> dict[int, str]:
    """The processes that carry a mark, by id: their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                found[int(entry.name)] = line
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return {pid: line for pid, line in found.items() if line}


def start(errors: Path, *args: str) -> Served:
    """Returns once it is ready; fails with its stderr where it ends before."""
    mark = secrets.token_hex(8)
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", "serve", "--port", "0", "--metrics-port", "0", *args],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return Served(process, json.loads(line)["address"], mark, errors)
        word, _, address = line.strip().partition(" ")
        if word == "ready":
            return Served(process, address, mark, errors)
    process.wait(10)
    process.stdout.close()
    pytest.fail(f"exit code {process.returncode}:\n{errors.read_text()}")


def end(served: Served) -> None:
    """Whatever a test left."""
    if served.process.poll() is None:
        try:
            served.stop()
        except subprocess.TimeoutExpired:
            served.process.kill()
            served.process.wait()
    for pid in marked(served.mark):
        os.kill(pid, signal.SIGKILL)
    assert served.process.stdout is not None
    served.process.stdout.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts `baton serve` with arguments, any number of times; all are stopped afterwards."""
    running: list[Served] = []

    def begin(*args: str) -> Served:
        running.append(start(tmp_path / f"stderr-{len(running)}", *args))
        return running[-1]

    yield begin
    for served in running:
        end(served)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One simulated server in one process, for tests that only ask it things."""
    served = start(
        tmp_path_factory.mktemp("shared") / "stderr", "--engine", "sim", "--transport", "memory"
    )
    yield served
    end(served)


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


@pytest.fixture(name="baton")
def run_baton() -> Callable[..., subprocess.CompletedProcess[str]]:
    """See `baton`."""
    return baton


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it becomes true in time."""
    end_s = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(name="eventually")
def wait_until() -> Callable[..., bool]:
    """See `eventually`."""
    return eventually
