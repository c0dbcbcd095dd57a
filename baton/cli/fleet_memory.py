"""`baton serve` in one process: router and workers on one event loop, each worker's engine on its own thread, KV copied from pool to
pool. The services are the same as over Ray; only the transport differs.
"""

import asyncio
import os
from functools import partial

from baton.cli.banner import Announcer
from baton.cli.config import ServeConfig
from baton.cli.router_process import environment
from baton.engine.aio import AsyncEngine
from baton.engine.build import build_engine
from baton.engine.progress import Progress
from baton.errors import InternalError
from baton.service.groups import first_error
from baton.service.settings import RouterSettings, WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import Role, WorkerInfo
from decode_worker.worker import DecodeWorker
from flex_worker.worker import FlexWorker
from prefill_worker.worker import PrefillWorker
from router.app import RouterApp, load_tokenizer

Worker = PrefillWorker | DecodeWorker | FlexWorker


class MemoryFleet:
    """A `baton.cli.serving.Fleet`."""

    def __init__(self, config: ServeConfig, announcer: Announcer) -> None:
        self._config = config
        self._announcer = announcer
        self._router: RouterApp | None = None
        self._sources = MemorySources()
        self._workers: list[Worker] = []

    async def start(self) -> tuple[WorkerInfo, ...]:
        settings = RouterSettings.from_env(environment(self._config))
        router = RouterApp(settings, await asyncio.to_thread(load_tokenizer, settings))
        await router.start()
        self._router = router
        workers = self._config.workers(os.environ)
        with self._announcer.starting(f"loading the model into {len(workers)} workers"):
            try:
                async with asyncio.TaskGroup() as group:
                    starts = [group.create_task(self._start(*each)) for each in workers]
            except BaseExceptionGroup as errors:
                raise first_error(errors) from errors
        return tuple(start.result() for start in starts)

    async def keep_alive(self) -> None:
        """An engine that failed takes its process along, and here that is everything. Raises `InternalError`."""
        async with asyncio.TaskGroup() as group:
            failures = [group.create_task(worker.host.failed()) for worker in self._workers]
            await asyncio.wait(failures, return_when=asyncio.FIRST_COMPLETED)
            for failure in failures:
                failure.cancel()
        raise InternalError("an engine failed; see the log above")

    async def stop(self, grace_s: float) -> None:
        router, self._router = self._router, None
        try:
            if router is not None and grace_s:
                await router.drain(grace_s)
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(_end(worker, grace_s))
        finally:
            if router is not None:
                await router.stop()

    async def _start(self, role: Role, settings: WorkerSettings) -> WorkerInfo:
        with self._announcer.loading(settings.worker_id) as progress:
            worker = self._worker(role, settings, progress)
            self._workers.append(worker)
            return await worker.start()

    def _worker(self, role: Role, settings: WorkerSettings, progress: Progress) -> Worker:
        loop, starting = asyncio.get_running_loop(), asyncio.current_task()
        assert starting is not None

        def report(loaded_bytes: int, total_bytes: int) -> None:
            """By the engine's thread. Ends the load where nobody waits for it any more: the process could not end in peace meanwhile."""
            if starting.cancelling():
                raise asyncio.CancelledError
            loop.call_soon_threadsafe(progress, loaded_bytes, total_bytes)

        build = partial(build_engine, self._config.engine_of(role), report)
        engine = AsyncEngine(build, name=settings.worker_id)
        transport = MemoryTransport(self._sources, ByteCredits(settings.kv_credit_bytes))
        worker: Worker
        if self._config.one_format:
            worker = FlexWorker(settings, role, engine, transport)
        elif role is Role.PREFILL:
            worker = PrefillWorker(settings, engine)
        else:
            worker = DecodeWorker(settings, engine, transport)
        self._sources.add(settings.transfer_address, worker)
        return worker


async def _end(worker: Worker, grace_s: float) -> None:
    try:
        if grace_s:
            await worker.drain(grace_s)
    finally:
        await worker.stop()
