"""The table of running requests: who has an id and a place, and who has them next."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest

from baton.errors import AlreadyExistsError, CancelledError, DrainingError, NotFoundError
from baton.service.keys import TenantLimits
from baton.service.metrics import RouterMetrics
from baton.types import RequestId
from router.admission import Admission
from router.requests import MAX_REST_S, RequestTable
from router.tenants import Demand

NAME = RequestId("r")


class Rig:
    """One place."""

    def __init__(self) -> None:
        self.metrics = RouterMetrics()
        self.admission = Admission(
            max_running=1, max_queued=4, ageing_s=1.0, limits=lambda _: TenantLimits()
        )
        self.table = RequestTable(self.admission, self.metrics)

    def enter(self, *, goes_on: bool = False) -> AbstractAsyncContextManager[None]:
        return self.table.enter(
            NAME,
            Demand(tenant="t", prompt_tokens=0 if goes_on else 10, max_tokens=0),
            predicted_ttft_s=lambda: None,
            completion_tokens=lambda: 0,
            goes_on=goes_on,
        )

    def start(self, *, goes_on: bool = False) -> "Request":
        return Request(self.enter(goes_on=goes_on))


class Request:
    """Stays until it is told to leave."""

    def __init__(self, entry: AbstractAsyncContextManager[None]) -> None:
        self.is_in, self._leave = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run(entry))

    async def _run(self, entry: AbstractAsyncContextManager[None]) -> None:
        async with entry:
            self.is_in.set()
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    async with asyncio.timeout(10):
        yield made
        assert await made.table.idle(1)
    assert (made.admission.running, made.admission.queued) == (0, 0)
    made.admission.check_integrity()
    made.metrics.close()


async def test_a_request_that_goes_on_has_the_place_of_the_one_that_it_replaces(rig: Rig) -> None:
    """Promise: it waits for nothing; the place is free once it ends, and no sooner."""
    first = rig.start()
    await first.is_in.wait()
    with pytest.raises(AlreadyExistsError):
        async with rig.enter():
            pass
    second = rig.start(goes_on=True)
    await second.is_in.wait()
    await first.leave()
    assert rig.admission.running == 1
    rig.table.cancel(NAME, "t")
    with pytest.raises(CancelledError):
        await second.task


async def test_a_request_that_was_not_replaced_after_all_has_its_id_and_place_back(
    rig: Rig,
) -> None:
    """Promise: whoever attaches and leaves again takes nothing along, and frees no place that is taken."""
    first = rig.start()
    await first.is_in.wait()
    for _ in range(3):
        async with rig.enter(goes_on=True):
            assert rig.admission.running == 1
        assert rig.admission.running == 1
    rig.table.cancel(NAME, "t")
    with pytest.raises(CancelledError):
        await first.task
    with pytest.raises(NotFoundError):
        rig.table.cancel(NAME, "t")


async def test_of_many_that_go_on_the_last_one_has_the_place(rig: Rig) -> None:
    """In whichever order they end."""
    requests = [rig.start()]
    for _ in range(3):
        await requests[-1].is_in.wait()
        requests.append(rig.start(goes_on=True))
    await requests[-1].is_in.wait()
    for number in (1, 0, 2):
        await requests[number].leave()
        assert rig.admission.running == 1
    await requests[-1].leave()


async def test_a_place_goes_back_past_those_that_have_ended(rig: Rig) -> None:
    """Promise: however its owner is replaced, a stream that goes on is never without its id and a place: its tenant has no more
    than it may.
    """
    first = rig.start()
    await first.is_in.wait()
    second = rig.start(goes_on=True)
    await second.is_in.wait()
    third = rig.start(goes_on=True)
    await third.is_in.wait()
    await second.leave()
    await third.leave()
    assert rig.admission.running == 1
    rig.table.cancel(NAME, "t")
    with pytest.raises(CancelledError):
        await first.task


async def test_a_draining_router_takes_no_request_from_its_stream(rig: Rig) -> None:
    first = rig.start()
    await first.is_in.wait()
    rig.table.refuse_new()
    with pytest.raises(DrainingError):
        async with rig.enter(goes_on=True):
            pass
    rig.table.abort_all(DrainingError("the router stopped"))
    with pytest.raises(DrainingError, match="stopped"):
        await first.task


def test_tokens_rest_the_longer_the_more_completions_are_told() -> None:
    """Promise: all completions together, those of one request too, make no more messages than were asked for; few do not rest at all,
    and none rests for long.
    """
    rig = Rig()
    table = RequestTable(rig.admission, rig.metrics, client_messages_per_s=1000.0)
    with table.streaming(4):
        assert table.rest_s == 0.0
        with table.streaming(16):
            assert table.rest_s == pytest.approx(0.02)
            with table.streaming(5000):
                assert table.rest_s == MAX_REST_S
        assert table.rest_s == 0.0
