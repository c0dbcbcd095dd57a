"""Pulling a range in pieces, over the memory transport."""

import asyncio
from itertools import pairwise

import pytest

from baton.errors import CorruptKVError, PreconditionError
from baton.transfer.base import KVTransport, PullRequest, WireKV
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.transfer.pieces import pull_pieces
from tests.contract.fake_source import SPEC, Act, FakeSource, key_for, kv_of, request_for

PIECE_BYTES = 4 * SPEC.token_bytes


class Sink:
    """Takes pieces as an engine does."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.data: list[bytes] = []
        self._busy = False
        self._fails_at = fails_at

    async def take(self, first: int, kv: WireKV) -> None:
        assert not self._busy, "pieces are handed over one at a time"
        self._busy = True
        await asyncio.sleep(0)
        self._busy = False
        if len(self.ranges) == self._fails_at:
            raise PreconditionError("the engine let go of the request")
        self.ranges.append((first, first + kv.shape[2]))
        self.data.append(kv.tobytes())


async def pull(
    request: PullRequest, sink: Sink, *, in_flight: int, budget: ByteCredits | None = None
) -> ByteCredits:
    budget = budget or ByteCredits(1 << 20)
    sources = MemorySources()
    transport: KVTransport = MemoryTransport(sources, budget)
    try:
        with sources.serving("p", FakeSource()):
            await pull_pieces(
                transport,
                "p",
                request,
                spec=SPEC,
                piece_bytes=PIECE_BYTES,
                in_flight=in_flight,
                timeout_s=5,
                into=sink.take,
            )
    finally:
        assert budget.in_use_bytes == 0
        budget.check_integrity()
    return budget


@pytest.mark.parametrize("in_flight", [1, 2, 5])
@pytest.mark.parametrize("act", [Act.GOOD, Act.SLOW])
async def test_pieces_arrive_in_order_and_whole(in_flight: int, act: Act) -> None:
    sink = Sink()
    key = key_for(act)
    await pull(request_for(key, 3, 21), sink, in_flight=in_flight)
    assert sink.ranges[0][0] == 3
    assert sink.ranges[-1][1] == 21
    assert all(a[1] == b[0] for a, b in pairwise(sink.ranges))
    assert sink.data == [
        kv_of(request_for(key, first, last), SPEC).tobytes() for first, last in sink.ranges
    ]


async def test_an_empty_range_is_pulled_once() -> None:
    sink = Sink()
    await pull(request_for(key_for(Act.GOOD), 6, 6), sink, in_flight=2)
    assert sink.ranges == [(6, 6)]


async def test_slow_pieces_overlap() -> None:
    """Eight pulls of a twentieth of a second each, four at once."""
    start_s = asyncio.get_running_loop().time()
    await pull(request_for(key_for(Act.SLOW), 0, 32), Sink(), in_flight=4)
    assert asyncio.get_running_loop().time() - start_s < 0.3


@pytest.mark.parametrize("in_flight", [1, 3])
async def test_a_corrupt_piece_ends_the_pull_as_itself(in_flight: int) -> None:
    with pytest.raises(CorruptKVError):
        await pull(request_for(key_for(Act.FLIPPED), 0, 32), Sink(), in_flight=in_flight)


async def test_an_import_that_fails_ends_the_pull_as_itself() -> None:
    sink = Sink(fails_at=2)
    with pytest.raises(PreconditionError, match="let go"):
        await pull(request_for(key_for(Act.GOOD), 0, 32), sink, in_flight=3)
    assert len(sink.ranges) == 2


async def test_pieces_of_two_requests_share_a_budget_of_one_piece() -> None:
    """However pieces of several requests take turns, a budget that fits only one of them deadlocks nothing."""
    budget = ByteCredits(PIECE_BYTES)
    sinks = [Sink() for _ in range(4)]
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for i, sink in enumerate(sinks):
            request = request_for(key_for(Act.GOOD, i), 0, 40)
            group.create_task(_pull_with(budget, request, sink))
    assert all(sum(map(len, sink.data)) == 40 * SPEC.token_bytes for sink in sinks)
    assert budget.in_use_bytes == 0


async def _pull_with(budget: ByteCredits, request: PullRequest, sink: Sink) -> None:
    sources = MemorySources()
    with sources.serving("p", FakeSource()):
        await pull_pieces(
            MemoryTransport(sources, budget),
            "p",
            request,
            spec=SPEC,
            piece_bytes=PIECE_BYTES,
            in_flight=3,
            timeout_s=5,
            into=sink.take,
        )


async def test_cancelling_the_pull_leaves_nothing_in_flight() -> None:
    budget = ByteCredits(1 << 20)
    task = asyncio.create_task(
        pull(request_for(key_for(Act.SLOW), 0, 32), Sink(), in_flight=3, budget=budget)
    )
    await asyncio.sleep(0.07)
    assert budget.in_use_bytes > 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert budget.in_use_bytes == 0
    assert budget.waiting == 0
