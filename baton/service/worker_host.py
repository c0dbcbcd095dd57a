"""What a prefill and a decode worker have in common: engine, gRPC server, metrics, health, membership, and the order in which
they start, drain and stop. Torch-free: the engine is passed in. Everything runs on the worker's event loop.

    start   server (health NOT_SERVING) → engine → metrics → membership → SERVING
    drain   refuse new calls → NOT_SERVING, routers told → running calls end and are read, or the grace ends
    turn    NOT_SERVING, routers told → running calls end, or the timeout does → the other role announced → SERVING
    stop    leave the fleet → cancel what runs → server, metrics, engine

Health is SERVING only while the engine is loaded and makes progress (`baton.service.progress`), and the worker does not drain; of a
worker that can take several roles, only the service of its role serves. The role is what is announced: calls of any service
are taken at any time, since some were placed before a change of role.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import grpc

from baton import __version__
from baton.engine.aio import AsyncEngine
from baton.errors import DrainingError, InternalError, PreconditionError, UnavailableError
from baton.service.channel import fleet_files
from baton.service.membership import FleetAgent
from baton.service.metrics import WorkerMetrics
from baton.service.progress import EngineProgress, Problem, problem_of
from baton.service.running_calls import CallOutcome, RunningCalls
from baton.service.server import GrpcServer
from baton.service.settings import WorkerSettings
from baton.service.status_line import Snapshot, worker_snapshot
from baton.service.tracing import NoTracing, Tracing, open_tracing
from baton.service.tunnel import Method, TunnelServicer
from baton.service.worker_api import WORKER_SERVICE, WorkerServicer
from baton.types import Role, WorkerId, WorkerInfo, WorkerLoad
from baton.v1 import tunnel_pb2_grpc, worker_pb2_grpc

_log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.1
TOLD_S = 1.0
"""Longest wait for the routers to be told; one that is away learns it when it is joined."""
LAST_WORDS_S = 1.0
"""Longest wait for the routers to read what ended calls said; one that stands still never will."""
AUDIT_INTERVAL_S = 1.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists between a start that succeeded and the stop."""

    info: WorkerInfo
    fleet: FleetAgent
    tunnel: TunnelServicer
    watches: tuple[asyncio.Task[None], ...]


class WorkerHost:
    """See the module docstring."""

    def __init__(
        self,
        settings: WorkerSettings,
        role: Role,
        engine: AsyncEngine,
        *,
        services: Mapping[Role, str],
        roleless: Sequence[str] = (),
    ) -> None:
        """`services` has the full name of a gRPC service for each role that the worker can take; `role` is the first one. `roleless`
        services serve in every role.
        """
        self.settings = settings
        self.engine = engine
        self.metrics = WorkerMetrics(role)
        self.tracing: Tracing = NoTracing()
        """Made when the worker starts."""
        self.worker_id = WorkerId(settings.worker_id or _new_worker_id(role))
        self._role = role
        self._services = dict(services)
        names = [*services.values(), *roleless, WORKER_SERVICE]
        self._server = GrpcServer(settings, names, tls=fleet_files(settings))
        self._running: _Running | None = None
        self._draining = False
        self._on_refusing: list[Callable[[], None]] = []
        self._turning = asyncio.Lock()
        self._changing_to: Role | None = None
        self._problem: Problem | None = None
        self._calls = RunningCalls(self.metrics)
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
        return len(self._calls)

    @property
    def load(self) -> WorkerLoad:
        """The engine's latest."""
        return self.engine.load

    def snapshot(self) -> Snapshot:
        """For a status line."""
        return worker_snapshot(self.metrics.registry, self.engine.load)

    @property
    def changing_to(self) -> Role | None:
        """Set while a change of role waits for running calls."""
        return self._changing_to

    @property
    def problem(self) -> str:
        """Why the engine makes no progress; empty where it does."""
        return "" if self._problem is None else self._problem.reason

    @property
    def unready(self) -> str:
        """Why the worker should get no new requests; empty where it should."""
        if self._running is None:
            return "the worker is still loading its model"
        if self._draining or self._changing_to is not None:
            return "the worker is draining"
        return self.problem

    async def start(
        self, add_servicer: Callable[[grpc.aio.Server], None], tunnelled: Mapping[str, Method]
    ) -> WorkerInfo:
        """Returns once the worker serves; routers may call the `tunnelled` methods in tunnels too. Raises what the engine's build
        raises (`ModelLoadError`), and `UnavailableError` where a port is taken; then nothing is left running.
        """
        tunnel = TunnelServicer(tunnelled)
        self._server.register(add_servicer)
        self._server.register(
            lambda server: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(tunnel, server)
        )
        self._server.register(
            lambda server: worker_pb2_grpc.add_WorkerServiceServicer_to_server(
                WorkerServicer(self), server
            )
        )
        async with AsyncExitStack() as undo:
            service = f"baton-{self._role.value}"
            self.tracing = open_tracing(self.settings, service, self.worker_id)
            undo.push_async_callback(asyncio.to_thread, self.tracing.close)
            port = await self._server.start()
            undo.push_async_callback(self._server.stop, 0)
            undo.push_async_callback(self._stop_engine)
            await self.engine.start()
            # Routers are told of the free blocks with the first heartbeat.
            await self.engine.refresh_load()
            self.metrics.watch(
                self.engine.info, lambda: self.engine.load, lambda: self.engine.stalled_s
            )
            metrics_port = self.metrics.serve(self.settings.host, self.settings.metrics_port)
            undo.callback(self.metrics.close)
            info = self._describe(port, metrics_port)
            undo.pop_all()
        fleet = FleetAgent(info, self.engine, self.settings)
        fleet.start()
        watches = (
            asyncio.create_task(self._watch_health(), name="health"),
            asyncio.create_task(self._watch_blocks(), name="blocks"),
        )
        self._running = _Running(info, fleet, tunnel, watches)
        await self._publish()
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
        with self._calls.one() as outcome:
            yield outcome

    def refuse_calls(self) -> None:
        """New calls get `DrainingError` from now on. Idempotent."""
        self._draining = True
        for tell in self._on_refusing:
            tell()

    def when_refusing(self, tell: Callable[[], None]) -> None:
        """`tell` is called once new calls are refused; perhaps several times."""
        self._on_refusing.append(tell)

    async def drain(self, grace_s: float) -> bool:
        """Returns whether everything that ran has ended by itself within the grace. Idempotent."""
        self.refuse_calls()
        end_s = time.monotonic() + grace_s
        if self._running is not None:
            await self._publish()
            await self._running.fleet.told(min(grace_s, TOLD_S))
        if not await self._calls.idle(end_s - time.monotonic()):
            _log.warning("%d calls still run after the drain's %.0f s", len(self._calls), grace_s)
        elif self._running is not None:
            # A router that hears first that the worker has gone would take the last words for lost.
            await self._running.tunnel.finish(LAST_WORDS_S)
        return not self._calls

    async def set_role(self, role: Role, drain_timeout_s: float) -> Role:
        """Turns to another role: takes no new placements, lets what runs end for as long as the timeout, then announces it. What still
        runs goes on. Returns the role before. Cancelled, it leaves the role as it was. Idempotent; one change at a time.

        Raises `PreconditionError` where the worker cannot take the role, or drains to leave, and `UnavailableError` where it does
        not run.
        """
        if role not in self._services:
            raise PreconditionError(
                f"this {self._role.value} worker cannot be a {role.value} worker"
            )
        async with self._turning:
            previous = self.info.role
            if self._draining:
                raise PreconditionError("the worker is draining")
            if role is not previous:
                await self._turn_to(role, drain_timeout_s)
            return previous

    async def _turn_to(self, role: Role, drain_timeout_s: float) -> None:
        assert self._running is not None
        fleet = self._running.fleet
        self._changing_to = role
        try:
            await self._publish()
            await fleet.told(TOLD_S)
            await self._calls.idle(drain_timeout_s)
            if self._draining or self._running is None:
                raise PreconditionError("the worker is draining")
            self._role = self.metrics.role = role
            info = replace(self._running.info, role=role)
            self._running = replace(self._running, info=info)
            fleet.announce(info)
        finally:
            self._changing_to = None
            await self._publish()
        await fleet.told(TOLD_S)
        _log.info("a %s worker from now on; %d calls still run", role.value, len(self._calls))

    async def stop(self) -> None:
        """Ends everything at once. Idempotent."""
        self.refuse_calls()
        running, self._running = self._running, None
        if running is None:
            return
        for watch in running.watches:
            watch.cancel()
        await asyncio.wait(running.watches)
        await running.fleet.stop()
        await self._server.stop(0)
        # Handlers that the server cancelled unwind through the engine, which must outlive them.
        if not await self._calls.idle(STOP_TIMEOUT_S):
            _log.error("stopping: calls did not end within %.0f s", STOP_TIMEOUT_S)
        self.metrics.close()
        await self._stop_engine()
        await asyncio.to_thread(self.tracing.close)

    async def failed(self) -> None:
        """Returns once the engine has failed for good: the process should end, and be replaced."""
        await self._failed.wait()

    async def _stop_engine(self) -> None:
        # Whoever stops a worker must get to its end, also where a step hangs.
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.engine.stop()
        except TimeoutError:
            _log.error("stopping: the engine's step did not end within %.0f s", STOP_TIMEOUT_S)

    async def _watch_health(self) -> None:
        while True:
            engine = self.engine
            stalled_s = engine.stalled_s
            if not engine.failed and stalled_s >= self.settings.hang_limit_s:
                engine.give_up(f"a step has run for {stalled_s:.1f} s")
            progress = EngineProgress(
                failed=engine.failed,
                stalled_s=stalled_s,
                expected_s=engine.expected_s,
                stuck_s=engine.stuck_s,
            )
            before, self._problem = self._problem, problem_of(progress, self.settings)
            self.metrics.set_progress(progresses=self._problem is None)
            if before is None and self._problem is not None:
                _log.warning("no progress: %s", self._problem.reason)
            await self._publish()
            if engine.failed:
                self._failed.set()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _publish(self) -> None:
        """Tells health and the routers what this worker is good for now."""
        if self._running is None:
            return
        leaving = self._draining or self._changing_to is not None
        alive = self._problem is None or self._problem.alive
        others = [name for role, name in self._services.items() if role is not self._role]
        await self._server.set_serving(
            serving=not leaving and self._problem is None, alive=alive, idle=others
        )
        # A full pool they know from the load, and weigh: where there is no other worker, its queue is the better place to wait.
        self._running.fleet.set_standing(draining=leaving, stalled=not alive)

    async def _watch_blocks(self) -> None:
        """Apart from the health, which must not wait for a step that hangs."""
        with suppress(InternalError):  # the engine has failed
            while True:
                self.metrics.set_orphaned_blocks(await self.engine.orphaned_blocks())
                await asyncio.sleep(AUDIT_INTERVAL_S)

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
            can_be=tuple(self._services),
            weights=engine.weights,
        )


def _new_worker_id(role: Role) -> str:
    return f"{role.value}-{socket.gethostname()}-{secrets.token_hex(3)}"


def _reachable(host: str) -> str:
    """What others can connect to, given what this process listens on."""
    return socket.gethostname() if host in {"0.0.0.0", "::", "[::]"} else host  # noqa: S104
