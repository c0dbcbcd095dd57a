"""`baton serve` over Ray: a private cluster, one actor process a worker, and the router as a child process without Ray.

Runs on the serve process's event loop, in its main thread. A worker that dies is started again under a new name, because
routers and decode workers take a name for one life.
"""

import asyncio
import math
import os
import time
from contextlib import ExitStack
from dataclasses import replace

import ray

from baton.cli.backoff import Backoff
from baton.cli.banner import Announcer
from baton.cli.config import ServeConfig
from baton.cli.router_process import RouterProcess
from baton.cli.signals import StopSignals
from baton.engine.config import EngineConfig
from baton.errors import BatonError
from baton.service.groups import first_error
from baton.service.settings import WorkerSettings
from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from baton.types import Role, WorkerInfo
from baton.worker.actor import ActorConfig, RunningWorker, WorkerActor, launch
from decode_worker.actor import DecodeActor
from flex_worker.actor import FlexActor
from prefill_worker.actor import PrefillActor
from router.text import Tokenizer


class WorkerSlot:
    """One place in the fleet, and whoever fills it."""

    def __init__(
        self,
        role: Role,
        settings: WorkerSettings,
        config: ServeConfig,
        cluster: RayCluster,
        announcer: Announcer,
        *,
        num_gpus: float,
    ) -> None:
        self._num_gpus = num_gpus
        self._role = role
        self._settings = settings
        self._config = config
        self._cluster = cluster
        self._announcer = announcer
        self._lives = 0
        self._worker: RunningWorker | None = None

    async def start(self) -> WorkerInfo:
        """Raises what keeps the worker from starting."""
        name = (
            self._settings.worker_id
            if not self._lives
            else f"{self._settings.worker_id}.{self._lives}"
        )
        self._lives += 1
        config = ActorConfig(
            settings=replace(self._settings, worker_id=name, transfer_address=name),
            engine=self._config.engine_of(self._role),
            role=self._role,
            namespace=self._cluster.namespace,
            num_gpus=self._num_gpus,
        )
        began_s = time.monotonic()
        with self._announcer.loading(name) as progress:
            self._worker = await launch(self._actor(), config, progress)
        self._announcer.event(f"{name} is up after {time.monotonic() - began_s:.1f} s")
        return self._worker.info

    def _actor(self) -> type[WorkerActor]:
        """Only workers that compute alike can take each other's role."""
        if self._config.one_format:
            return FlexActor
        return PrefillActor if self._role is Role.PREFILL else DecodeActor

    async def keep_alive(self) -> None:
        """Replaces the worker whenever it ends. Precondition: started."""
        backoff = Backoff()
        began_s = time.monotonic()
        while True:
            if self._worker is not None:
                error = await self._worker.ended()
                worker, self._worker = self._worker, None
                await worker.stop(timeout_s=1.0)
                self._announcer.event(error.message, style="yellow")
            pause_s = backoff.after(time.monotonic() - began_s)
            self._announcer.event(f"{self._settings.worker_id} comes back in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            try:
                await self.start()
            except BatonError as error:
                self._announcer.event(error.message, style="yellow")

    async def stop(self, grace_s: float) -> None:
        """Safe in any state."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            if grace_s:
                await worker.drain(grace_s)
        finally:
            await worker.stop()


class RayFleet:
    """A `baton.cli.serving.Fleet`."""

    def __init__(self, config: ServeConfig, announcer: Announcer, signals: StopSignals) -> None:
        self._config = config
        self._announcer = announcer
        self._signals = signals
        self._router = RouterProcess(config, announcer)
        self._ray = ExitStack()
        self._slots: list[WorkerSlot] = []

    async def start(self) -> tuple[WorkerInfo, ...]:
        # What is wrong with the files is better told once, and before seconds of starting.
        await asyncio.to_thread(Tokenizer.load, self._config.tokenizer)
        # It loads while Ray starts, which blocks this loop for seconds.
        await self._router.start()
        workers = self._config.workers(os.environ)
        with self._announcer.starting("starting Ray"):
            cluster = self._start_ray(len(workers))
        self._signals.listen()
        num_gpus = self._gpu_share(len(workers))
        self._slots = [
            WorkerSlot(role, settings, self._config, cluster, self._announcer, num_gpus=num_gpus)
            for role, settings in workers
        ]
        with self._announcer.starting(f"loading the model into {len(workers)} workers"):
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._router.listening())
                    starts = [group.create_task(slot.start()) for slot in self._slots]
            except BaseExceptionGroup as errors:
                raise first_error(errors) from errors
        return tuple(start.result() for start in starts)

    def _start_ray(self, workers: int) -> RayCluster:
        settings = LocalRaySettings(
            prestarted_workers=workers, object_store_bytes=self._config.object_store_bytes
        )
        try:
            return self._ray.enter_context(start_local(settings))
        except SystemExit:  # what Ray makes of SIGTERM while it starts
            self._signals.first.set()
            raise asyncio.CancelledError from None

    def _gpu_share(self, workers: int) -> float:
        """What each worker gets of this machine's GPUs: at most one, or a part of one."""
        engine = self._config.engine
        if not isinstance(engine, EngineConfig) or engine.device != "cuda":
            return 0.0
        gpus = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        # Ray counts in steps of 0.0001.
        return min(1.0, math.floor(gpus / workers * 10000) / 10000)

    async def keep_alive(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._router.keep_alive())
            for slot in self._slots:
                group.create_task(slot.keep_alive())

    async def stop(self, grace_s: float) -> None:
        # The router first: it drains while the workers still generate.
        try:
            await self._router.stop(grace_s)
            async with asyncio.TaskGroup() as group:
                for slot in self._slots:
                    group.create_task(slot.stop(grace_s))
        finally:
            self._ray.close()
