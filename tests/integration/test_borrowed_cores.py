"""Engines of one machine lend each other the cores that they do not need: see "Borrowed cores" in docs/performance.md.

What a helping thread did is told by its CPU time, which waiting for a core does not change; what the engines know of each other by the
page that they share. Steps during which the other engine came to rest, as it may on a busy machine, say nothing and are not counted.
"""

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.engine.native.library import NEEDED, find_library, processor_flags
from tests import oracle
from tests.busy_engine import Prompts
from tests.served import until

pytestmark = pytest.mark.skipif(
    not processor_flags() >= NEEDED, reason=f"this processor lacks {NEEDED - processor_flags()}"
)
CORES = len(os.sched_getaffinity(0))
STEPS = 20
TOKENS, MANY_TOKENS = 16, 1920
MANY_TIMES = 20
"""More than a step has phases."""
SLOT_BYTES = 64
AT_WORK_NS = 300_000
"""Of CPU time is a part of what helpers need for a step, and far more than one needs to see that it has to sleep."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few phases, two of which take most of a step."""
    assert find_library() is not None, "not compiled: apt-get install g++ && make clean install"
    shape = {"max_position_embeddings": 2048, "num_hidden_layers": 1, "intermediate_size": 32768}
    return oracle.save(lambda: oracle.llama(**shape), tmp_path_factory.mktemp("llama"))


class Page:
    """The page that engines share."""

    def __init__(self, folder: Path) -> None:
        with (folder / f"baton-cores-{os.getuid()}").open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def pids(self) -> list[int]:
        """Whose engine has which slot; the slots after those of the living have none."""
        slots = range(0, len(self._bytes), SLOT_BYTES)
        owners = [struct.unpack_from("q", self._bytes, slot)[0] >> 16 for slot in slots]
        return owners[: 1 + max((i for i, pid in enumerate(owners) if pid), default=-1)]

    def computes_until_ns(self, pid: int) -> int:
        """On the monotonic clock: how long others take this process's engine for computing."""
        slot = SLOT_BYTES * self.pids().index(pid)
        return int(struct.unpack_from("q", self._bytes, slot + 8)[0])


@dataclass(frozen=True, slots=True)
class Other:
    """An engine in another process."""

    process: "subprocess.Popen[str]"

    def tell(self, line: str) -> None:
        """Returns when it has begun to compute, or ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{line}\n"


@contextmanager
def other_engine(checkpoint: Path, folder: Path, threads: int) -> Iterator[Other]:
    arguments = [str(checkpoint), str(folder), str(threads), str(MANY_TOKENS)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.busy_engine", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield Other(process)
        finally:
            process.kill()


class Engine:
    """One in this process, with a thread for every core."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        before = _helpers()
        self._prompts = Prompts(checkpoint, folder, CORES, TOKENS)
        until(lambda: len(_helpers() - before) == CORES - 1, 10, "helpers have begun")
        self._helpers = sorted(_helpers() - before)

    def helpers_step(self) -> list[int]:
        """Computes once; returns each helper's CPU time meanwhile, in ns."""
        before = self._cpu_ns()
        self._prompts.step()
        return [after - then for after, then in zip(self._cpu_ns(), before, strict=True)]

    def uses_all_cores(self) -> None:
        """Computes until every helper has worked."""
        idle = set(range(CORES - 1))

        def all_worked() -> bool:
            idle.difference_update(_worked(self.helpers_step()))
            return not idle

        until(all_worked, 20, "every thread computes", lambda: f"idle: {idle}")

    def shares_cores(self, page: Page, other: Other) -> None:
        """Computes beside the other: the helpers that are left to this engine work, the others sleep."""
        allowed = max(1, CORES // 2) - 1
        worked: set[int] = set()
        spent_ns = [0] * (CORES - 1)
        steps = 0

        def have_shared() -> bool:
            nonlocal steps
            # The first step after a pause of the other's may end a part that was begun in it.
            if self._beside(page, other) is None:
                return False
            for _ in range(STEPS):
                step = self._beside(page, other)
                if step is None:
                    break
                worked.update(_worked(step))
                spent_ns[:] = map(sum, zip(spent_ns, step, strict=True))
                steps += 1
            return steps >= STEPS and worked >= set(range(allowed))

        until(have_shared, 20, "the other engine computes beside", lambda: f"{steps} {worked}")
        assert not _worked(spent_ns[allowed:]), spent_ns

    def _beside(self, page: Page, other: Other) -> list[int] | None:
        """A step's CPU times, or None where the other may have come to rest meanwhile."""
        sure_until_ns = page.computes_until_ns(other.process.pid)
        step = self.helpers_step()
        return step if time.monotonic_ns() < sure_until_ns else None

    def _cpu_ns(self) -> list[int]:
        # The clock id of a thread's CPU time, as the kernel's headers define it.
        return [time.clock_gettime_ns(~thread << 3 | 6) for thread in self._helpers]


def _worked(cpu_ns: list[int]) -> set[int]:
    """Which helpers computed."""
    return {i for i, ns in enumerate(cpu_ns) if ns > AT_WORK_NS}


def _helpers() -> set[int]:
    """The kernels' own threads in this process."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name) for task in tasks if (task / "comm").read_text() == "baton-helper\n"}


def test_an_idle_engines_cores_are_lent_and_come_back(checkpoint: Path, tmp_path: Path) -> None:
    """Promise: an engine that computes alone uses every core; beside another it keeps to its share from the next step on; the rest of
    the cores come back as soon as the other rests or is killed, whose place in the page is then free.
    """
    engine = Engine(checkpoint, tmp_path)
    page = Page(tmp_path)
    engine.uses_all_cores()
    with other_engine(checkpoint, tmp_path, CORES) as other:
        assert page.pids() == [os.getpid(), other.process.pid]
        engine.uses_all_cores()
        other.tell("compute")
        engine.shares_cores(page, other)
        other.tell("rest")
        engine.uses_all_cores()
        other.tell("compute")
        engine.shares_cores(page, other)
        other.process.send_signal(signal.SIGKILL)
        assert other.process.wait(10) == -signal.SIGKILL
        engine.uses_all_cores()
    another = Engine(checkpoint, tmp_path)
    assert page.pids() == [os.getpid(), os.getpid()]
    another.uses_all_cores()


@pytest.mark.parametrize("threads", [1, CORES])
def test_an_engine_is_seen_to_compute_as_long_as_it_does(
    checkpoint: Path, tmp_path: Path, threads: int
) -> None:
    """Promise: however long a step takes, and on however many threads, it goes on telling others that it computes."""
    with other_engine(checkpoint, tmp_path, threads) as other:
        page = Page(tmp_path)
        seen: list[int] = []
        with ThreadPoolExecutor(1) as executor:
            stepping = executor.submit(other.tell, "step")
            while not stepping.done():
                seen.append(page.computes_until_ns(other.process.pid))
                time.sleep(0.001)
            stepping.result()
        assert len(set(seen)) > MANY_TIMES, seen
