"""Puts the snapshot together, for one caller: who administers sees everything, a tenant what is its own.

Costs some ten microseconds for each request and worker, on the router's event loop, where tokens wait meanwhile: so the JSON is made
`FRESH_S` apart at the least for each view, however many watch it. Nothing here waits.
"""

import time
from collections.abc import Callable

from baton import __version__
from baton.service.access import Caller
from baton.types import WorkerLoad
from router.fleet import Fleet, MemberReport
from router.model import ServedModel
from router.sessions.recent import Recent, RecentSessions
from router.status.activity import Activity
from router.status.snapshot import (
    SNAPSHOT,
    KvBlocks,
    ModelStatus,
    RouterStatus,
    SessionsStatus,
    SessionStatus,
    StatusSnapshot,
    WorkerState,
    WorkerStatus,
)

FRESH_S = 0.25


class StatusBoard:
    """See the module docstring."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        activity: Activity,
        sessions: RecentSessions,
        *,
        is_draining: Callable[[], bool],
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._activity = activity
        self._sessions = sessions
        self._is_draining = is_draining
        self._began_s = time.monotonic()
        self._fresh: dict[str | None, tuple[float, bytes]] = {}
        """By whose view it is: when it was made, and the JSON."""

    def snapshot(self, caller: Caller) -> StatusSnapshot:
        """As the caller may see it."""
        fleet = None
        if caller.is_admin:
            fleet = tuple(worker_status(report) for report in self._fleet.reports())
        return StatusSnapshot(
            at_unix_s=time.time(),
            tenant=None if caller.is_admin else caller.tenant,
            router=self._router(),
            fleet=fleet,
            requests=self._activity.requests(caller),
            sessions=self._sessions_of(caller),
            traffic=self._activity.traffic(caller),
        )

    def json(self, caller: Caller) -> bytes:
        """The snapshot, of `FRESH_S` ago at most."""
        now_s = time.monotonic()
        self._fresh = {
            viewer: (made_s, told)
            for viewer, (made_s, told) in self._fresh.items()
            if now_s - made_s < FRESH_S
        }
        viewer = None if caller.is_admin else caller.tenant
        if viewer not in self._fresh:
            self._fresh[viewer] = (now_s, SNAPSHOT.dump_json(self.snapshot(caller)))
        return self._fresh[viewer][1]

    def _router(self) -> RouterStatus:
        latest = self._model.latest
        return RouterStatus(
            version=__version__,
            uptime_s=time.monotonic() - self._began_s,
            draining=self._is_draining(),
            model=None
            if latest is None
            else ModelStatus(
                name=self._model.name,
                fingerprint=latest.spec.model_fingerprint,
                dtype=latest.spec.dtype.value,
                max_context_tokens=latest.max_context_tokens,
            ),
        )

    def _sessions_of(self, caller: Caller) -> SessionsStatus:
        counts = self._sessions.counts if caller.is_admin else None
        return SessionsStatus(
            idle=None if counts is None else counts.idle,
            generating=None if counts is None else counts.generating,
            recent=tuple(map(session_status, self._sessions.seen_by(caller, time.time()))),
        )


def worker_status(report: MemberReport) -> WorkerStatus:
    """A member as it is told of."""
    info, load = report.info, report.load
    return WorkerStatus(
        worker_id=info.worker_id,
        role=info.role,
        can_be=info.can_be,
        state=_state(report),
        node=info.node,
        device=info.device,
        weights=info.weight_format.value,
        version=info.version,
        member_s=report.member_s,
        heard_s=report.heard_s,
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        queued_prefill_tokens=load.queued_prefill_tokens,
        kv=_blocks(info.num_blocks, load),
        block_size_tokens=info.block_size_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_s=load.decode_step_s,
    )


def session_status(recent: Recent) -> SessionStatus:
    """A session as it is told of."""
    session = recent.session
    return SessionStatus(
        session_id=session.key.session_id,
        tenant=session.key.tenant,
        generating=recent.generating,
        turns=session.turns,
        failed_turns=session.failed_turns,
        history_tokens=session.history_tokens,
        prompt_tokens=session.prompt_tokens,
        cached_tokens=session.cached_tokens,
        last_cached_tokens=session.last_cached_tokens,
        completion_tokens=session.completion_tokens,
        decode_worker=session.decode_worker,
        updated_unix_s=session.updated_s,
        expires_unix_s=session.expires_s,
    )


def _state(report: MemberReport) -> WorkerState:
    if report.draining:
        return WorkerState.DRAINING
    if report.stalled:
        return WorkerState.STALLED
    if report.silent:
        return WorkerState.SILENT
    return WorkerState.SUSPECT if report.suspect else WorkerState.READY


def _blocks(total: int, load: WorkerLoad) -> KvBlocks:
    return KvBlocks(
        total=total,
        free=load.free_blocks,
        cached=load.cached_blocks,
        reserved=load.reserved_blocks,
        used=load.used_blocks,
        in_flight=load.in_flight_blocks,
    )
