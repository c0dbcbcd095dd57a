"""Calls to a worker whose membership ends meanwhile: they fail as what they are, and cancel nobody."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import grpc
import pytest

from baton.errors import UnavailableError
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.types import AttemptKey, RequestId, Role, WorkerId
from baton.v1 import decode_pb2_grpc, worker_pb2_grpc
from router import members
from router.autoscale import RoleChange
from router.autoscaler import Autoscaler
from router.fleet import Fleet
from router.members import Member
from router.policies import policy_of
from tests.unit.test_registry import info

SETTINGS = RouterSettings()


class Silent(worker_pb2_grpc.WorkerServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Answers nothing."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def _stay(self, request: object, context: object) -> None:  # noqa: ARG002
        self.asked.set()
        await asyncio.Event().wait()

    SetRole = Find = HandOver = _stay


class Rig:
    def __init__(
        self, fleet: Fleet, metrics: RouterMetrics, silent: Silent, member: Member
    ) -> None:
        self.fleet, self.metrics, self.silent, self.member = fleet, metrics, silent, member

    async def lost_during(self, call: Awaitable[object]) -> object:
        """What comes of a call during which the worker leaves; of a cancelled one, a `CancelledError`."""
        task = asyncio.ensure_future(call)
        await self.silent.asked.wait()
        self.fleet.leave(self.member, "its lease passed")
        async with asyncio.timeout(5):
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
        return outcome


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(members, "CLOSE_GRACE_S", 0.05)
    silent, server = Silent(), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(silent, server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(silent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    metrics = RouterMetrics()
    policy = policy_of(SETTINGS.placement, local_prefill_tokens=0)
    fleet = Fleet(SETTINGS, policy, metrics)
    member = fleet.join(replace(info("w"), address=f"127.0.0.1:{port}"))
    yield Rig(fleet, metrics, silent, member)
    await fleet.close()
    await server.stop(0)
    metrics.close()


KEY = AttemptKey(RequestId("r"), 0)
CALLS: dict[str, Callable[[Member], Awaitable[object]]] = {
    "set_role": lambda member: member.set_role(Role.PREFILL, 30.0),
    "hand_over": lambda member: member.hand_over(KEY, "me"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_to_a_worker_that_is_lost_fails_as_unavailable(rig: Rig, name: str) -> None:
    """Promise: whoever waits for a worker's answer is told that it is gone, and goes on."""
    assert isinstance(await rig.lost_during(CALLS[name](rig.member)), UnavailableError)


async def test_a_worker_that_is_lost_while_it_is_asked_holds_nothing(rig: Rig) -> None:
    """Promise: who attaches while a worker leaves is told of what the others hold."""
    found = await rig.lost_during(rig.member.find("r", ""))
    assert not found.attempts  # type: ignore[attr-defined]


async def test_a_worker_that_is_lost_while_it_turns_ends_no_autoscaling(rig: Rig) -> None:
    """Promise: it counts as a change that failed; the next one is made all the same."""
    autoscaler = Autoscaler(rig.fleet, SETTINGS, rig.metrics)
    change = RoleChange(WorkerId("w"), Role.PREFILL, "test")
    assert await rig.lost_during(autoscaler._make(change)) is None
    labels = {"role": "prefill", "outcome": "unavailable"}
    name = "baton_autoscaler_changes_total"
    assert rig.metrics.registry.get_sample_value(name, labels) == 1
