"""How benchmarks write their figures: with the command, the machine and the raw values, so that each can be judged and repeated."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "ray", "grpcio", "numpy")},
        "load_average_1_min": round(os.getloadavg()[0], 2),
    }


def _module(script: Path) -> str:
    parts = script.with_suffix("").parts
    return ".".join(parts[parts.index("benchmarks") :])


def write_report(
    path: Path,
    *,
    settings: Mapping[str, object],
    raw: Mapping[str, object],
    summary: Mapping[str, object],
) -> None:
    """Writes one result file."""
    report = {
        "command": " ".join(["python", "-m", _module(Path(sys.argv[0])), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": settings,
        "summary": summary,
        "raw": raw,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")
