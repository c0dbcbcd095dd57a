"""A router dies, is cut off or stops, with streams running through it: `baton.client` goes on without a gap or a repeat."""

import asyncio
import signal

import pytest

from baton.client import AsyncClient, ConnectionOptions, SamplingOptions
from baton.client.types import Result
from baton.errors import AbortedError, UnavailableError
from tests.faults.proxy import Proxy
from tests.faults.routers import fleet

pytestmark = pytest.mark.e2e

PROMPT = [(i * 7) % 255 + 1 for i in range(90)]
TOKENS = 48
SAMPLING = {
    "greedy": SamplingOptions(max_tokens=TOKENS, temperature=0, ignore_eos=True),
    "seeded, with logprobs": SamplingOptions(
        max_tokens=TOKENS, seed=11, ignore_eos=True, logprobs=1
    ),
    "n = 4": SamplingOptions(max_tokens=TOKENS, seed=12, ignore_eos=True, n=4),
}


async def disturbed(
    client: AsyncClient, sampling: SamplingOptions, at: int, disturb: object
) -> Result:
    """The result of a request during which, after so many tokens, something is done."""
    assert callable(disturb)
    seen, done = 0, False
    async with client.generate(PROMPT, sampling=sampling, timeout_s=60) as stream:
        async for chunk in stream:
            seen += len(chunk.token_ids)
            if seen >= at and not done:
                done = True
                await asyncio.to_thread(disturb)
        assert done
        return stream.result


async def uses_prefill(client: AsyncClient, prompt: list[int]) -> bool:
    result = await client.complete(prompt, sampling=SamplingOptions(max_tokens=2, temperature=0))
    return bool(result.attempts[-1].prefill_worker)


def answers(result: Result) -> list[object]:
    return [(c.text, c.token_ids, c.logprobs, c.finish_reason) for c in result.completions]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
async def test_another_router_goes_on_where_a_killed_one_broke_off(
    sampling: SamplingOptions,
) -> None:
    """Promise: SIGKILL of the router after any token costs no token, text or log-probability, and repeats none; decode goes on
    through the gap, so that the prompt is not computed again.
    """
    async with fleet() as (routers, workers), AsyncClient(routers[0].address) as calm:
        undisturbed = await calm.complete(PROMPT, sampling=sampling)
        for at in (1, 2, 7, 20, 33, TOKENS - 1):
            first, second = routers
            async with AsyncClient(f"{first.address},{second.address}") as client:
                result = await disturbed(client, sampling, at, first.end)
            assert answers(result) == answers(undisturbed)
            assert result.attempts[0].prefill_worker == "", "joined, not begun anew"
            await workers.at_rest(5)
            await asyncio.to_thread(first.start)
            routers.reverse()


@pytest.mark.parametrize("how", ["killed", "stopped at once"])
async def test_the_same_router_goes_on_once_it_is_back(how: str) -> None:
    """Promise: with one router, the stream continues when it has come back."""
    async with fleet(routers=1) as ([router], workers), AsyncClient(router.address) as client:
        sampling = SAMPLING["seeded, with logprobs"]
        undisturbed = await client.complete(PROMPT, sampling=sampling)

        def restart() -> None:
            if how == "killed":
                router.end()
            else:
                router.signal(signal.SIGINT)
                router.signal(signal.SIGTERM)
                router.wait()
            router.start()

        for at in (1, 15, TOKENS - 1):
            result = await disturbed(client, sampling, at, restart)
            assert answers(result) == answers(undisturbed)
        await workers.at_rest(5)


async def test_a_router_that_stops_in_order_loses_no_stream() -> None:
    """Promise: SIGTERM with a drain too short for what runs is as harmless as SIGKILL, also for requests that come meanwhile."""
    async with fleet(environ={"BATON_DRAIN_GRACE_S": "0.2"}) as (routers, workers):
        first, second = routers
        async with AsyncClient(f"{first.address},{second.address}") as client:
            sampling = SAMPLING["greedy"]
            undisturbed = await client.complete(PROMPT, sampling=sampling)
            result = await disturbed(client, sampling, 5, lambda: first.signal(signal.SIGTERM))
            assert answers(result) == answers(undisturbed)
            assert answers(await client.complete(PROMPT, sampling=sampling)) == answers(result)
        await workers.at_rest(5)


async def test_a_router_that_is_cut_off_is_left_for_another() -> None:
    """Promise: a network between client and router that swallows everything is found by the client's own pings, and the stream goes on
    at another router; so it does for requests that begin meanwhile.
    """
    pings = ConnectionOptions(keepalive_s=0.5, keepalive_timeout_s=0.5)
    async with fleet(environ={"BATON_MIN_CLIENT_PING_S": "0.2"}) as (routers, workers):
        first, second = routers
        loop = asyncio.get_running_loop()
        for sampling in SAMPLING.values():
            door = await Proxy(first.address).start()

            def cut(door: Proxy = door) -> None:
                loop.call_soon_threadsafe(door.cut)

            addresses = f"{door.address},{second.address}"
            async with AsyncClient(addresses, connection=pings) as client:
                undisturbed = await client.complete(PROMPT, sampling=sampling)
                result = await disturbed(client, sampling, 5, cut)
                assert answers(result) == answers(undisturbed)
                assert result.attempts[0].prefill_worker == "", "joined, not begun anew"
                assert answers(await client.complete(PROMPT, sampling=sampling)) == answers(result)
            await door.stop()
        await workers.at_rest(15)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_router_that_ends_between_its_calls_to_decode_and_to_prefill_costs_little(
    number: signal.Signals,
) -> None:
    """Promise: an attempt that waits for a prompt which nobody was told to compute holds neither the client up nor its blocks."""
    pings = ConnectionOptions(keepalive_s=0.5, keepalive_timeout_s=0.5)
    prompt = PROMPT * 10
    async with fleet(environ={"BATON_MIN_CLIENT_PING_S": "0.2"}) as (routers, workers):
        first, second = routers
        addresses = f"{first.address},{second.address}"
        async with asyncio.timeout(5), AsyncClient(first.address) as calm:
            prompts = ([token] * len(prompt) for token in range(2, 99))
            while not await uses_prefill(calm, next(prompts)):
                pass  # one of its workers has not joined it yet
        async with AsyncClient(addresses, connection=pings) as client:
            asking = asyncio.create_task(client.complete(prompt, sampling=SAMPLING["greedy"]))
            while not workers.decode.host.num_calls:  # noqa: ASYNC110 - to be there before its answer is
                await asyncio.sleep(0)
            first.signal(number)
            assert not workers.prefill.host.num_calls
            async with asyncio.timeout(5):
                result = await asking
            assert result.attempts[-1].prefill_worker
            assert answers(result) == answers(
                await client.complete(prompt, sampling=SAMPLING["greedy"])
            )
        first.end()
        await workers.at_rest(2)


async def test_nobody_attaches_and_the_grace_frees_everything() -> None:
    """Promise: what a dead router left running is freed once its grace is over."""
    async with fleet(environ={"BATON_ORPHAN_GRACE_S": "0.5"}) as (routers, workers):
        sampling = SamplingOptions(max_tokens=3000, temperature=0, ignore_eos=True)
        once = ConnectionOptions(reconnect_s=0)
        async with AsyncClient(routers[0].address, connection=once) as client:
            with pytest.raises(UnavailableError):
                await disturbed(client, sampling, 5, routers[0].end)
        await workers.at_rest(5)


async def test_a_second_reader_takes_the_stream_over() -> None:
    """Promise: attaching while the first stream lives moves the answer to the new one; the first ends with ABORTED."""
    async with fleet() as (routers, workers):
        sampling = SAMPLING["greedy"]
        addresses = [router.address for router in routers]
        async with AsyncClient(addresses[0]) as one, AsyncClient(addresses[1]) as two:
            undisturbed = await one.complete(PROMPT, sampling=sampling)
            async with one.generate(PROMPT, sampling=sampling) as stream:
                chunks = aiter(stream)
                await anext(chunks)
                async with two.attach(stream.request_id) as other:
                    result = await other.read()
                with pytest.raises(AbortedError):
                    async for _ in chunks:
                        pass
            assert answers(result) == answers(undisturbed)
        await workers.at_rest(5)
