"""FleetService: workers join, hold a lease by heartbeat, and leave. A membership is one Join call, and ends with it or with its lease.

Runs on the router's event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton import codec
from baton.errors import FieldViolation, InvalidRequestError, PreconditionError, UnavailableError
from baton.service.settings import RouterSettings
from baton.v1 import fleet_pb2, fleet_pb2_grpc
from router.fleet import Fleet
from router.model import ServedModel

_log = logging.getLogger(__name__)


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """See the module docstring."""

    def __init__(self, fleet: Fleet, model: ServedModel, settings: RouterSettings) -> None:
        self._fleet = fleet
        self._model = model
        self._settings = settings

    async def Join(  # noqa: N802 - gRPC's name
        self,
        requests: AsyncIterator[fleet_pb2.JoinRequest],
        context: grpc.aio.ServicerContext[fleet_pb2.JoinRequest, fleet_pb2.JoinResponse],
    ) -> None:
        """Returns when the worker leaves; raises where it is refused or its lease passed."""
        first = await self._next(requests)
        if first is None:
            return
        if not first.HasField("announce"):
            raise InvalidRequestError(FieldViolation("event", "the first must be an announce"))
        info = codec.worker_info_from_proto(first.announce.info)
        why_not = self._model.check(info)
        if why_not is not None:
            _log.warning("worker %s was refused: %s", info.worker_id, why_not)
            raise PreconditionError(why_not)
        self._model.learn(info)
        member = self._fleet.join(info)
        why = "its connection broke"
        try:
            terms = fleet_pb2.JoinResponse.Joined(
                heartbeat_seconds=self._settings.heartbeat_s, lease_seconds=self._settings.lease_s
            )
            await context.write(fleet_pb2.JoinResponse(joined=terms))
            while (request := await self._next(requests)) is not None:
                if request.HasField("announce"):
                    announced = codec.worker_info_from_proto(request.announce.info)
                    self._fleet.change_role(member, announced)
                    continue
                if not request.HasField("heartbeat"):
                    raise InvalidRequestError(
                        FieldViolation("event", "must be a heartbeat or an announce")
                    )
                beat = request.heartbeat
                self._fleet.heartbeat(
                    member,
                    codec.load_from_proto(beat.load),
                    codec.prefix_delta_from_proto(beat.prefix),
                    draining=beat.draining,
                    stalled=beat.stalled,
                )
            why = "it said so"
        except UnavailableError as error:
            why = error.message
            raise
        finally:
            self._fleet.leave(member, why)

    async def _next(
        self, requests: AsyncIterator[fleet_pb2.JoinRequest]
    ) -> fleet_pb2.JoinRequest | None:
        """The next message; None at the end of the stream. Raises `UnavailableError` once the lease has passed without one."""
        lease_s = self._settings.lease_s
        pending: asyncio.Task[Any] = asyncio.ensure_future(_anext(requests))
        try:
            began_s = time.monotonic()
            await asyncio.wait({pending}, timeout=lease_s)
            if not pending.done() and time.monotonic() - began_s > 1.25 * lease_s:
                # This process was the one that slept: what arrived meanwhile is yet to be read.
                await asyncio.wait({pending}, timeout=lease_s / 2)
            if not pending.done():
                raise UnavailableError(f"no heartbeat for {lease_s:g} s")
            return pending.result()  # type: ignore[no-any-return]
        finally:
            pending.cancel()


async def _anext(requests: AsyncIterator[fleet_pb2.JoinRequest]) -> fleet_pb2.JoinRequest | None:
    return await anext(requests, None)
