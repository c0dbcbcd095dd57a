"""`make image-check`: builds both images with buildah, runs them as a cluster would, and asks them for their health.

The base image is made by debootstrap, since no registry is needed then: `localhost/baton-base`. What follows on the command line goes to
`buildah build`: `--volume` for a local index, `--secret id=pip,src=pip.conf`, `--build-arg TORCH_INDEX=...`. Needs root, for network and
process namespaces of their own: each container stands for a pod, with the command, the settings and the user of the manifests, a
root file system that cannot be written, and an address on a bridge.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import Client, SamplingOptions
from tests.k8s.checks import SERVICES
from tests.k8s.manifests import ROOT, PodTemplate, documents, environment, pod_templates, rendered

BASE = "localhost/baton-base"
# debootstrap does not resolve what a package only provides: python3-distutils stands for the python3.11-distutils of python3.11-venv.
PACKAGES = "python3.11,python3.11-venv,python3-distutils,ca-certificates"
KERNELS = "opt/baton/lib/python3.11/site-packages/baton/engine/native/_kernels*.so"
NETWORK, BRIDGE = "10.77.0", "baton-check"
HEALTHY_S = 300.0
RESTARTS = 3
STOPPED_S = 60.0
UID = 10001
SERVING = health_pb2.HealthCheckResponse.SERVING


def run(*command: str) -> str:
    """Its output. Raises `CalledProcessError`."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Builder:
    """buildah with a storage of its own, below a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        storage = ["--storage-driver", "vfs", "--root", str(directory / "storage")]
        self._buildah = ("buildah", *storage, "--runroot", str(directory / "run"))

    def base(self) -> None:
        """Debian with Python, unless it is there."""
        known = subprocess.run([*self._buildah, "inspect", BASE], capture_output=True, check=False)
        if known.returncode == 0:
            return
        root = self._directory / "base"
        say("debootstrap")
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root))
        container = run(*self._buildah, "from", "scratch")
        run(*self._buildah, "copy", "-q", container, str(root), "/")
        run(*self._buildah, "commit", "-q", "--rm", container, BASE)
        shutil.rmtree(root)

    def build(self, target: str, arguments: Sequence[str]) -> None:
        say(f"building {target}")
        run(
            *(*self._buildah, "build", "--isolation", "chroot", "--layers", "--quiet"),
            *("--target", target, "--tag", f"localhost/baton-{target}"),
            *("--build-arg", f"PYTHON_IMAGE={BASE}", *arguments, str(ROOT)),
        )

    @contextmanager
    def root_of(self, image: str) -> Iterator[Path]:
        """The image's files, mounted."""
        container = run(*self._buildah, "from", "--pull-never", f"localhost/baton-{image}")
        try:
            yield Path(run(*self._buildah, "mount", container))
        finally:
            run(*self._buildah, "rm", container)


class Pod:
    """A container that runs, and is started again where it ends before it was healthy, as a kubelet does: Ray gives a node 30 s."""

    def __init__(
        self, name: str, address: str, start: "Callable[[], subprocess.Popen[bytes]]"
    ) -> None:
        self.name, self.address, self._start = name, address, start
        self._process = start()
        self._restarts = 0

    def until_healthy(self, port: int, service: str) -> None:
        with grpc.insecure_channel(f"{self.address}:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            end_s = time.monotonic() + HEALTHY_S
            while True:
                if self._process.poll() is not None:
                    self._restart()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                    if answer.status == SERVING:
                        break
                except grpc.RpcError:
                    pass  # not yet
                assert time.monotonic() < end_s, f"{self.name} is not healthy"
                time.sleep(0.5)
        say(f"{self.name}: {service or 'the process'} is SERVING at {self.address}:{port}")

    def _restart(self) -> None:
        assert self._restarts < RESTARTS, f"{self.name} ends again and again"
        self._restarts += 1
        say(f"{self.name} ended with {self._process.returncode}, starting it again")
        self._process = self._start()

    def stop(self) -> None:
        """As a kubelet does: SIGTERM to the first process. It ends with 0."""
        self._signal(signal.SIGTERM)
        code = self._process.wait(STOPPED_S)
        assert code == 0, f"{self.name} ended with {code}"
        say(f"{self.name}: SIGTERM ended it with 0")

    def kill(self) -> None:
        """Idempotent. The first process takes everything of its namespace with it."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait(10)

    def _signal(self, number: signal.Signals) -> None:
        # `unshare` is the child that was started; the container's first process is its only one.
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), number)


@contextmanager
def network() -> Iterator[None]:
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        yield
    finally:
        run("ip", "link", "delete", BRIDGE)


@contextmanager
def pod(
    template: PodTemplate, number: int, root: Path, command: Sequence[str], environ: dict[str, str]
) -> Iterator[Pod]:
    """Runs the command in the image's files, with namespaces of its own."""
    name, address = f"baton-check-{number}", f"{NETWORK}.{number}"
    run("ip", "netns", "add", name)
    try:
        for line in (
            f"ip link add bt{number} type veth peer name eth0 netns {name}",
            f"ip link set bt{number} master {BRIDGE} up",
            f"ip -n {name} address add {address}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
            # Ray takes for a node's address the one with which it would reach the world.
            f"ip -n {name} route add default via {NETWORK}.1",
        ):
            run(*line.split())
        apart = f"ip netns exec {name} unshare --mount --pid --uts --fork".split()

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [*apart, "/bin/bash", "-euc", _ENTER, "enter", str(root), address, *command],
                env={"PATH": "/opt/baton/bin:/usr/sbin:/usr/bin:/sbin:/bin", **environ},
            )

        running = Pod(template.owner, address, start)
        try:
            yield running
        finally:
            running.kill()
    finally:
        run("ip", "netns", "delete", name)


_ENTER = f"""
root=$1 address=$2; shift 2
mount --make-rprivate /
hostname "pod-${{address##*.}}"
# As a kubelet writes them; without a name server, so that no lookup waits for one.
mount -t tmpfs tmpfs /mnt
printf '127.0.0.1 localhost\\n%s %s\\n' "$address" "$(hostname)" > /mnt/hosts
touch "$root/etc/hosts" "$root/etc/resolv.conf"
mount --bind "$root" "$root"
mount --bind /mnt/hosts "$root/etc/hosts"
mount --bind /dev/null "$root/etc/resolv.conf"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=1g,mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o size=2g,mode=1777 tmpfs "$root/tmp"
exec setpriv --no-new-privs chroot --userspec={UID}:{UID} "$root" "$@"
"""


def main() -> None:
    """Fails with what is wrong."""
    if os.geteuid() != 0:
        sys.exit("make image-check needs root, for namespaces of its own")
    given = os.environ.get("IMAGE_CHECK_DIR")
    directory = Path(given or tempfile.mkdtemp(prefix="baton-images-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        builder = Builder(directory)
        builder.base()
        for target in ("router", "worker"):
            builder.build(target, sys.argv[1:])
        with (
            builder.root_of("router") as router,
            builder.root_of("worker") as worker,
            network(),
        ):
            assert list(worker.glob(KERNELS)), "the worker's image has no native kernels"
            serve(router, worker)
    finally:
        if not given:
            shutil.rmtree(directory)


def serve(router: Path, worker: Path) -> None:
    """The fleet of overlays/sim, one pod of each kind."""
    objects = documents(rendered("overlays/sim"))
    templates = {each.component: each for each in pod_templates(objects)}
    head_address, router_address = f"{NETWORK}.2", f"{NETWORK}.3"
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": "/tmp"}  # noqa: S108 - the pod's
    with ExitStack() as stack:

        def start(role: str, number: int, root: Path, *command: str, **own: str) -> Pod:
            environ = {**environment(templates[role], objects), **token, **own}
            return stack.enter_context(pod(templates[role], number, root, command, environ))

        params = [f"--{name}={value}" for name, value in templates["ray-head"].ray_params.items()]
        head = start("ray-head", 2, worker, "ray", "start", "--head", "--block", *params)
        for port in (6379, 6380):  # the control store, and the head's own node
            head.until_healthy(port, "")
        routing = start(
            *("router", 3, router, "python", "-m", "router"), BATON_SESSION_STORE="sqlite://"
        )
        routing.until_healthy(50053, SERVICES["router"])
        members = []
        for number, role in ((4, "prefill"), (5, "decode")):
            container = templates[role].container
            member = start(
                *(role, number, worker, *container["command"], *container["args"]),
                RAY_HEAD=f"{head_address}:6379",
                POD_IP=f"{NETWORK}.{number}",
                BATON_ADVERTISE_HOST=f"{NETWORK}.{number}",
                BATON_ROUTERS=f"{router_address}:50052",
                OBJECT_STORE_BYTES=str(256 << 20),
            )
            member.until_healthy(50063, SERVICES[role])
            members.append(member)
        with Client(f"{router_address}:50051") as client:
            answer = client.complete(range(3, 300), sampling=SamplingOptions(max_tokens=8))
        last = answer.attempts[-1]
        say(f"{len(answer.token_ids)} tokens by {last.prefill_worker} and {last.decode_worker}")
        assert last.prefill_worker, "decode computed the prompt itself"
        for member in members:
            member.stop()
        routing.stop()


def say(line: str) -> None:
    """To whoever waits."""
    sys.stderr.write(f"== {line}\n")


if __name__ == "__main__":
    main()
