"""CPU time of a server's processes, by what they are; of its workers', that of the engines' threads by itself. Reads /proc."""

import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
ENGINES = ("baton-engine", "baton-helper")
"""Names of the threads that compute: `baton.engine.aio` and the native kernels' team."""


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    kind: str
    cpu_s: float
    engines_cpu_s: float
    """Of a worker's threads that compute."""


def cpu_by_kind(root: int) -> dict[str, float]:
    """Seconds of CPU time that the process and its descendants have used so far: `router`, `engines`, which are the threads that compute,
    `workers`, which are the rest of their processes, `ray`, and `server`, which is all else.
    """
    processes = {int(each.name): _read(each) for each in Path("/proc").glob("[0-9]*")}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, process in processes.items():
        if process is not None:
            children[process.parent].append(pid)
    used: defaultdict[str, float] = defaultdict(float)
    pending = [root]
    while pending:
        pid = pending.pop()
        process = processes.get(pid)
        if process is not None:
            used[process.kind] += process.cpu_s - process.engines_cpu_s
            if process.kind == "workers":
                used["engines"] += process.engines_cpu_s
            pending += children[pid]
    return dict(used)


def _read(directory: Path) -> _Process | None:
    """None where it has ended."""
    try:
        parent, _, cpu_s = _told(directory / "stat")
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    kind = _kind(command)
    engines_cpu_s = _of_engines(directory / "task") if kind == "workers" else 0.0
    return _Process(parent, kind, cpu_s, min(engines_cpu_s, cpu_s))


def _of_engines(threads: Path) -> float:
    cpu_s = 0.0
    for each in threads.glob("*/stat"):
        with suppress(OSError):
            _, name, spent_s = _told(each)
            cpu_s += spent_s if name in ENGINES else 0.0
    return cpu_s


def _told(stat: Path) -> tuple[int, str, float]:
    """The parent, the name, and the CPU time of a process or thread."""
    head, _, tail = stat.read_text().rpartition(") ")
    fields = tail.split()
    return int(fields[1]), head.partition("(")[2], (int(fields[11]) + int(fields[12])) * TICK_S


def _kind(command: str) -> str:
    if command.startswith("ray::FlexActor"):
        return "workers"
    if " -m router" in command:
        return "router"
    if command.startswith("ray::") or "/ray/" in command:
        return "ray"
    return "server"
