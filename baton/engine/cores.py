"""How many cores this process may compute on."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Those that it may run on, or what the container's quota of CPU time (cgroup v2) comes to, if that is less. More threads than that
    use the quota up early in each period, and then all of them stand still.
    """
    cores, limit = len(os.sched_getaffinity(0)), cgroup / "cpu.max"
    if not limit.exists():
        return cores
    quota, _, period = limit.read_text().strip().partition(" ")
    return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))
