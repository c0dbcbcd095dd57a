"""How a local cluster is sized, and how its processes are found. Starts no Ray."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import ray

from baton.transfer.processes import ProcessTree
from baton.transfer.ray_runtime import TOO_SLOW, object_store_bytes, start_local

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("total", "shm_free", "override", "expected"),
    [
        (16 * GIB, 12 * GIB, None, 2 * GIB),
        (256 * GIB, 128 * GIB, None, 4 * GIB),
        (16 * GIB, 1000 * MIB, None, 900 * MIB),
        (GIB // 2, GIB, None, 128 * MIB),
        (16 * GIB, 64 * MIB, None, 128 * MIB),
        (16 * GIB, 0, None, 128 * MIB),
        (16 * GIB, 12 * GIB, 300 * MIB, 300 * MIB),
        (16 * GIB, 64 * MIB, 300 * MIB, 300 * MIB),
    ],
    ids=["eighth", "capped", "shm", "tiny machine", "docker", "no shm", "override", "forced"],
)
def test_the_store_is_sized_from_the_machine(
    total: int, shm_free: int, override: int | None, expected: int
) -> None:
    size = object_store_bytes(total_memory_bytes=total, shm_free_bytes=shm_free, override=override)
    assert size == expected


def test_a_store_too_small_for_ray_is_refused() -> None:
    with pytest.raises(ValueError, match="needs"):
        object_store_bytes(total_memory_bytes=GIB, shm_free_bytes=GIB, override=MIB)


def test_a_tree_is_its_marked_processes_and_what_they_started(tmp_path: Path) -> None:
    """A process that outlives its grace is killed, and one that is not in the tree is left alone."""
    nap = "import sys, subprocess, time; "
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    marked = subprocess.Popen(
        [sys.executable, "-c", nap + child + "print('up', flush=True); time.sleep(60)", tmp_path],
        stdout=subprocess.PIPE,
    )
    other = subprocess.Popen([sys.executable, "-c", nap + "time.sleep(60)"])
    tree = ProcessTree(str(tmp_path))
    try:
        assert marked.stdout is not None
        assert marked.stdout.readline() == b"up\n"
        tree.watch()
        assert marked.pid in tree.pids
        assert len(tree.pids) == 2
        assert not tree.pids & {os.getpid(), other.pid}
        tree.end(grace_s=0.1)
        assert tree.pids == set()
        assert marked.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()
        assert marked.stdout is not None
        marked.stdout.close()


def test_a_start_that_was_too_slow_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may give Ray's processes too little time; any other failure is told at once. What the failed try leaves behind
    warns nobody.
    """
    tries: list[str] = []

    def slow_once(**_settings: object) -> None:
        tries.append("init")
        if len(tries) == 1:
            handle = subprocess.Popen(["true"])
            raise RuntimeError(TOO_SLOW, handle)
        raise RuntimeError("something else")

    monkeypatch.setattr(ray, "init", slow_once)
    # Other tests of this process may be connected to a cluster, which is to stay.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(RuntimeError, match="something else"),
        start_local(),
    ):
        pass
    assert len(tries) == 2
    assert not caught
