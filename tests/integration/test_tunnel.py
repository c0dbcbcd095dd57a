"""Calls in a tunnel are to both of its ends what gRPC calls are: a real server and channel, handlers of every kind."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.errors import FieldViolation, InvalidRequestError, NotFoundError, UnavailableError
from baton.service.calls import Context
from baton.service.channel import open_channel
from baton.service.server import GrpcServer
from baton.service.settings import RouterSettings, ServerSettings
from baton.service.tunnel import MAX_REST_S, WAITING_BYTES, Method, Outbox, TunnelServicer, pace_of
from baton.v1 import common_pb2, tunnel_pb2, tunnel_pb2_grpc
from router.streams import Broken, Follower
from router.tunnel import MESSAGE_BYTES, Tunnel, TunnelledCall

Handler = Callable[[common_pb2.TokenIds, Context], Any]
METHOD = "/test/Stream"


def tokens(*ids: int) -> common_pb2.TokenIds:
    return common_pb2.TokenIds(ids=ids)


class Far:
    """A worker's end with one method, and a router's."""

    def __init__(self, server: GrpcServer, servicer: TunnelServicer, tunnel: Tunnel) -> None:
        self.server = server
        self.servicer = servicer
        self.tunnel = tunnel

    def start(self, *ids: int, method: str = METHOD) -> TunnelledCall:
        call = self.tunnel.start(method, tokens(*ids), common_pb2.TokenIds.FromString, 5.0)
        assert call is not None
        return call

    async def answer(self, *ids: int, method: str = METHOD) -> tuple[list[list[int]], Broken]:
        got: list[list[int]] = []
        call = self.start(*ids, method=method)
        return got, await end_of(call, lambda response: got.append(list(response.ids)))


async def end_of(call: TunnelledCall, handle: Callable[[Any], None]) -> Broken:
    """Follows a call to its end. Raises what `handle` does, where that is a bug."""
    ended: asyncio.Future[Broken] = asyncio.get_running_loop().create_future()
    call.follow(Follower(handle, ended.set_result, ended.set_exception))
    try:
        return await ended
    finally:
        call.cancel()


@asynccontextmanager
async def far(handle: Handler, rest_s: Callable[[], float] = lambda: 0.0) -> AsyncIterator[Far]:
    """Inside, the tunnel is open."""
    server = GrpcServer(ServerSettings(reflection=False), [])
    servicer = TunnelServicer({METHOD: Method(common_pb2.TokenIds.FromString, handle)})
    server.register(lambda s: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(servicer, s))
    port = await server.start()
    channel = open_channel(f"127.0.0.1:{port}", RouterSettings())
    tunnel = Tunnel(channel, rest_s)
    try:
        async with asyncio.timeout(10):
            tunnel.open()
            while not tunnel.is_open:  # noqa: ASYNC110 - the tunnel has no event for it
                await asyncio.sleep(0.005)
            yield Far(server, servicer, tunnel)
    finally:
        await tunnel.close()
        await channel.close(None)
        await server.stop(0)


async def echo(request: common_pb2.TokenIds, context: Context) -> None:
    for token_id in request.ids:
        await context.write(tokens(token_id))
        await asyncio.sleep(0)


async def test_many_calls_at_once_each_get_their_own_responses_in_order() -> None:
    async with far(echo) as here:
        answers = await asyncio.gather(*(here.answer(*range(n, n + 20)) for n in range(100)))
    for n, (got, broken) in enumerate(answers):
        assert got == [[token_id] for token_id in range(n, n + 20)]
        assert broken.from_worker


async def test_an_error_keeps_its_class_and_fields() -> None:
    async def fail(request: common_pb2.TokenIds, context: Context) -> None:
        await context.write(request)
        raise NotFoundError("attempt", "a#1")

    async with far(fail) as here:
        got, broken = await here.answer(7)
    assert got == [[7]], "what was said before the error arrives"
    assert broken.from_worker
    assert isinstance(broken.error, NotFoundError)
    assert (broken.error.resource_type, broken.error.name) == ("attempt", "a#1")


async def test_an_unknown_method_ends_its_call_alone() -> None:
    async with far(echo) as here:
        (_, broken), (got, _) = await asyncio.gather(
            here.answer(1, method="/test/Other"), here.answer(2)
        )
    assert isinstance(broken.error, InvalidRequestError)
    assert got == [[2]]


async def test_an_error_of_the_reader_ends_the_call_and_frees_the_handler() -> None:
    over = asyncio.Event()

    async def forever(request: common_pb2.TokenIds, context: Context) -> None:
        try:
            while True:
                await context.write(request)
                await asyncio.sleep(0.01)
        finally:
            over.set()

    def refuse(_response: object) -> None:
        raise InvalidRequestError(FieldViolation("response", "not expected"))

    async with far(forever) as here:
        broken = await end_of(here.start(1), refuse)
        assert isinstance(broken.error, InvalidRequestError)
        await over.wait()


async def test_a_bug_of_the_reader_is_its_own() -> None:
    """It neither ends the call as if the worker had failed, nor the tunnel."""

    def err(_response: object) -> None:
        raise ZeroDivisionError

    async with far(echo) as here:
        with pytest.raises(ZeroDivisionError):
            await end_of(here.start(1), err)
        assert (await here.answer(2))[0] == [[2]]


async def test_a_cancelled_call_frees_its_handler_and_no_other_call() -> None:
    over: dict[int, asyncio.Event] = {1: asyncio.Event(), 2: asyncio.Event()}
    go_on = asyncio.Event()

    async def wait(request: common_pb2.TokenIds, context: Context) -> None:
        try:
            await context.write(request)
            await go_on.wait()
            await context.write(request)
        finally:
            over[request.ids[0]].set()

    async with far(wait) as here:
        seen, told = asyncio.Event(), list[object]()
        first = here.start(1)
        first.follow(Follower(lambda _: seen.set(), told.append, told.append))
        second = asyncio.create_task(here.answer(2))
        await seen.wait()
        first.cancel()
        await over[1].wait()
        assert not told
        assert not over[2].is_set()
        go_on.set()
        got, _ = await second
    assert got == [[2], [2]]


@pytest.mark.parametrize("who", ["worker", "router"])
async def test_a_tunnel_that_breaks_ends_its_calls_on_both_sides(who: str) -> None:
    """What a call holds on the worker is given back, and the router learns that the connection broke, not the work."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def wait(request: common_pb2.TokenIds, context: Context) -> None:
        begun.set()
        try:
            await context.write(request)
            await asyncio.Event().wait()
        finally:
            over.set()

    async with far(wait) as here:
        reading = asyncio.create_task(here.answer(1))
        await begun.wait()
        await (here.server.stop(0) if who == "worker" else here.tunnel.close())
        _, broken = await reading
        await over.wait()
        assert not broken.from_worker
        assert isinstance(broken.error, UnavailableError)
        assert here.tunnel.start(METHOD, tokens(1), tokens().FromString, 1.0) is None


async def test_a_writer_waits_while_nobody_reads() -> None:
    """A router that is stopped costs a worker a bounded amount of memory, however much there is to say."""
    written = 0
    waits = asyncio.Event()
    release = asyncio.Event()
    size = 64 * 1024

    async def flood(_request: common_pb2.TokenIds, context: Context) -> None:
        nonlocal written
        while written < 200:
            writing = asyncio.ensure_future(context.write(tokens(*[2**31] * (size // 5))))
            done, _ = await asyncio.wait({writing}, timeout=1.0)
            if not done:
                waits.set()
                await release.wait()
            await writing
            written += 1

    server = GrpcServer(ServerSettings(reflection=False), [])
    servicer = TunnelServicer({METHOD: Method(common_pb2.TokenIds.FromString, flood)})
    server.register(lambda s: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(servicer, s))
    port = await server.start()
    try:
        async with (
            asyncio.timeout(30),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            stream = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
            await stream.read()
            start = tunnel_pb2.OpenRequest.Start(call=1, method=METHOD, timeout_seconds=30)
            await stream.write(tunnel_pb2.OpenRequest(starts=[start]))
            await waits.wait()
            assert written * size < 8 * WAITING_BYTES
            release.set()
            count = 0
            while count < 200:
                response = await stream.read()
                count += len(response.messages)
            stream.cancel()
    finally:
        await server.stop(0)


async def test_a_tunnel_that_finishes_was_read_to_its_end() -> None:
    """Promise: a worker that leaves takes no last word with it, however its calls' end and its own leaving race."""
    ended = asyncio.Event()

    async def say(request: common_pb2.TokenIds, context: Context) -> None:
        await echo(request, context)
        ended.set()

    got: list[int] = []
    async with far(say) as here:
        call = here.start(*range(50))
        ending = asyncio.create_task(end_of(call, lambda response: got.extend(response.ids)))
        await ended.wait()
        await here.servicer.finish(10)
        assert got == list(range(50))
        assert (await ending).from_worker
        assert not here.tunnel.is_open


@pytest.mark.parametrize("steps", range(12))
async def test_an_end_that_comes_while_the_last_message_is_sent_is_sent_too(steps: int) -> None:
    """Promise: as above, with the end and the leaving at each step of the event loop around the message before."""
    sent: list[tunnel_pb2.OpenResponse] = []

    async def write(response: tunnel_pb2.OpenResponse) -> None:
        for _ in range(4):
            await asyncio.sleep(0)
        sent.append(response)

    outbox = Outbox()
    sending = asyncio.create_task(outbox.send(write))
    outbox.put(1, b"a response")
    for _ in range(steps):
        await asyncio.sleep(0)
    outbox.end(1, b"")
    outbox.finish()
    await sending
    assert [m.call for r in sent for m in r.messages] == [1]
    assert [e.call for r in sent for e in r.ends] == [1]
    assert [r.last for r in sent] == [False] * (len(sent) - 1) + [True]


async def test_a_router_that_does_not_read_holds_no_worker_back() -> None:
    server = GrpcServer(ServerSettings(reflection=False), [])
    servicer = TunnelServicer({})
    server.register(lambda s: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(servicer, s))
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
            await stream.read()
            async with asyncio.timeout(10):
                await servicer.finish(0.05)
            stream.cancel()
    finally:
        await server.stop(0)


async def test_a_large_request_travels_by_itself() -> None:
    async with far(echo) as here:
        large = tokens(*[2**31] * (MESSAGE_BYTES // 5 + 1))
        assert here.tunnel.start(METHOD, large, common_pb2.TokenIds.FromString, 1.0) is None


async def test_a_worker_without_tunnels_is_asked_once() -> None:
    server = GrpcServer(ServerSettings(reflection=False), [])
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", RouterSettings()) as channel:
        tunnel = Tunnel(channel)
        parse = common_pb2.TokenIds.FromString
        assert tunnel.start(METHOD, tokens(1), parse, 1.0) is None
        async with asyncio.timeout(5):
            while not tunnel.unserved:  # noqa: ASYNC110 - nor for this
                await asyncio.sleep(0.005)
        assert tunnel.start(METHOD, tokens(1), parse, 1.0) is None
        await tunnel.close()
    await server.stop(0)


async def test_a_worker_learns_how_long_tokens_may_wait() -> None:
    """Promise: of what matters only, never more than the worker bears, and nothing of a router that has gone."""
    rest_s, paces = [0.0], []

    async def talk(request: common_pb2.TokenIds, context: Context) -> None:
        paces.append(pace_of(context))
        while True:
            await context.write(request)
            await asyncio.sleep(0.005)

    async def until(expected_s: float) -> None:
        async with asyncio.timeout(5):
            while pace is not None and pace.rest_s != expected_s:  # noqa: ASYNC110 - paces have no event for it
                await asyncio.sleep(0.005)

    async with far(talk, lambda: rest_s[0]) as here:
        call = here.start(1)
        call.follow(Follower(lambda _: None, lambda _: None, lambda _: None))
        async with asyncio.timeout(5):
            while not paces:  # noqa: ASYNC110 - nor has the handler
                await asyncio.sleep(0.005)
        pace = paces[0]
        assert pace is not None
        for told_s, known_s in (
            (0.05, 0.05),
            (0.055, 0.05),
            (0.02, 0.02),
            (3.0, MAX_REST_S),
        ):
            rest_s[0] = told_s
            await until(known_s)
            await asyncio.sleep(0.03)
            assert pace.rest_s == known_s
        rest_s[0] = 0.0
        await until(0.0)
        rest_s[0] = 0.05
        await until(0.05)
    assert pace is not None
    assert pace.rest_s == 0.0
    assert pace_of(object()) is None
