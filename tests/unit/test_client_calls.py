"""The sync and the async client against a router that a script plays."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from baton.client import AsyncClient, ChatMessage, Client, SamplingOptions
from baton.client.sync import Stream
from baton.errors import (
    CancelledError,
    CapacityError,
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from baton.service.status import to_status
from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

Context = grpc.ServicerContext


@dataclass
class ScriptedRouter(InferenceServiceServicer):
    """Answers by what the prompt's text says."""

    begun: threading.Event = field(default_factory=threading.Event)
    """Set when a call has come."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when a call is over, by whomever."""
    cancelled: dict[str, threading.Event] = field(default_factory=dict)
    seen: list[pb.GenerateRequest] = field(default_factory=list)
    refuses: UnavailableError | None = None
    """What every call but Generate gets."""
    refusals: int = 9
    """So often; the calls after these are answered."""
    asked: int = 0

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> Iterator[pb.GenerateResponse]:
        self.seen.append(request)
        context.add_callback(self.ended.set)
        self.begun.set()
        self.cancelled[request.request_id] = threading.Event()
        yield pb.GenerateResponse(
            accepted=pb.Accepted(request_id=request.request_id, model="m", prompt_tokens=1, seed=9)
        )
        yield _chunk("Hello", 0, 1)
        if request.text == "full":
            status = rpc_status.to_status(to_status(CapacityError("busy", retry_after_s=2.5)))
            context.abort_with_status(status)
        if request.text == "wait":
            for _ in range(1000):
                if self.ended.wait(0.01):
                    return
                if self.cancelled[request.request_id].is_set():
                    status = rpc_status.to_status(to_status(CancelledError("by id")))
                    context.abort_with_status(status)
        yield _chunk(" world", 1, 2, 3)
        if request.text != "truncated":
            yield pb.GenerateResponse(
                finished=pb.Finished(choices=[pb.ChoiceEnd(reason=common_pb2.FINISH_REASON_LENGTH)])
            )

    def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        self._ask(context)
        if request.request_id not in self.cancelled:
            error = NotFoundError("request", request.request_id)
            context.abort_with_status(rpc_status.to_status(to_status(error)))
        self.cancelled[request.request_id].set()
        return pb.CancelResponse()

    def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        self._ask(context)
        if request.model:
            error = NotFoundError("model", request.model)
            context.abort_with_status(rpc_status.to_status(to_status(error)))
        return pb.GetModelResponse(model="m", max_context_tokens=64, eos_token_ids=[2])

    def _ask(self, context: Context) -> None:
        self.asked += 1
        if self.refuses is not None and self.refusals:
            self.refusals -= 1
            context.abort_with_status(rpc_status.to_status(to_status(self.refuses)))


def _chunk(text: str, first: int, *ids: int) -> pb.GenerateResponse:
    tokens = common_pb2.TokenChunk(first_index=first, token_ids=ids)
    return pb.GenerateResponse(chunk=pb.Chunk(text=text, tokens=tokens))


@contextmanager
def serve(router: ScriptedRouter) -> Iterator[str]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        server = grpc.server(pool)
        add_InferenceServiceServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


@pytest.fixture
def router() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def address(router: ScriptedRouter) -> Iterator[str]:
    with serve(router) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture
async def async_client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


def test_a_stream_yields_chunks_then_knows_its_result(client: Client) -> None:
    with client.generate("hi") as stream:
        with pytest.raises(RuntimeError, match="read to its end"):
            _ = stream.result
        texts = [chunk.text for chunk in stream]
    assert texts == ["Hello", " world"]
    assert (stream.result.text, stream.result.token_ids) == ("Hello world", (1, 2, 3))
    assert stream.result.seed == stream.seed == 9


async def test_an_async_stream_yields_chunks_then_knows_its_result(
    async_client: AsyncClient,
) -> None:
    async with async_client.generate("hi") as stream:
        texts = [chunk.text async for chunk in stream]
    assert texts == ["Hello", " world"]
    assert stream.result.token_ids == (1, 2, 3)


def test_complete_sends_what_it_was_given(client: Client, router: ScriptedRouter) -> None:
    prompt = [ChatMessage("user", "hi")]
    result = client.complete(
        prompt, sampling=SamplingOptions(seed=3), request_id="mine", model="m", timeout_s=10
    )
    assert result.request_id == "mine"
    (seen,) = router.seen
    assert (seen.model, seen.sampling.seed, seen.chat.messages[0].content) == ("m", 3, "hi")


def test_each_request_gets_its_own_id(client: Client) -> None:
    assert client.complete("a").request_id != client.complete("a").request_id


def test_leaving_a_stream_early_cancels_the_call(client: Client, router: ScriptedRouter) -> None:
    """Promise: nobody generates for a client that has left."""
    with client.generate("wait") as stream:
        assert next(iter(stream)).text == "Hello"
    assert router.ended.wait(5)


async def test_leaving_an_async_stream_early_cancels_the_call(
    async_client: AsyncClient, router: ScriptedRouter
) -> None:
    """Promise: nobody generates for a client that has left."""
    async with async_client.generate("wait") as stream:
        async for _ in stream:
            break
    assert await asyncio.to_thread(router.ended.wait, 5)


async def test_cancelling_the_reading_task_cancels_the_call(
    async_client: AsyncClient, router: ScriptedRouter
) -> None:
    """Promise: nobody generates for a task that was cancelled, and the task ends as cancelled tasks do."""
    task = asyncio.create_task(async_client.complete("wait"))
    assert await asyncio.to_thread(router.begun.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(router.ended.wait, 5)


def test_an_error_in_mid_stream_arrives_typed_with_its_details(client: Client) -> None:
    with (
        client.generate("full") as stream,
        pytest.raises(CapacityError, match="busy") as caught,
    ):
        stream.read()
    assert caught.value.retry_after_s == 2.5


async def test_an_error_in_mid_stream_arrives_typed_in_async_too(
    async_client: AsyncClient,
) -> None:
    with pytest.raises(CapacityError) as caught:
        await async_client.complete("full")
    assert caught.value.retry_after_s == 2.5


def test_cancel_by_id_ends_the_stream_with_a_typed_error(client: Client) -> None:
    with client.generate("wait") as stream:
        chunks = iter(stream)
        next(chunks)
        client.cancel(stream.request_id)
        with pytest.raises(CancelledError):
            next(chunks)


async def test_cancel_by_id_is_no_task_cancellation(async_client: AsyncClient) -> None:
    """Promise: a request cancelled by someone else never looks like the cancellation of the caller's own task."""
    async with async_client.generate("wait") as stream:
        chunks = aiter(stream)
        await anext(chunks)
        await async_client.cancel(stream.request_id)
        with pytest.raises(CancelledError):
            await anext(chunks)


@pytest.mark.parametrize("what", ["stream", "client"])
async def test_closing_is_no_task_cancellation(
    async_client: AsyncClient, router: ScriptedRouter, what: str
) -> None:
    """Promise: nor does a stream, or a client, that another task closes: whoever reads gets Baton's error."""
    stream = async_client.generate("wait")
    reading = asyncio.create_task(stream.read())
    assert await asyncio.to_thread(router.begun.wait, 5)
    if what == "stream":
        stream.close()
    else:
        await async_client.close()
    with pytest.raises(CancelledError):
        await asyncio.wait_for(reading, 5)


@pytest.mark.parametrize("what", ["stream", "client"])
def test_closing_from_another_thread_ends_the_stream(
    client: Client, router: ScriptedRouter, what: str
) -> None:
    """Promise: whoever reads is told at once that this end closed it, and it is asked for nowhere else."""
    stream = client.generate("wait")
    chunks = iter(stream)
    next(chunks)
    closing = threading.Timer(0.1, stream.close if what == "stream" else client.close)
    closing.start()
    with pytest.raises(CancelledError):
        next(chunks)
    closing.join()
    assert len(router.seen) == 1


@pytest.mark.parametrize("what", ["stream", "client"])
def test_closing_while_a_stream_is_asked_for_anew_ends_it(
    address: str, router: ScriptedRouter, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: as above, at any instant of a recovery: the call that another thread does not know of yet is not left behind."""
    lost, clients = ScriptedRouter(), list[Client]()
    start = Stream._start

    def close_first(stream: Stream, message: Any) -> Any:
        if lost.seen:
            (stream if what == "stream" else clients[0]).close()
        return start(stream, message)

    monkeypatch.setattr(Stream, "_start", close_first)
    with ExitStack() as running:
        first = running.enter_context(serve(lost))
        with Client(f"{first},{address}") as client:
            clients.append(client)
            chunks = iter(client.generate("wait"))
            next(chunks)
            running.close()
            with pytest.raises(CancelledError):
                next(chunks)
            assert not router.seen or router.ended.wait(5)


@pytest.mark.parametrize("client_kind", [Client, AsyncClient])
async def test_a_request_is_cancelled_at_whichever_router_has_it(
    address: str, client_kind: type[Client | AsyncClient]
) -> None:
    """Promise: not found is what no router has, not what the one in use has not."""
    with serve(ScriptedRouter()) as other, Client(address) as theirs:
        chunks = iter(theirs.generate("wait", request_id="r"))
        next(chunks)
        client = client_kind(f"{other},{address}")
        for ending in (client.cancel("r"), client.close()):
            if ending is not None:
                await ending
        with pytest.raises(CancelledError):
            next(chunks)


def test_cancelling_an_unknown_request_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.cancel("nobody")
    assert caught.value.name == "nobody"


async def test_cancelling_an_unknown_request_is_not_found_in_async_too(
    async_client: AsyncClient,
) -> None:
    with pytest.raises(NotFoundError):
        await async_client.cancel("nobody")


def test_the_timeout_bounds_the_whole_request(client: Client) -> None:
    """Promise: a caller with a timeout never waits longer."""
    with pytest.raises(DeadlineError):
        client.complete("wait", timeout_s=0.3)


async def test_the_timeout_bounds_the_whole_async_request(async_client: AsyncClient) -> None:
    """Promise: a caller with a timeout never waits longer."""
    with pytest.raises(DeadlineError):
        await async_client.complete("wait", timeout_s=0.3)


def test_a_bad_prompt_is_refused_before_any_call(client: Client, router: ScriptedRouter) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate([-1])
    assert router.seen == []


def test_the_model_is_described(client: Client) -> None:
    model = client.model()
    assert (model.model, model.max_context_tokens, model.eos_token_ids) == ("m", 64, (2,))
    with pytest.raises(NotFoundError) as caught:
        client.model("other")
    assert (caught.value.resource_type, caught.value.name) == ("model", "other")


async def test_the_model_is_described_in_async_too(async_client: AsyncClient) -> None:
    assert (await async_client.model()).model == "m"
    with pytest.raises(NotFoundError):
        await async_client.model("other")


def test_nobody_at_the_address_is_unavailable() -> None:
    with serve(ScriptedRouter()) as address:
        pass
    with Client(address) as client, pytest.raises(UnavailableError):
        client.complete("hi", timeout_s=10)


async def test_nobody_at_the_address_is_unavailable_in_async_too() -> None:
    with serve(ScriptedRouter()) as address:
        pass
    async with AsyncClient(address) as client:
        with pytest.raises(UnavailableError):
            await client.model(timeout_s=10)


@pytest.fixture
def gone() -> str:
    """Where nobody listens any more."""
    with serve(ScriptedRouter()) as address:
        return address


async def test_a_call_goes_on_at_the_next_router_where_one_is_lost_or_drains(
    gone: str, address: str, router: ScriptedRouter
) -> None:
    """Promise: once at each address; the one that answered is asked first from then on."""
    leaving = ScriptedRouter(refuses=DrainingError("about to stop"))
    with serve(leaving) as draining:
        addresses = f"{gone},{draining},{address}"
        with Client(addresses) as client:
            for _ in range(3):
                assert client.model().model == "m"
            with pytest.raises(NotFoundError):
                client.cancel("r")
        assert (leaving.asked, router.asked) == (2, 4)
        async with AsyncClient(addresses) as async_client:
            for _ in range(3):
                assert (await async_client.model()).model == "m"
            with pytest.raises(NotFoundError):
                await async_client.cancel("r")
        assert (leaving.asked, router.asked) == (4, 8)
        with Client(f"{draining},{gone}") as client, pytest.raises(UnavailableError):
            client.model()
        assert leaving.asked == 5


@pytest.mark.parametrize("moves", [False, True])
async def test_a_lone_router_is_asked_twice(moves: bool) -> None:  # noqa: FBT001 - a case
    """Promise: where one of those behind a name stops, the next one answers; and where all of them do, the caller hears that."""
    leaving = ScriptedRouter(refuses=DrainingError("about to stop"), refusals=1 if moves else 9)
    with serve(leaving) as address, Client(address) as client:
        with nullcontext() if moves else pytest.raises(DrainingError):
            client.model()
        assert leaving.asked == 2
        leaving.refusals = 1 if moves else 9
        async with AsyncClient(address) as async_client:
            with nullcontext() if moves else pytest.raises(DrainingError):
                await async_client.model()
        assert leaving.asked == 4


def test_what_a_router_says_is_unavailable_is_asked_for_nowhere_else(
    address: str, router: ScriptedRouter
) -> None:
    storeless = ScriptedRouter(refuses=UnavailableError("no store"))
    with (
        serve(storeless) as first,
        Client(f"{first},{address}") as client,
        pytest.raises(UnavailableError, match="no store"),
    ):
        client.model()
    assert router.asked == 0


def test_importing_the_client_needs_neither_torch_nor_ray() -> None:
    """Promise: the client runs from the base install."""
    code = "import sys, baton.client; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
