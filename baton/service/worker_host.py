"""What a prefill and a decode worker have in common: engine, gRPC server, metrics, health, membership, and the order in which
they start, drain and stop. Torch-free: the engine is passed in. Everything runs on the worker's event loop.

    start   server (health NOT_SERVING) → engine → metrics → membership → SERVING
    drain   refuse new calls → NOT_SERVING, routers told → running calls end, or the grace does
    stop    leave the fleet → cancel what runs → server, metrics, engine

Health is SERVING only while the engine is loaded, completes its steps within the limit, and the worker does not drain.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from baton import __version__
from baton.engine.aio import AsyncEngine
from baton.errors import BatonError, DrainingError, UnavailableError
from baton.service.membership import FleetAgent
from baton.service.metrics import OK, WorkerMetrics, outcome_of
from baton.service.server import GrpcServer
from baton.service.settings import WorkerSettings
from baton.types import Role, WorkerId, WorkerInfo

_log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.25
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists between a start that succeeded and the stop."""

    info: WorkerInfo
    fleet: FleetAgent
    health: asyncio.Task[None]


class CallOutcome:
    """How a call ended, for the metrics: cancelled until it is done or fails."""

    def __init__(self) -> None:
        self.label = "cancelled"

    def done(self) -> None:
        """The caller is about to be told the last it waits for; it may cancel rather than read to the end."""
        self.label = OK


class WorkerHost:
    """See the module docstring."""

    def __init__(
        self, settings: WorkerSettings, role: Role, engine: AsyncEngine, *, service: str
    ) -> None:
        """`service` is the full name of the worker's gRPC service."""
        self.settings = settings
        self.engine = engine
        self.metrics = WorkerMetrics(role)
        self.worker_id = WorkerId(settings.worker_id or _new_worker_id(role))
        self._role = role
        self._server = GrpcServer(settings, [service])
        self._running: _Running | None = None
        self._draining = False
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._failed = asyncio.Event()

    @property
    def port(self) -> int:
        """Of the gRPC server; 0 until it is bound."""
        return self._server.port

    @property
    def info(self) -> WorkerInfo:
        """Raises `UnavailableError` where the worker does not run (yet)."""
        if self._running is None:
            raise UnavailableError("the worker is still loading its model")
        return self._running.info

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_calls(self) -> int:
        """Calls that run now."""
        return self._calls

    async def start(self, add_servicer: Callable[[grpc.aio.Server], None]) -> WorkerInfo:
        """Returns once the worker serves. Raises what the engine's build raises (`ModelLoadError`), and `UnavailableError` where a port
        is taken; then nothing is left running.
        """
        self._server.register(add_servicer)
        async with AsyncExitStack() as undo:
            port = await self._server.start()
            undo.push_async_callback(self._server.stop, 0)
            undo.push_async_callback(self._stop_engine)
            await self.engine.start()
            # Routers are told of the free blocks with the first heartbeat.
            await self.engine.refresh_load()
            self.metrics.watch(lambda: self.engine.load, lambda: self.engine.stalled_s)
            metrics_port = self.metrics.serve(self.settings.host, self.settings.metrics_port)
            undo.callback(self.metrics.close)
            info = self._describe(port, metrics_port)
            undo.pop_all()
        fleet = FleetAgent(info, self.engine, self.settings)
        fleet.start()
        await self._server.set_serving(serving=True)
        health = asyncio.create_task(self._watch_health(fleet), name="health")
        self._running = _Running(info, fleet, health)
        return info

    @contextmanager
    def call(self) -> Iterator[CallOutcome]:
        """Every call that needs the engine runs inside: counted for the drain, and by outcome. Raises `UnavailableError` where the
        worker does not take new ones.
        """
        if self._running is None:
            raise UnavailableError("the worker is still loading its model")
        if self._draining:
            raise DrainingError("the worker is draining")
        if self.engine.failed:
            raise UnavailableError("the worker's engine has failed")
        self._calls += 1
        self._idle.clear()
        outcome = CallOutcome()
        try:
            yield outcome
        except BatonError as error:
            outcome.label = outcome_of(error)
            raise
        except Exception:
            outcome.label = "internal"
            raise
        finally:
            self.metrics.record_call(outcome.label)
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def refuse_calls(self) -> None:
        """New calls get `UnavailableError` from now on."""
        self._draining = True

    async def drain(self, grace_s: float) -> bool:
        """Returns whether everything that ran has ended by itself within the grace. Idempotent."""
        self.refuse_calls()
        end_s = time.monotonic() + grace_s
        if self._running is not None:
            self._running.fleet.set_draining(draining=True)
            await self._server.set_serving(serving=False)
            await self._running.fleet.drained(min(grace_s, 1.0))
        try:
            async with asyncio.timeout(max(0.0, end_s - time.monotonic())):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d calls still run after the drain's %.0f s", self._calls, grace_s)
        return not self._calls

    async def stop(self) -> None:
        """Ends everything at once. Idempotent."""
        self.refuse_calls()
        running, self._running = self._running, None
        if running is None:
            return
        running.health.cancel()
        await asyncio.wait({running.health})
        await running.fleet.stop()
        await self._server.stop(0)
        # Handlers that the server cancelled unwind through the engine, which must outlive them.
        await _within(STOP_TIMEOUT_S, self._idle.wait(), "calls did not end")
        self.metrics.close()
        await self._stop_engine()

    async def failed(self) -> None:
        """Returns once the engine has failed for good: the process should end, and be replaced."""
        await self._failed.wait()

    async def _stop_engine(self) -> None:
        await _within(STOP_TIMEOUT_S, self.engine.stop(), "the engine's step did not end")

    async def _watch_health(self, fleet: FleetAgent) -> None:
        while True:
            stalled_s = self.engine.stalled_s
            if not self.engine.failed and stalled_s >= self.settings.hang_limit_s:
                self.engine.give_up(f"a step has run for {stalled_s:.1f} s")
            alive = not self.engine.failed and stalled_s < self.settings.stall_limit_s
            await self._server.set_serving(serving=alive and not self._draining, alive=alive)
            fleet.set_draining(draining=self._draining or not alive)
            if self.engine.failed:
                self._failed.set()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _describe(self, port: int, metrics_port: int) -> WorkerInfo:
        engine = self.engine.info
        host = self.settings.advertise_host or _reachable(self.settings.host)
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self._role,
            address=f"{host}:{port}",
            transfer_address=self.settings.transfer_address or self.worker_id,
            model=engine.model,
            spec=engine.spec,
            vocab_size=engine.vocab_size,
            max_context_tokens=engine.max_context_tokens,
            eos_token_ids=engine.eos_token_ids,
            block_size_tokens=engine.block_size_tokens,
            num_blocks=engine.num_blocks,
            node=socket.gethostname(),
            pid=os.getpid(),
            metrics_address=f"{host}:{metrics_port}",
            device=engine.device,
            version=__version__,
        )


async def _within(timeout_s: float, what: Coroutine[Any, Any, object], problem: str) -> None:
    """Waits no longer than that: whoever stops a worker must get to its end."""
    try:
        async with asyncio.timeout(timeout_s):
            await what
    except TimeoutError:
        _log.error("stopping: %s within %.0f s", problem, timeout_s)


def _new_worker_id(role: Role) -> str:
    return f"{role.value}-{socket.gethostname()}-{secrets.token_hex(3)}"


def _reachable(host: str) -> str:
    """What others can connect to, given what this process listens on."""
    return socket.gethostname() if host in {"0.0.0.0", "::", "[::]"} else host  # noqa: S104
