"""A container's share of CPU time bounds the threads, as its cores do."""

import os
from pathlib import Path

import pytest

from baton.engine.cores import usable_cores

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        (None, CORES),
        ("max 100000\n", CORES),
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("110000 100000\n", min(2, CORES)),
        (f"{CORES * 100_000 + 1} 100000\n", CORES),
    ],
)
def test_the_quota_counts_where_it_is_less_than_the_cores(
    tmp_path: Path, limit: str | None, cores: int
) -> None:
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert usable_cores(tmp_path) == cores
