"""A local cluster as `start_local` runs it: what it lets in, and what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import ray
from ray._private import services

from baton.errors import UnavailableError
from baton.transfer.processes import ProcessTree
from baton.transfer.ray_runtime import RayCluster, join

pytestmark = [pytest.mark.ray, pytest.mark.timeout(90)]

# On a busy machine Ray may need a second try, and regrets at the end that it cannot tell its driver of a task's error.
BUSY = re.compile(
    r"Ray did not start in time, trying again|: Failed to push error to driver for task "
)
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
import ray
from baton.transfer.ray_runtime import LocalRaySettings, start_local

settings = LocalRaySettings(object_store_bytes=128 << 20, parent_dir=Path(sys.argv[1]))
with start_local(settings) as cluster:
    ray.get(ray.remote(num_cpus=0)(lambda: 0).remote())  # a worker is up
    sleeper = ray.remote(num_cpus=0)(lambda: time.sleep(60)).remote()
    print(cluster.address, flush=True)
    if sys.stdin.readline() == "raise\\n":
        raise KeyboardInterrupt
"""
JOINER = """
import sys
import ray
from baton.transfer.ray_runtime import join

with join(sys.argv[1], namespace="joined") as cluster:
    print(cluster.namespace, len(ray.nodes()), flush=True)
"""


class Owner:
    """Another process that has a cluster of its own, in `directory`."""

    def __init__(self, process: "subprocess.Popen[str]", address: str, tree: ProcessTree) -> None:
        self.process = process
        self.address = address
        self.tree = tree

    def say(self, line: str) -> None:
        """Lets the owner go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


def command(pid: int) -> bytes:
    """A running process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def owner(directory: Path) -> Iterator[Owner]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", OWNER, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        tree = ProcessTree(str(directory))
        try:
            address = process.stdout.readline().strip()
            assert address, process.stderr and process.stderr.read()
            tree.watch()
            yield Owner(process, address, tree)
        finally:
            process.kill()
            tree.end(grace_s=0.2)


def listening(pids: set[int]) -> dict[str, set[str]]:
    """Local addresses, in the kernel's hexadecimal, that these processes listen on."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))  # noqa: PTH115 - no path: socket:[inode]
            except FileNotFoundError:
                continue
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.setdefault(table, set()).add(fields[1].partition(":")[0])
    return found


def test_a_local_cluster_listens_on_the_loopback_only(ray_cluster: RayCluster) -> None:
    """Ray runs code for whoever reaches its ports, so nobody outside this machine may."""
    tree = ProcessTree(str(ray_cluster.directory))
    tree.watch()
    addresses = listening(tree.pids | {os.getpid()})
    assert addresses, "the cluster listens somewhere"
    assert addresses.get("tcp", set()) <= {"0100007F"}
    assert addresses.get("tcp6", set()) <= {"0000000000000000FFFF00000100007F"}


def test_a_local_cluster_refuses_calls_without_its_token(ray_cluster: RayCluster) -> None:
    """Other users of the machine reach the loopback."""

    def status(metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
        with grpc.insecure_channel(ray_cluster.address) as channel:
            try:
                call = channel.unary_unary(
                    CHECK_ALIVE, lambda message: message, lambda reply: reply
                )
                call(b"", metadata=metadata, timeout=10)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
        return grpc.StatusCode.OK

    assert status(()) is grpc.StatusCode.UNAUTHENTICATED
    assert status((("authorization", "Bearer wrong"),)) is grpc.StatusCode.UNAUTHENTICATED
    token = ("authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
    assert status((token,)) is not grpc.StatusCode.UNAUTHENTICATED


def test_actors_run_at_full_priority_and_cannot_serialize_references(
    ray_cluster: RayCluster,
) -> None:
    del ray_cluster

    def probe() -> tuple[int, str, str]:
        try:
            ray.cloudpickle.dumps(ray.put(1))  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - its name is misspelt, and may be mended
            return os.nice(0), os.environ["OMP_WAIT_POLICY"], type(error).__name__
        return os.nice(0), os.environ["OMP_WAIT_POLICY"], "serialized"

    niceness, wait_policy, outcome = ray.get(ray.remote(num_cpus=0)(probe).remote())
    assert (niceness, wait_policy) == (os.nice(0), "PASSIVE")
    assert "OutOfBand" in outcome or "OufOfBand" in outcome


def test_another_process_joins_with_the_token_from_its_environment(
    ray_cluster: RayCluster,
) -> None:
    joined = subprocess.run(
        [sys.executable, "-W", "error", "-c", JOINER, ray_cluster.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (joined.stdout, joined.stderr) == ("joined 1\n", "")


def test_joining_where_no_cluster_is_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one is to be found on this machine: there is none, or only what is left of one."""
    # Other tests' clusters run beside this one.
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    start_s = time.monotonic()
    with pytest.raises(UnavailableError, match="cannot join"), join("127.0.0.1:1"):
        pytest.fail("there is no cluster")
    with pytest.raises(UnavailableError, match="cannot join"), join("auto"):
        pytest.fail("there is no cluster")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"127.0.0.1:1"})
    with pytest.raises(UnavailableError, match="cannot join"), join("auto"):
        pytest.fail("there is no cluster")
    with pytest.raises(UnavailableError, match="cannot join"), join("no port"):
        pytest.fail("there is no cluster")
    assert time.monotonic() - start_s < 5


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Ray's sockets do not fit below pytest's own temporary directories."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as path:
        yield Path(path)


@pytest.mark.parametrize("line", ["leave", "raise"])
def test_leaving_the_context_leaves_no_process_and_no_file(short_path: Path, line: str) -> None:
    with owner(short_path) as other:
        assert len(other.tree.pids) > 3
        other.say(line)
        assert other.process.stderr is not None
        told = other.process.stderr.read()
        other.process.wait(30)
        assert other.tree.pids == set()
    assert list(short_path.iterdir()) == []
    told = "".join(each for each in told.splitlines() if not BUSY.search(each))
    assert (told == "") if line == "leave" else ("KeyboardInterrupt" in told), told


def test_killing_the_owner_ends_the_cluster_and_its_workers(short_path: Path) -> None:
    """SIGKILL runs no cleanup: the kernel ends the cluster with its owner. Ray's agents take a minute to notice."""
    with owner(short_path) as other:
        working = [pid for pid in other.tree.pids if b"Agent" not in command(pid)]
        assert any(b"raylet" in command(pid) for pid in working)
        os.kill(other.process.pid, signal.SIGKILL)
        end_s = time.monotonic() + 10
        while other.tree.pids & set(working):
            assert time.monotonic() < end_s, [command(pid) for pid in other.tree.pids]
            time.sleep(0.05)
