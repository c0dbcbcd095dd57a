"""How much memory this process may still take."""

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(device: str) -> int:
    """Free memory of the device; on CPU the least of what the machine has and what the container allows."""
    if device == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return int(free)
    return int(min(_machine_bytes(_MEMINFO), _container_bytes(_CGROUP)))


def _machine_bytes(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes(cgroup: Path) -> float:
    """Limit less usage by cgroup v2; infinite where there is none."""
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return float("inf")
    return max(0, int(limit.read_text()) - int(used.read_text()))
