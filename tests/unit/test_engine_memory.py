"""How much memory is free, by what the kernel says."""

from pathlib import Path

import pytest

from baton.engine import memory


def test_available_memory_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree:  5 kB\nMemAvailable:  40 kB\n")
    assert memory._machine_bytes(meminfo) == 40 * 1024


def test_without_meminfo_the_machines_whole_memory_counts(tmp_path: Path) -> None:
    assert memory._machine_bytes(tmp_path / "none") > 2**20


@pytest.mark.parametrize(
    ("limit", "free"),
    [("1000\n", 700), ("200\n", 0), ("max\n", float("inf")), (None, float("inf"))],
)
def test_a_containers_limit_counts_less_what_it_uses(
    tmp_path: Path, limit: str | None, free: float
) -> None:
    (tmp_path / "memory.current").write_text("300\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert memory._container_bytes(tmp_path) == free
