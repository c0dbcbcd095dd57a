"""Lets roles follow the load: samples the fleet, asks `router.autoscale`, and tells workers. One task on the router's event loop.

Only one router of a fleet should run it: each sees what it sent itself.
"""

import asyncio
import logging
import time
from collections import deque

from baton.errors import BatonError
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.types import Role, WorkerId
from router.autoscale import AutoscaleConfig, FleetSample, RoleChange, decide
from router.fleet import Fleet

_log = logging.getLogger(__name__)

MEMORY_WINDOWS = 6
"""The rate of prefill is measured over so many windows."""


class Autoscaler:
    """See the module docstring."""

    def __init__(self, fleet: Fleet, settings: RouterSettings, metrics: RouterMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._settings = settings
        self._config = AutoscaleConfig(
            window_s=settings.autoscale_window_s,
            dwell_s=settings.autoscale_dwell_s,
            cooldown_s=settings.autoscale_cooldown_s,
            backlog_limit_s=settings.autoscale_backlog_s,
            decode_requests_limit=settings.autoscale_decode_requests,
        )
        self._history: deque[FleetSample] = deque()
        self._roles: dict[WorkerId, Role] = {}
        self._changed_at_s: dict[WorkerId, float] = {}

    async def run(self) -> None:
        """Returns never."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            now_s = time.monotonic()
            self._sample(now_s)
            change = decide(self._history, self._changed_at_s, now_s, self._config)
            if change is not None:
                await self._make(change)

    def _sample(self, now_s: float) -> None:
        sample = self._fleet.registry.sample(now_s)
        self._history.append(sample)
        while self._history[0].at_s < now_s - MEMORY_WINDOWS * self._config.window_s:
            self._history.popleft()
        # Changes that operators make count too.
        roles = {worker.worker_id: worker.role for worker in sample.workers}
        for worker_id, role in roles.items():
            if self._roles.get(worker_id, role) is not role:
                self._changed_at_s[worker_id] = now_s
        self._changed_at_s = {
            worker_id: at_s for worker_id, at_s in self._changed_at_s.items() if worker_id in roles
        }
        self._roles = roles

    async def _make(self, change: RoleChange) -> None:
        """A change that failed counts as one, so that the worker is left alone for a while."""
        _log.info(
            "worker %s turns to %s: %s", change.worker_id, change.to_role.value, change.reason
        )
        failure: BatonError | None = None
        try:
            await self._fleet.set_role(
                change.worker_id, change.to_role, self._settings.drain_grace_s
            )
        except BatonError as error:
            failure = error
        finally:
            self._changed_at_s[change.worker_id] = time.monotonic()
        if failure is not None:
            _log.warning("worker %s did not turn: %s", change.worker_id, failure.message)
        self._metrics.record_autoscaling(change.to_role, failure)
