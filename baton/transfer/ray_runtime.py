"""Connects a process to Ray: starts a private cluster on this machine, or joins one that runs.

Called on the main thread, before any actor or `RayTransport` is made. Ray ties the processes it starts to the thread that
starts them, and allows one connection per process. Invariant: leaving `start_local`'s context leaves no process and no file.
Where the process is killed instead, the kernel ends the cluster with it; two idle agents of Ray's notice a minute later.

Ray runs pickled code for whoever reaches its ports, and on Linux it opens them on every interface. A local cluster therefore
listens on the loopback only, and asks for a token besides, since other users of the machine reach the loopback too. A joined
cluster's token comes from the environment (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH`), set before Python starts.
"""

import gc
import logging
import os
import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants, services
from ray.exceptions import RayError

from baton.errors import UnavailableError
from baton.transfer.processes import ProcessTree

_log = logging.getLogger(__name__)

START_TRIES = 2
TOO_SLOW = "timed out during startup"
"""What Ray says where its own processes did not answer it in time."""
_MIB = 1 << 20
MIN_STORE_BYTES = 128 * _MIB
MAX_STORE_BYTES = 4096 * _MIB

_QUIET_AND_SAFE: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray runs workers at niceness 15 by default: a token loop would wait for every other process.
    "RAY_worker_niceness": "0",
    # Serialized references leak their objects; they never travel outside Ray's own calls.
    "RAY_allow_out_of_band_object_ref_serialization": "0",
    # Objects are freed one by one, not in batches a second apart: the next transfer finds pages that are mapped and cached.
    "RAY_free_objects_batch_size": "1",
    # OpenMP threads that spin between parallel regions take the cores from the event loop.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Ray's processes take this platform for one where they listen on the loopback only.
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRaySettings:
    """How a private cluster is started."""

    namespace: str = "baton"
    """Where actors' names live."""
    prestarted_workers: int = 0
    """Worker processes to start ahead of the first actors; each saves its actor about half a second. Actors ask for no CPUs."""
    object_store_bytes: int | None = None
    """None sizes it from the machine."""
    preallocate: bool = False
    """Touch the whole store at start, so that no transfer pays for a page's first use: seconds of start-up, and resident memory."""
    parent_dir: Path | None = None
    """Where the cluster's directory is made; None is the system's directory for temporary files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """A cluster that this process is connected to."""

    address: str
    """host:port, for `join`."""
    namespace: str
    object_store_bytes: int | None = None
    """Known where this process started it."""
    directory: Path | None = None
    """Logs and sockets of a cluster that this process started; every one of its processes names it."""


@contextmanager
def start_local(settings: LocalRaySettings | None = None) -> Iterator[RayCluster]:
    """Runs a cluster of this process's own inside the context. The process keeps the token in its environment afterwards: Ray reads
    it once, and children that join need it.
    """
    with ExitStack() as stack:
        yield _started(settings or LocalRaySettings(), stack)


def _started(settings: LocalRaySettings, stack: ExitStack) -> RayCluster:
    """A cluster that ends with the stack. On a busy machine Ray may give its own processes too little time, and a second try
    succeeds.
    """
    for _ in range(START_TRIES - 1):
        with warnings.catch_warnings():
            # Of a start that failed, Ray keeps handles of processes that have been ended, which warn when they are collected.
            warnings.simplefilter("ignore", ResourceWarning)
            cluster = _started_in_time(settings, stack)
            if cluster is not None:
                return cluster
            gc.collect()
    return stack.enter_context(_local_cluster(settings))


def _started_in_time(settings: LocalRaySettings, stack: ExitStack) -> RayCluster | None:
    try:
        return stack.enter_context(_local_cluster(settings))
    except Exception as error:
        # Ray has no type of its own for this.
        if TOO_SLOW not in str(error):
            raise
        _log.warning("Ray did not start in time, trying again")
        return None


@contextmanager
def _local_cluster(settings: LocalRaySettings) -> Iterator[RayCluster]:
    if ray.is_initialized():
        raise RuntimeError("this process is connected to Ray already")
    store_bytes = object_store_bytes(
        total_memory_bytes=_total_memory_bytes(),
        shm_free_bytes=_shm_free_bytes(),
        override=settings.object_store_bytes,
    )
    directory = Path(
        tempfile.mkdtemp(prefix="baton-ray-", dir=settings.parent_dir or _short_temp())
    )
    environment = {
        **_QUIET_AND_SAFE,
        "RAY_preallocate_plasma_memory": "1" if settings.preallocate else "0",
    }
    processes = ProcessTree(str(directory))
    try:
        _ensure_token()
        with _loopback_only():
            with _environment(environment):
                ray.init(
                    address="local",
                    namespace=settings.namespace,
                    num_cpus=settings.prestarted_workers,
                    object_store_memory=store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(directory),
                )
            yield RayCluster(
                address=ray.get_runtime_context().gcs_address,
                namespace=settings.namespace,
                object_store_bytes=store_bytes,
                directory=directory,
            )
    finally:
        processes.watch()
        ray.shutdown()
        processes.end(grace_s=5.0)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def join(
    address: str, *, namespace: str = "baton", node_ip: str | None = None
) -> Iterator[RayCluster]:
    """Connects to the cluster at `address` inside the context (`auto`: the one that runs on this machine); actors that this process
    created end with it. `node_ip` tells which of this machine's Ray nodes it belongs to, where there are several. Raises
    `UnavailableError` where no cluster answers, or where it refuses the token.
    """
    try:
        if address == "auto":
            address = services.get_ray_address_from_environment(address, None)
        host, _, port = address.rpartition(":")
        # Ray itself would look for the address without end, also for one that it found.
        socket.create_connection((host, int(port)), timeout=5.0).close()
        with _loopback_only() if host in {"localhost", "127.0.0.1"} else nullcontext():
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=node_ip,
            )
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UnavailableError(f"cannot join Ray at {address!r}: {error}") from error
    try:
        yield RayCluster(address=address, namespace=namespace)
    finally:
        ray.shutdown()


def object_store_bytes(
    *, total_memory_bytes: int, shm_free_bytes: int, override: int | None
) -> int:
    """The object store's size: an eighth of the machine's memory, within [128 MiB, 4 GiB] and nine tenths of what /dev/shm has left.
    The store carries a few prompts' KV at a time, and a page that is used again costs less than a fresh one. Where /dev/shm has
    less than 128 MiB, Ray puts the store on disk, which is slow but works.
    """
    if override is not None:
        if override < MIN_STORE_BYTES:
            raise ValueError(f"the object store needs {MIN_STORE_BYTES} bytes, not {override}")
        return override
    wanted = min(total_memory_bytes // 8, MAX_STORE_BYTES, shm_free_bytes * 9 // 10)
    return max(wanted, MIN_STORE_BYTES)


def _ensure_token() -> None:
    """Ray turns token authentication on by itself where a cluster is started and the mode is not set, and warns that it did; the
    mode is left unset here since Ray has read it already. An operator's own mode or token stands.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
        logging.ERROR
    )
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that are not set, for the processes started inside the context."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Makes this process choose the loopback as its node's address. Ray has read its variable at import, and replaces a loopback
    `_node_ip_address` by the machine's.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _short_temp() -> Path:
    """The system's directory for temporary files, unless its path leaves no room for the names of Ray's sockets: they end some 85
    characters later, and may have 103.
    """
    system = Path(tempfile.gettempdir())
    return system if len(str(system)) <= 16 else Path("/tmp")  # noqa: S108 - mkdtemp makes it private


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shm_free_bytes() -> int:
    shm = Path("/dev/shm")  # noqa: S108 - where Ray keeps its store
    return shutil.disk_usage(shm).free if shm.is_dir() else 0
