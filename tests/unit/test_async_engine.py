"""The engine's thread: events reach the loop in order, and leaving a request frees it, whenever and however."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from collections.abc import Sequence as Rows
from contextlib import suppress
from dataclasses import replace

import pytest

from baton.engine.aio import AsyncEngine
from baton.engine.base import EngineRequest, Mode, Reserved, Token
from baton.engine.batch import BatchRow, Sampled
from baton.engine.engine import PagedEngine
from baton.engine.pace import Pace
from baton.engine.sim import SimConfig, SimRunner, build_sim_engine
from baton.errors import AlreadyExistsError, InternalError, InvalidRequestError, ModelLoadError
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence

CONFIG = SimConfig(num_blocks=64, step_s=0.0005)
PARAMS = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def request(name: str, *, mode: Mode = Mode.LOCAL, length: int = 40) -> EngineRequest:
    prompt = tuple(random.Random(name).randrange(256) for _ in range(length))
    return EngineRequest(AttemptKey(RequestId(name)), Sequence(prompt, (), PARAMS), mode)


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(lambda: build_sim_engine(CONFIG), name="test")
    await engine.start()
    yield engine
    await engine.stop()


async def generate(engine: AsyncEngine, req: EngineRequest) -> list[int]:
    tokens: list[int] = []
    async with engine.open(req) as steps:
        async for events in steps:
            tokens += [e.token_id for e in events if isinstance(e, Token)]
    return tokens


async def assert_all_free(engine: AsyncEngine) -> None:
    load = await engine.refresh_load()
    assert load.free_blocks + load.cached_blocks == CONFIG.num_blocks
    assert load.running_requests == load.waiting_requests == 0
    await engine.check_integrity()


async def test_concurrent_requests_get_their_own_tokens(engine: AsyncEngine) -> None:
    names = [f"r{n}" for n in range(12)]
    together = await asyncio.gather(*(generate(engine, request(n)) for n in names))
    alone = [await generate(engine, request(n)) for n in names]
    assert together == alone
    await assert_all_free(engine)


async def test_kv_moves_between_two_engines(engine: AsyncEngine) -> None:
    other = AsyncEngine(lambda: build_sim_engine(CONFIG), name="other")
    await other.start()
    expected = await generate(other, request("r"))
    prefill, decode = request("r", mode=Mode.PREFILL), request("r", mode=Mode.DECODE)
    async with engine.open(prefill) as steps, other.open(decode) as decode_steps:
        first = None
        async for events in steps:
            first = next((e for e in events if isinstance(e, Token)), None)
            if first is not None:
                break
        assert first is not None
        reserved = (await anext(decode_steps))[0]
        assert isinstance(reserved, Reserved)
        start = reserved.cached_tokens
        kv = await engine.export_kv(prefill.key, start, 40)
        await other.import_kv(decode.key, start, kv)
        await other.start_decode(decode.key, first.token_id)
        said = [first.token_id]
        async for events in decode_steps:
            said += [e.token_id for e in events if isinstance(e, Token)]
    assert said == expected
    await assert_all_free(engine)
    await assert_all_free(other)
    await other.stop()


async def test_cancelling_at_300_random_instants_leaves_every_block_free(
    engine: AsyncEngine,
) -> None:
    """Promise: no stranded KV block at any instant of cancellation."""
    rng = random.Random(5)

    async def doomed(number: int) -> None:
        task = asyncio.create_task(
            generate(engine, request(f"r{number}", mode=rng.choice(list(Mode))))
        )
        await asyncio.sleep(rng.random() * 0.03)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    for wave in range(10):
        await asyncio.gather(*(doomed(wave * 30 + n) for n in range(30)))
    await assert_all_free(engine)


async def test_errors_of_add_are_raised_on_entering(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError):
        await generate(engine, request("r", length=5000))
    async with engine.open(request("r")):
        with pytest.raises(AlreadyExistsError):
            await generate(engine, request("r"))
    await assert_all_free(engine)


async def test_prefix_feeds_mirror_the_cache(engine: AsyncEngine) -> None:
    early = engine.prefix_feed()
    for n in range(30):
        await generate(engine, request(f"r{n}"))
    late = engine.prefix_feed()
    await generate(engine, request("last"))
    await engine.refresh_load()
    mirror = set(early.take().stored)
    assert mirror == set(late.take().stored)
    delta = early.take()
    assert not delta.stored
    early.close()
    late.close()


async def test_build_errors_are_raised_by_start() -> None:
    def build() -> PagedEngine:
        raise ModelLoadError("model.safetensors", "is truncated")

    with pytest.raises(ModelLoadError, match="truncated"):
        await AsyncEngine(build, name="bad").start()


class DyingRunner(SimRunner):
    """Works for a while, then fails as a lost device does."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self.left = 10

    def run(self, rows: Rows[BatchRow]) -> list[Sampled | None]:
        self.left -= 1
        if not self.left:
            raise RuntimeError("device lost")
        return super().run(rows)


class GatedRunner(SimRunner):
    """Its steps take as long as the gate is closed."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self.gate, self.stands = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, rows: Rows[BatchRow]) -> list[Sampled | None]:
        if not self.gate.is_set():
            self.stands.set()
            assert self.gate.wait(20)
        return super().run(rows)


async def test_a_call_that_was_given_up_in_a_long_step_changes_nothing() -> None:
    """Promise: a router that gave up asking to stop a request finds it going on, and not held for nobody, without a token any more."""
    runner = GatedRunner(CONFIG)
    engine = AsyncEngine(
        lambda: PagedEngine(runner, max_batch_tokens=64, max_running=4), name="slow"
    )
    await engine.start()
    asked = request("r")
    async with engine.open(asked) as steps:
        said = 0
        async for events in steps:
            said += sum(isinstance(e, Token) for e in events)
            if said and runner.gate.is_set() and not runner.stands.is_set():
                runner.gate.clear()
                assert await asyncio.to_thread(runner.stands.wait, 20)
                asking = asyncio.create_task(engine.hold(asked.key))
                await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait({asking})
                runner.gate.set()
        assert runner.stands.is_set()
        assert said == PARAMS.max_tokens
    await engine.stop()


async def test_an_engine_that_fails_ends_every_request_with_an_error() -> None:
    """Promise: an error in bounded time instead of a hang."""
    config = replace(CONFIG, num_blocks=64)
    engine = AsyncEngine(
        lambda: PagedEngine(DyingRunner(config), max_batch_tokens=64, max_running=4), name="dying"
    )
    await engine.start()
    results = await asyncio.gather(
        *(generate(engine, request(f"r{n}")) for n in range(3)), return_exceptions=True
    )
    assert [type(r) for r in results] == [InternalError] * 3
    assert engine.failed
    with pytest.raises(InternalError, match="device lost"):
        await generate(engine, request("late"))
    await engine.stop()


async def test_an_event_iterator_coalesces_what_it_missed(engine: AsyncEngine) -> None:
    sizes: list[int] = []
    async with engine.open(request("slow")) as steps:
        async for events in steps:
            sizes.append(len(events))
            await asyncio.sleep(0.01)
    assert max(sizes) > 1
    assert sum(sizes) >= 20


async def test_tokens_come_at_the_pace_and_the_first_and_the_last_at_once(
    engine: AsyncEngine,
) -> None:
    """Promise: nothing is lost or put in another order; a rest as long as a day keeps neither the first token nor the end."""
    asked = request("paced")
    expected = await generate(engine, replace(asked, key=AttemptKey(RequestId("free"))))
    pace = Pace()
    pace.rest_s = 86_400.0
    batches: list[list[int]] = []
    async with asyncio.timeout(20), engine.open(asked, pace) as steps:
        async for events in steps:
            if ids := [event.token_id for event in events if isinstance(event, Token)]:
                batches.append(ids)
                # What rests before anybody was woken is not kept for a rest.
                await asyncio.sleep(0.001)
    assert [token for batch in batches for token in batch] == expected
    assert len(batches) <= 3
    assert len(batches[-1]) > 1


async def test_who_is_held_rests_no_more() -> None:
    """Promise: whoever stops a request learns of its tokens without waiting for the rest to end."""
    engine = AsyncEngine(lambda: build_sim_engine(CONFIG), name="held")
    await engine.start()
    endless = replace(PARAMS, max_tokens=400)
    asked = request("held")
    asked = replace(asked, sequence=replace(asked.sequence, sampling=endless))
    pace = Pace()
    pace.rest_s = 86_400.0
    said = 0
    async with asyncio.timeout(20), engine.open(asked, pace) as steps:
        async for events in steps:
            said += sum(isinstance(event, Token) for event in events)
            if said >= 2:
                break
        await asyncio.sleep(0.02)
        held = await engine.hold(asked.key)
        async for events in steps:
            said += sum(isinstance(event, Token) for event in events)
            break
    assert said == held.end_index
    await engine.stop()
