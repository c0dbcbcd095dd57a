"""However a request ends, it ends soon, with the right status, harming no other, and nothing of it is left anywhere."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from baton.errors import (
    AlreadyExistsError,
    CancelledError,
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from baton.service.status import error_from_rpc
from baton.types import Role
from baton.v1 import inference_pb2
from tests.integration.router_fakes import PROMPT, Answer, Cluster, cluster, expected, request
from tests.worker_rig import error_of

STAGES = [
    (Role.DECODE, "arrived"),
    (Role.DECODE, "reserved"),
    (Role.PREFILL, "arrived"),
    (Role.PREFILL, "token"),
    (Role.DECODE, "kv"),
    (Role.DECODE, "token:4"),
    (Role.DECODE, "finish"),
]
NAMES = ["reserve", "handoff", "prefill", "prefill", "handoff", "decode", "decode"]


async def hanging(here: Cluster, role: Role, stage: str) -> asyncio.Event:
    """One worker of each role; that of `role` hangs at the stage. Set once it does."""
    hangs = asyncio.Event()

    async def script(reached: str) -> None:
        if reached == stage:
            hangs.set()
            await asyncio.Event().wait()

    prefill, decode = await here.prefill("p"), await here.decode("d")
    (prefill if role is Role.PREFILL else decode).script = script
    return hangs


@pytest.mark.parametrize(("role", "stage"), STAGES)
async def test_a_cancelled_request_ends_with_cancelled_in_any_stage(role: Role, stage: str) -> None:
    async with cluster() as here:
        hangs = await hanging(here, role, stage)
        running = asyncio.create_task(here.generate(request_id="r"))
        await hangs.wait()
        await here.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=5)
        with pytest.raises(CancelledError):
            await running
        await here.settled()


@pytest.mark.parametrize("name", ["", "no id", "x" * 1_000_000], ids=["none", "bad", "long"])
async def test_nobody_is_asked_for_what_can_be_no_request(name: str) -> None:
    """Promise: it is not found at once; no worker is sent what a client makes up, nor waited for."""
    async with cluster(worker_wait_s=30.0) as here:
        await here.prefill("p")
        await here.decode("d")
        attach = inference_pb2.AttachRequest(request_id=name)
        assert isinstance(await error_of(here.inference.Attach(attach, timeout=5)), NotFoundError)


@pytest.mark.parametrize(("role", "stage"), STAGES)
async def test_a_client_that_goes_away_in_any_stage_leaves_nothing_behind(
    role: Role, stage: str
) -> None:
    async with cluster() as here:
        hangs = await hanging(here, role, stage)
        call = here.call(None)
        await hangs.wait()
        call.cancel()
        await here.settled()


@pytest.mark.parametrize(("stages", "name"), list(zip(STAGES, NAMES, strict=True)))
async def test_a_deadline_ends_the_request_and_names_the_stage(
    stages: tuple[Role, str], name: str
) -> None:
    async with cluster(default_timeout_s=0.4) as here:
        await hanging(here, *stages)
        began_s = time.monotonic()
        with pytest.raises(DeadlineError) as passed:
            # Without a deadline of its own, the client hears what the router says.
            await here.generate(None)
        assert passed.value.stage == name
        assert time.monotonic() - began_s < 2
        await here.settled()


async def test_the_clients_deadline_reaches_the_workers() -> None:
    async with cluster() as here:
        await hanging(here, Role.DECODE, "token:4")
        with pytest.raises(DeadlineError):
            await here.generate(0.4)
        await here.settled()


async def test_cancelling_an_unknown_request_is_not_found() -> None:
    async with cluster() as here:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await here.inference.Cancel(inference_pb2.CancelRequest(request_id="r"), timeout=5)
        assert isinstance(error_from_rpc(refused.value), NotFoundError)


async def test_a_second_request_of_the_same_id_is_refused_while_the_first_runs() -> None:
    async with cluster() as here:
        hangs = await hanging(here, Role.DECODE, "token:4")
        first = here.call(request_id="r")
        await hangs.wait()
        with pytest.raises(AlreadyExistsError):
            await here.generate(request_id="r")
        first.cancel()
        await here.settled()
        here.workers[1].script = here.workers[0].script
        assert (await here.generate(request_id="r")).tokens == expected(PROMPT, 10)


async def test_requests_wait_for_their_turn_and_too_many_are_refused() -> None:
    async with cluster(max_running=1, max_queued=1) as here:
        hangs = await hanging(here, Role.DECODE, "token:4")
        first = here.call(request_id="first")
        await hangs.wait()
        second = asyncio.create_task(here.generate())
        await here.until(lambda: len(here.app.table) == 2)
        with pytest.raises(CapacityError):
            await here.generate()
        here.workers[1].script = here.workers[0].script
        first.cancel()
        assert (await second).tokens == expected(PROMPT, 10)


async def test_a_request_cancelled_in_the_queue_never_reaches_a_worker() -> None:
    async with cluster(max_running=1) as here:
        hangs = await hanging(here, Role.DECODE, "token:4")
        first = here.call(request_id="first")
        await hangs.wait()
        second = asyncio.create_task(here.generate(request_id="second"))
        await here.until(lambda: len(here.app.table) == 2)
        await here.inference.Cancel(inference_pb2.CancelRequest(request_id="second"), timeout=5)
        with pytest.raises(CancelledError):
            await second
        first.cancel()
        await here.settled()
        assert here.workers[1].keys == ["first#0"]


async def test_a_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with cluster() as here:
        goes_on = asyncio.Event()
        await here.prefill("p")
        decode = await here.decode("d")

        async def script(stage: str) -> None:
            if stage == "token:4":
                await goes_on.wait()

        decode.script = script
        running = asyncio.create_task(here.generate())
        await here.until(lambda: decode.running == 1)
        draining = asyncio.create_task(here.app.drain(5.0))
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            await here.generate()
        assert not draining.done()
        goes_on.set()
        assert (await running).tokens == expected(PROMPT, 10)
        assert await draining


async def test_a_stop_ends_running_requests_with_unavailable() -> None:
    async with cluster() as here:
        hangs = await hanging(here, Role.DECODE, "token:4")
        running = asyncio.create_task(here.generate())
        await hangs.wait()
        assert not await here.app.drain(0.05)
        await here.app.stop()
        with pytest.raises(UnavailableError):
            await running


async def test_a_client_that_does_not_read_loses_its_request_and_harms_no_other() -> None:
    async with cluster(write_stall_s=0.4) as here:
        await here.prefill("p")
        decode = await here.decode("d")
        options = [
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1024),
            ("grpc.max_receive_message_length", -1),
        ]
        async with grpc.aio.insecure_channel(here.address, options=options) as channel:
            generate = channel.unary_stream(
                "/baton.v1.InferenceService/Generate",
                request_serializer=inference_pb2.GenerateRequest.SerializeToString,
                response_deserializer=inference_pb2.GenerateResponse.FromString,
            )
            call: Any = generate(request(max_tokens=3900, logprobs=20))
            await anext(aiter(call))
            await here.until(lambda: decode.running == 1)
            assert (await here.generate()).tokens == expected(PROMPT, 10)
            await here.until(lambda: len(here.app.table) == 0, 10)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await _read_all(call)
            assert isinstance(error_from_rpc(lost.value), CapacityError)


async def test_a_prompt_that_is_tokenized_beside_the_event_loop_is_validated_too() -> None:
    async with cluster() as here:
        await here.decode("d")
        with pytest.raises(InvalidRequestError) as refused:
            await here.generate(text="x" * 20_000)
        assert [violation.field for violation in refused.value.violations] == ["prompt.text"]


async def test_a_message_over_the_limit_gets_a_reply_and_harms_nobody() -> None:
    async with cluster(max_message_bytes=100_000) as here:
        await here.prefill("p")
        await here.decode("d")
        with pytest.raises(InvalidRequestError):
            await here.generate(text="x" * 200_000)
        assert (await here.generate()).tokens == expected(PROMPT, 10)


@pytest.mark.parametrize(
    "garbage",
    [b"\x1a\x03\xff\xfe\xfd", b"\xff\xff\xff", b"\x1a\x7f"],
    ids=["invalid UTF-8", "no protobuf", "a truncated one"],
)
async def test_bytes_that_are_no_request_get_a_reply(garbage: bytes) -> None:
    async with (
        cluster() as here,
        grpc.aio.insecure_channel(here.address) as channel,
    ):
        method = "/baton.v1.InferenceService/Generate"
        generate: Any = channel.unary_stream(method, bytes, bytes)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _read_all(generate(garbage, timeout=5))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ()}, "prompt.tokens.ids"),
        ({"prompt": (999,)}, "prompt.tokens.ids"),
        ({"prompt": (1,) * 5000}, "prompt.tokens.ids"),
        ({"top_p": 2.0}, "sampling.top_p"),
        ({"request_id": "with space"}, "request_id"),
    ],
)
async def test_an_invalid_request_is_refused_by_field_and_reaches_no_worker(
    changes: dict[str, Any], field: str
) -> None:
    async with cluster() as here:
        decode = await here.decode("d")
        with pytest.raises(InvalidRequestError) as refused:
            await here.generate(**changes)
        assert [violation.field for violation in refused.value.violations] == [field]
        assert decode.keys == []


async def test_another_model_is_not_found() -> None:
    async with cluster() as here:
        await here.decode("d")
        with pytest.raises(NotFoundError):
            await here.generate(model="other")
        assert (await here.generate(model="fake")).tokens == expected(PROMPT, 10)


async def test_three_hundred_random_cancellations_leave_nothing_behind() -> None:
    """No claimed load, no running call on any worker, no task; and requests that were left alone are unharmed."""
    rng = random.Random(7)
    async with cluster() as here:

        async def lazy(_stage: str) -> None:
            await asyncio.sleep(rng.random() * 0.01)

        for number in range(2):
            await here.prefill(f"p{number}", lazy)
            await here.decode(f"d{number}", lazy)
        endings: list[Callable[[str], Awaitable[bool]]] = [
            lambda name: _left_alone(here, name),
            lambda name: _client_leaves(here, name, rng.random() * 0.1),
            lambda name: _cancelled_by_id(here, name, rng.random() * 0.1),
            lambda name: _past_its_deadline(here, name, 0.001 + rng.random() * 0.1),
        ]
        for start in range(0, 300, 30):
            batch = [rng.choice(endings)(f"r{number}") for number in range(start, start + 30)]
            assert all(await asyncio.gather(*batch))
        await here.settled()


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass


async def _left_alone(here: Cluster, name: str) -> bool:
    return (await here.generate(request_id=name)).tokens == expected(PROMPT, 10)


async def _client_leaves(here: Cluster, name: str, after_s: float) -> bool:
    call = here.call(request_id=name)
    await asyncio.sleep(after_s)
    call.cancel()
    return True


async def _cancelled_by_id(here: Cluster, name: str, after_s: float) -> bool:
    running = asyncio.create_task(here.generate(request_id=name))
    await asyncio.sleep(after_s)
    try:
        await here.inference.Cancel(inference_pb2.CancelRequest(request_id=name), timeout=5)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 - it may have finished
    try:
        return (await running).tokens == expected(PROMPT, 10)
    except CancelledError:
        return True


async def _past_its_deadline(here: Cluster, name: str, timeout_s: float) -> bool:
    try:
        answer: Answer = await here.generate(timeout_s, request_id=name)
    except (DeadlineError, CancelledError):
        return True
    return answer.tokens == expected(PROMPT, 10)
