"""The router, put together: one object in a process of its own (`python -m router`), inside `baton serve`, and in tests.

    start   session store → metrics → ports → SERVING
    drain   NOT_SERVING, new requests refused → running ones end, or the grace does
    stop    requests fail with UNAVAILABLE → ports → members → session store → metrics

All methods are called on the event loop on which it was started.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from functools import partial

import grpc

from baton.errors import BatonError, DrainingError
from baton.service.access import Access
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.service.status_line import Snapshot, StatusLine, buckets, totals, used_share
from baton.service.tracing import NoTracing, Tracing, open_tracing
from baton.v1 import fleet_pb2_grpc, inference_pb2_grpc, session_pb2_grpc
from router.admission import Admission
from router.autoscaler import Autoscaler
from router.fleet import Fleet
from router.http.front import HttpFront
from router.http.health import health_routes
from router.http.openai.routes import openai_routes
from router.inference import Inference
from router.joining import FleetServicer
from router.kserve.servicer import OpenInferenceServicer
from router.kserve.v2 import inference_pb2_grpc as kserve_grpc
from router.model import ServedModel
from router.placement import Policy
from router.policies import policy_of
from router.ports import Ports, client_tls
from router.requests import RequestTable
from router.servicer import InferenceServicer
from router.sessions.location import open_store
from router.sessions.manager import SessionManager
from router.sessions.metrics import SessionMetrics
from router.sessions.recent import RecentSessions
from router.sessions.servicer import SessionServicer
from router.status.activity import Activity
from router.status.board import StatusBoard
from router.status.http import page_routes, status_routes
from router.tenants import LimitsOf
from router.text import Tokenizer

_log = logging.getLogger(__name__)

INFERENCE_SERVICE = "baton.v1.InferenceService"
FLEET_SERVICE = "baton.v1.FleetService"
SESSION_SERVICE = "baton.v1.SessionService"
OPEN_INFERENCE_SERVICE = "inference.GRPCInferenceService"
ABORT_TIMEOUT_S = 5.0
"""How long requests that are told to end may take to do so."""


class RouterApp:
    """See the module docstring."""

    def __init__(
        self,
        settings: RouterSettings,
        tokenizer: Tokenizer,
        policy: Policy | None = None,
        limits: LimitsOf | None = None,
    ) -> None:
        """`policy` places requests; None is the one that the settings name. `limits` are each tenant's; None are those of its keys.
        Raises `InvalidRequestError` where the settings contradict each other or name an unusable file.
        """
        self._settings = settings
        self.metrics = RouterMetrics()
        self.model = ServedModel(settings, tokenizer)
        self.fleet = Fleet(
            settings,
            policy
            or policy_of(settings.placement, local_prefill_tokens=settings.local_prefill_tokens),
            self.metrics,
            rest_s=lambda: self.table.rest_s,
        )
        self._ports = Ports(
            settings,
            client_services=[INFERENCE_SERVICE, SESSION_SERVICE, OPEN_INFERENCE_SERVICE],
            fleet_service=FLEET_SERVICE,
            on_refused=self.metrics.record_refused_call,
        )
        self.http: HttpFront | None = None
        """Where the settings ask for one."""
        if settings.http_listen:
            self.http = HttpFront(settings, self._ports.access, tls=client_tls(settings))
        admission = Admission(
            max_running=settings.max_running,
            max_queued=settings.max_queued,
            ageing_s=settings.priority_ageing_s,
            limits=limits or self._ports.access.limits_of,
        )
        self.table = RequestTable(
            admission, self.metrics, client_messages_per_s=settings.client_messages_per_s
        )
        self._sessions: SessionManager | None = None
        self._recent = RecentSessions()
        self._activity = Activity()
        self.board = StatusBoard(
            self.model,
            self.fleet,
            self._activity,
            self._recent,
            is_draining=lambda: self.table.refuses,
        )
        self._tracing: Tracing = NoTracing()
        self._status_line = StatusLine(self._snapshot, settings.status_line_s)
        self.metrics_port = 0
        self._tasks: list[asyncio.Task[None]] = []
        """Run until it stops."""

    @property
    def port(self) -> int:
        """Where clients find it. Precondition: started."""
        return self._ports.port

    @property
    def fleet_port(self) -> int:
        """Where workers find it. Precondition: started."""
        return self._ports.fleet_port

    async def start(self) -> int:
        """Returns the port once the router serves. Raises `UnavailableError` where a port is taken or the session store cannot be opened,
        `InvalidRequestError` where it names none; then nothing is left running.
        """
        store = open_store(self._settings.session_store, self._settings.port)
        sessions = self._sessions = SessionManager(
            store, self._settings, SessionMetrics(self.metrics.registry), recent=self._recent
        )
        try:
            self._tracing = open_tracing(
                self._settings, "baton-router", f"{socket.gethostname()}-{os.getpid()}"
            )
            self._register(sessions)
            self.metrics_port = self.metrics.serve(self._settings.host, self._settings.metrics_port)
            await self._ports.start()
            if self.http is not None:
                await self.http.start()
        except BatonError:
            await self._ports.stop()
            await sessions.close()
            self.metrics.close()
            await asyncio.to_thread(self._tracing.close)
            raise
        sessions.start()
        await self._ports.set_serving(serving=True)
        self._status_line.start()
        self._keep(self.table.follow_limits(), "limits")
        if self._settings.autoscale:
            autoscaler = Autoscaler(self.fleet, self._settings, self.metrics)
            self._keep(autoscaler.run(), "autoscaler")
        ports = (self.port, self.fleet_port, self.metrics_port)
        _log.info("serving on port %d, workers join on port %d, metrics on port %d", *ports)
        if self.http is not None:
            _log.info("serving HTTP on port %d", self.http.port)
        return self.port

    async def drain(self, grace_s: float) -> bool:
        """Returns whether every request has ended by itself within the grace. Idempotent."""
        self.table.refuse_new()
        await self._ports.set_serving(serving=False)
        if self.http is not None:
            self.http.drain()
        idle = await self.table.idle(grace_s)
        if not idle:
            _log.warning("%d requests still run after the drain's %.0f s", len(self.table), grace_s)
        return idle

    async def stop(self) -> None:
        """Ends everything at once. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.table.refuse_new()
        self.fleet.keep_orphans()
        self.table.abort_all(DrainingError("the router stopped"))
        if not await self.table.idle(ABORT_TIMEOUT_S):
            _log.error("stopping: %d requests did not end", len(self.table))
        if self.http is not None:
            await self.http.stop()
        await self._ports.stop()
        await self.fleet.close()
        if self._sessions is not None:
            await self._sessions.close()
        await self._status_line.close()
        self.metrics.close()
        await asyncio.to_thread(self._tracing.close)

    def _keep(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_tell_of_bug)
        self._tasks.append(task)

    def _register(self, sessions: SessionManager) -> None:
        inference = Inference(
            self.model,
            self.fleet,
            self.table,
            sessions,
            settings=self._settings,
            metrics=self.metrics,
            tracing=self._tracing,
            activity=self._activity,
        )
        fleet = FleetServicer(self.fleet, self.model, self._settings)
        self._ports.register_for_clients(partial(self._add_client_services, inference, sessions))
        self._ports.register_for_fleet(
            lambda server: fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        )
        if self.http is not None:
            self.http.add(health_routes(inference, self.metrics), needs_key=False)
            self.http.add(openai_routes(inference, self.model))
            self.http.add(status_routes(self.board))
            self.http.add(page_routes(), needs_key=False)

    async def _snapshot(self) -> Snapshot:
        registry, ttft = self.metrics.registry, "baton_time_to_first_token_seconds"
        prompt, cached, completion, handed = (
            f"baton_{name}_total"
            for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "handoff_bytes")
        )
        done = totals(registry, prompt, cached, completion, handed)
        return Snapshot(
            at_s=time.monotonic(),
            prompt_tokens=done[prompt],
            looked_up_tokens=done[prompt],
            # Those of a request are counted at its end.
            generated_tokens=done[completion] + self.table.completion_tokens,
            reused_tokens=done[cached],
            handoff_bytes=done[handed],
            running=len(self.table) - self.table.num_waiting,
            waiting=self.table.num_waiting,
            kv_used=used_share(self.fleet.registry.loads()),
            ttft_s=buckets(registry, ttft),
        )

    def _add_client_services(
        self,
        inference: Inference,
        sessions: SessionManager,
        server: grpc.aio.Server,
        access: Access,
    ) -> None:
        servicer = InferenceServicer(
            inference, access=access, write_stall_s=self._settings.write_stall_s
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        session = SessionServicer(sessions, self.model, access=access)
        session_pb2_grpc.add_SessionServiceServicer_to_server(session, server)
        open_inference = OpenInferenceServicer(
            inference, self.model.tokenizer, access=access, settings=self._settings
        )
        kserve_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)


def _tell_of_bug(task: asyncio.Task[None]) -> None:
    """Nobody awaits a task that runs until the router stops: one that ends before would do so in silence."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.error("the router goes on without its task %r", task.get_name(), exc_info=error)


def load_tokenizer(settings: RouterSettings) -> Tokenizer:
    """Reads files. Raises `ModelLoadError`."""
    return Tokenizer.load(settings.model) if settings.model else Tokenizer.of_bytes()
