"""The router, put together: one object in a process of its own (`python -m router`), inside `baton serve`, and in tests.

    start   session store → metrics → server → SERVING
    drain   NOT_SERVING, new requests refused → running ones end, or the grace does
    stop    requests fail with UNAVAILABLE → server → members → session store → metrics

All methods are called on the event loop on which it was started.
"""

import asyncio
import logging

from baton.errors import DrainingError, UnavailableError
from baton.service.metrics import RouterMetrics
from baton.service.server import GrpcServer
from baton.service.settings import RouterSettings
from baton.v1 import fleet_pb2_grpc, inference_pb2_grpc, session_pb2_grpc
from router.admission import Admission
from router.autoscaler import Autoscaler
from router.fleet import Fleet, FleetServicer
from router.model import ServedModel
from router.placement import Policy
from router.policies import policy_of
from router.requests import RequestTable
from router.servicer import InferenceServicer
from router.sessions.location import open_store
from router.sessions.manager import SessionManager
from router.sessions.metrics import SessionMetrics
from router.sessions.servicer import SessionServicer
from router.tenants import LimitsOf, unlimited
from router.text import Tokenizer

_log = logging.getLogger(__name__)

INFERENCE_SERVICE = "baton.v1.InferenceService"
FLEET_SERVICE = "baton.v1.FleetService"
SESSION_SERVICE = "baton.v1.SessionService"
ABORT_TIMEOUT_S = 5.0
"""How long requests that are told to end may take to do so."""


class RouterApp:
    """See the module docstring."""

    def __init__(
        self,
        settings: RouterSettings,
        tokenizer: Tokenizer,
        policy: Policy | None = None,
        limits: LimitsOf = unlimited,
    ) -> None:
        """`policy` places requests; None is the one that the settings name. `limits` are each tenant's."""
        self._settings = settings
        self.metrics = RouterMetrics()
        self.model = ServedModel(settings, tokenizer)
        self.fleet = Fleet(
            settings,
            policy
            or policy_of(settings.placement, local_prefill_tokens=settings.local_prefill_tokens),
            self.metrics,
        )
        admission = Admission(
            max_running=settings.max_running,
            max_queued=settings.max_queued,
            ageing_s=settings.priority_ageing_s,
            limits=limits,
        )
        self.table = RequestTable(admission, self.metrics)
        self._server = GrpcServer(settings, [INFERENCE_SERVICE, SESSION_SERVICE, FLEET_SERVICE])
        self._sessions: SessionManager | None = None
        self.metrics_port = 0
        self._autoscaling: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens. Precondition: started."""
        return self._server.port

    async def start(self) -> int:
        """Returns the port once the router serves. Raises `UnavailableError` where a port is taken or the session store cannot be opened,
        `InvalidRequestError` where it names none; then nothing is left running.
        """
        store = open_store(self._settings.session_store, self._settings.port)
        sessions = self._sessions = SessionManager(
            store, self._settings, SessionMetrics(self.metrics.registry)
        )
        inference = InferenceServicer(
            self.model,
            self.fleet,
            self.table,
            sessions,
            settings=self._settings,
            metrics=self.metrics,
        )
        session = SessionServicer(sessions, self.model)
        fleet = FleetServicer(self.fleet, self.model, self._settings)
        self._server.register(
            lambda server: inference_pb2_grpc.add_InferenceServiceServicer_to_server(
                inference, server
            )
        )
        self._server.register(
            lambda server: session_pb2_grpc.add_SessionServiceServicer_to_server(session, server)
        )
        self._server.register(
            lambda server: fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        )
        try:
            self.metrics_port = self.metrics.serve(self._settings.host, self._settings.metrics_port)
            await self._server.start()
        except UnavailableError:
            await sessions.close()
            self.metrics.close()
            raise
        sessions.start()
        await self._server.set_serving(serving=True)
        if self._settings.autoscale:
            autoscaler = Autoscaler(self.fleet, self._settings)
            self._autoscaling = asyncio.create_task(autoscaler.run(), name="autoscaler")
        _log.info("serving on port %d, metrics on port %d", self.port, self.metrics_port)
        return self.port

    async def drain(self, grace_s: float) -> bool:
        """Returns whether every request has ended by itself within the grace. Idempotent."""
        self.table.refuse_new()
        await self._server.set_serving(serving=False)
        idle = await self.table.idle(grace_s)
        if not idle:
            _log.warning("%d requests still run after the drain's %.0f s", len(self.table), grace_s)
        return idle

    async def stop(self) -> None:
        """Ends everything at once. Idempotent."""
        if self._autoscaling is not None:
            self._autoscaling.cancel()
            await asyncio.wait({self._autoscaling})
        self.table.refuse_new()
        self.fleet.keep_orphans()
        self.table.abort_all(DrainingError("the router stopped"))
        if not await self.table.idle(ABORT_TIMEOUT_S):
            _log.error("stopping: %d requests did not end", len(self.table))
        await self._server.stop(0)
        await self.fleet.close()
        if self._sessions is not None:
            await self._sessions.close()
        self.metrics.close()


def load_tokenizer(settings: RouterSettings) -> Tokenizer:
    """Reads files. Raises `ModelLoadError`."""
    return Tokenizer.load(settings.model) if settings.model else Tokenizer.of_bytes()
