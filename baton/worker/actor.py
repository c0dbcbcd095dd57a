"""A worker as a named Ray actor: its process, and the handle by which whoever started it watches and ends it.

The actor's event loop serves gRPC and Ray calls alike and never blocks; the engine, and with it torch, is imported and run on the
engine's thread. Actors are never restarted by Ray: a worker that comes back under an old name would be taken for the one that died.
Failures cross as values, since an exception of ours does not survive pickling with its fields.
"""

import asyncio
import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.engine.aio import AsyncEngine
from baton.engine.build import build_engine
from baton.engine.config import EngineConfig
from baton.engine.progress import Progress
from baton.engine.sim import SimConfig
from baton.errors import BatonError, InternalError, UnavailableError
from baton.service import logging as service_logging
from baton.service.settings import WorkerSettings
from baton.service.status import error_from_status_bytes, to_status
from baton.service.status_line import Snapshot
from baton.service.worker_host import WorkerHost
from baton.types import Role, WorkerInfo
from baton.worker.store_meter import ObjectStoreMeter

_log = logging.getLogger(__name__)

MAX_CALLS = 4096
"""At once, on one actor: every attempt that waits for its KV is one."""
LOAD_POLL_S = 0.2
STORE_INTERVAL_S = 5.0
"""Between two samples of the object store's use."""
LINGER_S = 0.25
"""Ray still stores the answer to the last pull when that call has returned here."""


class Worker(Protocol):
    """A prefill or a decode worker."""

    host: WorkerHost

    async def start(self) -> WorkerInfo: ...

    async def drain(self, grace_s: float) -> bool: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """What an actor needs to build its worker; crosses to its process by pickle."""

    settings: WorkerSettings
    """`worker_id` is set: it names the actor."""
    engine: EngineConfig | SimConfig
    role: Role
    """What a worker that can take several begins with."""
    namespace: str
    num_gpus: float = 0.0
    """Share of a GPU that Ray reserves; an actor without one sees no GPU."""
    ray_resource: str = ""
    """Custom resource of which the actor takes one; empty: none."""


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a worker did not start."""

    status: bytes
    """A serialized `google.rpc.Status`."""


class WorkerActor:
    """Base of the actors, which set `_worker`, made with `_engine`. Every public method is called by Ray, on the actor's event loop."""

    _worker: Worker

    def __init__(self, config: ActorConfig) -> None:
        service_logging.configure(config.settings, sys.stderr, os.environ)
        self._loaded = (0, 0)
        self._metering: asyncio.Task[None] | None = None
        build = partial(build_engine, config.engine, self._set_loaded)
        self._engine = AsyncEngine(build, name=config.settings.worker_id)

    async def start(self) -> WorkerInfo | StartFailure:
        """Loads the model and serves."""
        try:
            info = await self._worker.start()
        except BatonError as error:
            return StartFailure(to_status(error).SerializeToString())
        self._metering = asyncio.create_task(self._meter_store(), name="object store")
        return info

    async def loaded(self) -> tuple[int, int]:
        """Bytes of weights in memory, and of all weights, which is 0 until it is known. Answers while `start` runs."""
        return self._loaded

    def _set_loaded(self, loaded_bytes: int, total_bytes: int) -> None:
        """By the engine's thread."""
        self._loaded = (loaded_bytes, total_bytes)

    async def failed(self) -> None:
        """Returns once the engine has failed for good. Held open by the starter, it doubles as a death watch."""
        await self._worker.host.failed()

    async def snapshot(self) -> Snapshot:
        """For the starter's status line: what an actor logs itself does not reach the terminal."""
        return self._worker.host.snapshot()

    async def drain(self, grace_s: float) -> bool:
        """See `WorkerHost.drain`."""
        ended = await self._worker.drain(grace_s)
        await asyncio.sleep(LINGER_S)
        return ended

    async def stop(self) -> None:
        if self._metering is not None:
            self._metering.cancel()
        await self._worker.stop()

    async def _meter_store(self) -> None:
        """Metrics only: a raylet that does not answer is no reason to stop."""
        metrics = self._worker.host.metrics
        meter: ObjectStoreMeter | None = None
        while True:
            try:
                if meter is None:
                    meter = await asyncio.to_thread(ObjectStoreMeter)
                metrics.set_object_store(await asyncio.to_thread(meter.sample))
            except (UnavailableError, RayError) as error:
                _log.debug("the object store's use is not known: %s", error)
                metrics.set_object_store(None)
            await asyncio.sleep(STORE_INTERVAL_S)


class RunningWorker:
    """The starter's handle on an actor. Used on the starter's event loop, in the process that is connected to Ray."""

    def __init__(self, handle: ActorHandle[Any], info: WorkerInfo) -> None:
        self._handle = handle
        self.info = info

    async def ended(self) -> BatonError:
        """Waits until the worker is of no more use, and says why."""
        try:
            await self._handle.failed.remote()
        except RayActorError:
            return UnavailableError(f"worker {self.info.worker_id} died (pid {self.info.pid})")
        except RayError as error:
            return UnavailableError(f"lost sight of worker {self.info.worker_id}: {error}")
        return InternalError(f"the engine of worker {self.info.worker_id} failed; see its log")

    async def snapshot(self) -> Snapshot:
        """See `WorkerActor.snapshot`. Raises `UnavailableError`."""
        try:
            snapshot: Snapshot = await self._handle.snapshot.remote()
        except RayError as error:
            raise UnavailableError(f"worker {self.info.worker_id} does not answer") from error
        return snapshot

    async def drain(self, grace_s: float) -> bool:
        """Whether everything that ran ended by itself. A worker that is dead has nothing to drain."""
        try:
            return bool(await self._handle.drain.remote(grace_s))
        except RayError:
            return False

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Stops the worker, and makes sure that its process is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._handle.stop.remote()
        except (RayError, TimeoutError):
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """At once. Idempotent."""
        ray.kill(self._handle)


async def launch(
    actor: type[WorkerActor], config: ActorConfig, progress: Progress
) -> RunningWorker:
    """Starts an actor on this node and waits until it serves; `progress` is told of the weights that it loads.
    Raises what keeps it from starting (`ModelLoadError`, `UnavailableError`); then no actor is left. Precondition: connected to Ray.
    """
    handle: Any = None
    try:
        handle = _create(actor, config)
        answer = await _started(handle, progress)
    except RayError as error:
        reason = str(error).partition("\n")[0]
        raise UnavailableError(
            f"worker {config.settings.worker_id} did not start: {reason}"
        ) from error
    except asyncio.CancelledError:
        ray.kill(handle)
        raise
    if isinstance(answer, StartFailure):
        ray.kill(handle)
        raise error_from_status_bytes(answer.status)
    assert isinstance(answer, WorkerInfo)
    return RunningWorker(handle, answer)


async def _started(handle: Any, progress: Progress) -> WorkerInfo | StartFailure:
    starting: asyncio.Future[WorkerInfo | StartFailure]
    starting = asyncio.ensure_future(handle.start.remote())
    try:
        while not (await asyncio.wait({starting}, timeout=LOAD_POLL_S))[0]:
            with suppress(RayError):  # what is wrong then keeps it from starting, too
                loaded_bytes, total_bytes = await handle.loaded.remote()
                if total_bytes:
                    progress(loaded_bytes, total_bytes)
        return starting.result()
    finally:
        starting.cancel()


def _create(actor: type[WorkerActor], config: ActorConfig) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = ray.remote(actor).options(
        name=config.settings.worker_id,
        namespace=config.namespace,
        num_cpus=0,
        num_gpus=config.num_gpus,
        resources={config.ray_resource: 1} if config.ray_resource else {},
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=MAX_CALLS,
        scheduling_strategy=here,
    )
    return options.remote(config)
