"""CPU time of a server's processes, by what they are. Reads /proc."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    kind: str
    cpu_s: float


def cpu_by_kind(root: int) -> dict[str, float]:
    """Seconds of CPU time that the process and its descendants have used so far: `router`, `workers`, `ray` and `server`, which is
    all else.
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
            used[process.kind] += process.cpu_s
            pending += children[pid]
    return dict(used)


def _read(directory: Path) -> _Process | None:
    """None where it has ended."""
    try:
        stat = (directory / "stat").read_text().rpartition(") ")[2].split()
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return _Process(int(stat[1]), _kind(command), (int(stat[11]) + int(stat[12])) * TICK_S)


def _kind(command: str) -> str:
    if command.startswith("ray::FlexActor"):
        return "workers"
    if " -m router" in command:
        return "router"
    if command.startswith("ray::") or "/ray/" in command:
        return "ray"
    return "server"
