"""The worker's side of the fleet, against a fake router."""

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.codec import load_from_proto, prefix_delta_from_proto, worker_info_from_proto
from baton.errors import UnavailableError
from baton.kv.spec import KVDtype, KVSpec
from baton.service.membership import MAX_HASHES, FleetAgent
from baton.service.server import GrpcServer
from baton.service.settings import RouterSettings, WorkerSettings
from baton.types import BlockHash, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from baton.v1 import fleet_pb2, fleet_pb2_grpc

INFO = WorkerInfo(
    worker_id=WorkerId("w"),
    role=Role.DECODE,
    address="127.0.0.1:1",
    transfer_address="w",
    model="m",
    spec=KVSpec(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        dtype=KVDtype.FLOAT32,
        position_scheme="sim",
        model_fingerprint="f",
    ),
    vocab_size=10,
    max_context_tokens=100,
    eos_token_ids=(0,),
    block_size_tokens=16,
    num_blocks=10,
    node="n",
    pid=1,
    device="sim",
    version="0",
)


class FakeFeed:
    """A prefix cache of a few blocks."""

    def __init__(self, whole: PrefixDelta) -> None:
        self.next = whole
        self.closed = False

    def take(self) -> PrefixDelta:
        delta, self.next = self.next, PrefixDelta()
        return delta

    def close(self) -> None:
        self.closed = True


class FakeReporter:
    """What an engine reports."""

    def __init__(self) -> None:
        self.load = WorkerLoad(free_blocks=10)
        self.whole = PrefixDelta(stored=(BlockHash(1), BlockHash(2)))
        self.feeds: list[FakeFeed] = []

    def prefix_feed(self) -> FakeFeed:
        self.feeds.append(FakeFeed(self.whole))
        return self.feeds[-1]


class FakeRouter(fleet_pb2_grpc.FleetServiceServicer):
    """Records what members say."""

    def __init__(self) -> None:
        self.heartbeat_s = 0.02
        self.announced: list[WorkerInfo] = []
        self.beats: list[fleet_pb2.JoinRequest.Heartbeat] = []
        self.left = 0
        self.mute = False
        self.dismiss = asyncio.Event()
        self.fails = False
        """Instead of ending memberships in peace."""

    async def Join(  # noqa: N802
        self, requests: AsyncIterator[fleet_pb2.JoinRequest], _context: object
    ) -> AsyncIterator[fleet_pb2.JoinResponse]:
        try:
            first = await anext(requests)
            self.announced.append(worker_info_from_proto(first.announce.info))
            if self.mute:
                await asyncio.Event().wait()
            yield fleet_pb2.JoinResponse(
                joined=fleet_pb2.JoinResponse.Joined(
                    heartbeat_seconds=self.heartbeat_s, lease_seconds=2
                )
            )
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read(requests))
                await self.dismiss.wait()
                reading.cancel()
                if self.fails:
                    raise UnavailableError("gone")
        finally:
            self.left += 1

    async def _read(self, requests: AsyncIterator[fleet_pb2.JoinRequest]) -> None:
        async for request in requests:
            if request.HasField("announce"):
                self.announced.append(worker_info_from_proto(request.announce.info))
            else:
                self.beats.append(request.heartbeat)


@asynccontextmanager
async def routed(
    router: FakeRouter, port: int = 0, host: str = "127.0.0.1"
) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(RouterSettings(host=host, port=port), ["baton.v1.FleetService"])
    server.register(lambda s: fleet_pb2_grpc.add_FleetServiceServicer_to_server(router, s))
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def member(
    reporter: FakeReporter, *ports: int, found_at: str = ""
) -> AsyncIterator[FleetAgent]:
    """`found_at` is the name of all routers."""
    targets = (found_at,) if found_at else tuple(f"127.0.0.1:{port}" for port in ports)
    settings = WorkerSettings(
        routers=targets, discover_routers=bool(found_at), rejoin_backoff_s=0.02
    )
    agent = FleetAgent(INFO, reporter, settings)
    agent.start()
    try:
        yield agent
    finally:
        await agent.stop()
        assert all(feed.closed for feed in reporter.feeds)


async def until(condition: object, what: str) -> None:
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a test looks from outside
            await asyncio.sleep(0.005)
    assert condition(), what


async def test_a_member_announces_itself_then_reports_load_and_prefixes() -> None:
    router, reporter = FakeRouter(), FakeReporter()
    async with routed(router) as server, member(reporter, server.port) as agent:
        await until(lambda: len(router.beats) >= 3, "heartbeats arrive")
        assert router.announced == [INFO]
        assert agent.num_joined == 1
        first, second, *_ = router.beats
        assert load_from_proto(first.load) == reporter.load
        assert prefix_delta_from_proto(first.prefix) == reporter.whole
        assert prefix_delta_from_proto(second.prefix) == PrefixDelta()
        reporter.load = WorkerLoad(free_blocks=4)
        reporter.feeds[0].next = PrefixDelta(evicted=(BlockHash(1),))
        await until(lambda: router.beats[-1].load.free_blocks == 4, "the new load arrives")
        assert any(list(beat.prefix.evicted) == [1] for beat in router.beats)


async def test_draining_is_told_at_once_not_with_the_next_heartbeat() -> None:
    router = FakeRouter()
    router.heartbeat_s = 60
    async with routed(router) as server, member(FakeReporter(), server.port) as agent:
        await until(lambda: router.beats, "the first heartbeat arrives")
        assert not router.beats[-1].draining
        agent.set_standing(draining=True)
        async with asyncio.timeout(1):
            await agent.told(1)
        await until(lambda: router.beats[-1].draining, "the router knows")


async def test_a_new_role_is_told_at_once_and_on_the_stream_that_is_there() -> None:
    """Promise: a member whose role changes stays a member; a router that comes later learns the new role only."""
    router, reporter, late = FakeRouter(), FakeReporter(), FakeRouter()
    router.heartbeat_s = 60
    turned = replace(INFO, role=Role.PREFILL)
    async with routed(router) as server, member(reporter, server.port) as agent:
        await until(lambda: router.beats, "joined")
        agent.announce(turned)
        await agent.told(1)
        await until(lambda: router.announced == [INFO, turned], "the router knows")
        assert router.left == 0
        assert len(reporter.feeds) == 1
        port = server.port
        await server.stop(0)
        async with routed(late, port):
            await until(lambda: late.announced == [turned], "joined anew")


async def test_every_router_is_joined_and_one_that_is_away_costs_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = FakeRouter(), FakeRouter()
    with caplog.at_level(logging.INFO, "baton.service.membership"):
        async with (
            routed(one) as first,
            routed(two) as second,
            member(FakeReporter(), first.port, second.port, 1) as agent,
        ):
            await until(lambda: agent.num_joined == 2, "both count the member")
            await asyncio.sleep(0.3)
    away = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len([line for line in away if "127.0.0.1:1:" in line]) == 1


async def test_a_router_that_comes_back_gets_the_whole_cache_again() -> None:
    router, again, reporter = FakeRouter(), FakeRouter(), FakeReporter()
    async with routed(router) as server:
        port = server.port
        async with member(reporter, port) as agent:
            await until(lambda: router.beats, "joined")
            await server.stop(0)
            await until(lambda: agent.num_joined == 0, "the loss is noticed")
            async with routed(again, port):
                await until(lambda: again.beats, "joined anew")
                assert again.announced == [INFO]
                assert prefix_delta_from_proto(again.beats[0].prefix) == reporter.whole


async def test_a_router_that_ends_the_membership_is_joined_anew() -> None:
    router = FakeRouter()
    async with routed(router) as server, member(FakeReporter(), server.port):
        await until(lambda: router.beats, "joined")
        router.dismiss.set()
        await until(lambda: len(router.announced) > 1, "joined anew")


def connections_to(port: int) -> int:
    """How many this process has open."""
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


async def test_a_membership_that_broke_leaves_no_connection_open() -> None:
    """Promise: even if the garbage collector never comes by."""
    router = FakeRouter()
    router.fails = True
    async with routed(router) as server, member(FakeReporter(), server.port) as agent:
        gc.disable()
        try:
            for number in range(1, 4):
                await until(lambda number=number: len(router.announced) == number, "it joins")
                await until(lambda: agent.num_joined == 1, "and knows it")
                router.dismiss.set()
                await until(lambda: agent.num_joined == 0, "it is thrown out")
                router.dismiss.clear()
            await until(lambda: agent.num_joined == 1, "it joins")
            await until(lambda: connections_to(server.port) == 1, "one connection is open")
        finally:
            gc.enable()


async def test_a_router_that_never_answers_does_not_hold_the_worker_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hung router costs a bounded wait, then another try."""
    monkeypatch.setattr("baton.service.membership.JOIN_TIMEOUT_S", 0.1)
    router = FakeRouter()
    router.mute = True
    async with routed(router) as server, member(FakeReporter(), server.port) as agent:
        await until(lambda: len(router.announced) >= 2, "it tries again")
        assert agent.num_joined == 0


async def test_leaving_ends_the_stream() -> None:
    router = FakeRouter()
    async with routed(router) as server:
        async with member(FakeReporter(), server.port):
            await until(lambda: router.beats, "joined")
        await until(lambda: router.left == 1, "the router sees it go")


async def test_a_huge_prefix_cache_is_told_in_several_messages() -> None:
    reporter, router = FakeReporter(), FakeRouter()
    hashes = tuple(BlockHash(i) for i in range(2 * MAX_HASHES + 5))
    reporter.whole = replace(reporter.whole, stored=hashes)
    async with routed(router) as server, member(reporter, server.port):
        await until(lambda: sum(len(b.prefix.stored) for b in router.beats) == len(hashes), "all")
        assert [len(b.prefix.stored) for b in router.beats[:3]] == [MAX_HASHES, MAX_HASHES, 5]


class FakeNames:
    """Addresses of the name `routers`; none of them is no such name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
        self.hosts = list(hosts)
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)
        monkeypatch.setattr("baton.service.membership.DISCOVER_S", 0.02)

    def _look_up(self, host: str, port: str, *_: object) -> list[tuple[object, ...]]:
        assert host == "routers"
        if not self.hosts:
            raise socket.gaierror("no such name")
        both = [(socket.AF_INET, each) for each in self.hosts] + [(socket.AF_INET6, "::1")]
        return [(family, 1, 6, "", (each, int(port))) for family, each in both]


async def test_every_address_of_a_name_is_joined_as_a_router_and_those_that_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise: behind a name that stands for all routers, none of them lacks a worker."""
    one, two = FakeRouter(), FakeRouter()
    names = FakeNames(monkeypatch, "127.0.0.2")
    async with routed(one, host="127.0.0.2") as server:
        port = server.port
        async with (
            routed(two, port, host="127.0.0.3"),
            member(FakeReporter(), found_at=f"routers:{port}") as agent,
        ):
            await until(lambda: one.beats, "the first router is joined")
            assert not two.announced
            names.hosts.append("127.0.0.3")
            await until(lambda: agent.num_joined == 2, "so is the one that came")
            assert len(one.announced) == 1


async def test_a_router_gone_from_the_name_keeps_its_workers_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a router that drains is out of DNS, and still serves; a failing DNS takes nobody away."""
    one, two = FakeRouter(), FakeRouter()
    names = FakeNames(monkeypatch, "127.0.0.2", "127.0.0.3")
    async with routed(one, host="127.0.0.2") as server:
        port = server.port
        async with (
            routed(two, port, host="127.0.0.3"),
            member(FakeReporter(), found_at=f"routers:{port}") as agent,
        ):
            await until(lambda: agent.num_joined == 2, "both are joined")
            names.hosts.clear()
            await until(lambda: "cannot be looked up" in caplog.text, "the name is gone")
            assert agent.num_joined == 2
            names.hosts.append("127.0.0.3")
            beats = len(one.beats)
            await until(lambda: len(one.beats) > beats + 5, "it still hears of the worker")
            await server.stop(0)
            await until(lambda: agent.num_routers == 1, "it is given up once it has ended")
            assert agent.num_joined == 1
    assert caplog.text.count("cannot be looked up") == 1


async def test_a_name_that_can_be_none_is_told_and_looked_up_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Promise: a worker whose setting has a slip says so, and does not stay alone in silence."""
    async with member(FakeReporter(), found_at="routers..example:50051") as agent:
        await until(lambda: "cannot be looked up" in caplog.text, "it is told")
        assert agent._discovering is not None
        assert not agent._discovering.done()
