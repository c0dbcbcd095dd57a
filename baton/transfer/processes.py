"""The processes of a local Ray cluster, found by the directory that their command lines name, so that ending them can be proved.

Reads Linux's /proc; where there is none it finds nothing, and ending Ray is left to Ray. A process is known by its id and its
start time, since ids are used again.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_KILLED_S = 5.0
"""The kernel ends a killed process sooner than this, unless it hangs in a system call."""


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    started: str
    """In clock ticks since boot."""
    parent: int


class ProcessTree:
    """The processes whose command line names `marker`, and everything that they started. Used on one thread."""

    def __init__(self, marker: str) -> None:
        self._marker = marker.encode()
        self._watched: set[_Process] = set()

    @property
    def pids(self) -> set[int]:
        """Watched processes that still run."""
        return {process.pid for process in self._alive()}

    def watch(self) -> None:
        """Remembers the processes that run now; called while their parents live, since orphans cannot be told apart."""
        table = _processes()
        tree = {p for p in table if p.pid != os.getpid() and self._marker in _command(p.pid)}
        found = tree
        while found:
            parents = {process.pid for process in found}
            found = {process for process in table if process.parent in parents} - tree
            tree |= found
        self._watched |= tree

    def end(self, *, grace_s: float) -> None:
        """Returns once every watched process is gone; those that outlive the grace are killed."""
        self._wait(grace_s)
        for process in self._alive():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._wait(_KILLED_S)

    def _wait(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while self._alive() and time.monotonic() < end_s:
            time.sleep(0.02)

    def _alive(self) -> set[_Process]:
        running = {(process.pid, process.started) for process in _processes()}
        return {p for p in self._watched if (p.pid, p.started) in running}


def _processes() -> set[_Process]:
    """Every process but the zombies."""
    found = set()
    for entry in _PROC.glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:  # it ended meanwhile
            continue
        pid, _, rest = text.partition(" ")
        fields = rest.rpartition(")")[2].split()
        if fields[0] != "Z":
            found.add(_Process(int(pid), started=fields[19], parent=int(fields[1])))
    return found


def _command(pid: int) -> bytes:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""
