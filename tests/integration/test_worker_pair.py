"""A prefill and a decode worker over real gRPC: what they generate together, and what they hold afterwards."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import generate_latest

from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
from baton.kv.spec import KVSpec, SealedKV
from baton.service.settings import WorkerSettings
from baton.transfer.base import KVTransport, Piece, PullRequest, Ready, Underway
from baton.types import AttemptKey, FinishReason, Sequence
from tests.worker_rig import SIM, Rig, error_of, key, sequence, worker_pair


async def test_a_pair_generates_what_decode_alone_generates() -> None:
    seq = sequence(45, max_tokens=12)
    async with worker_pair() as rig:
        split = await rig.generate(key("a"), seq)
        await rig.settled()
    async with worker_pair() as rig:
        local = await rig.generate_locally(key("a"), seq)
        await rig.settled()
    assert split.tokens == local.tokens
    assert len(split.tokens) == 12
    assert split.finish is local.finish is FinishReason.LENGTH
    assert split.prefill_events == ["started", "progress", "first_token", "handed"]
    assert split.decode_events[:2] == local.decode_events[:2] == ["reserved", "kv_received"]
    assert split.decode_events[-1] == "finished"
    assert split.kv_bytes == 45 * 16
    assert local.kv_bytes == 0


async def test_tokens_that_a_failed_attempt_generated_are_continued() -> None:
    seq = sequence(45, max_tokens=12)
    async with worker_pair() as rig:
        whole = await rig.generate(key("a"), seq)
        resumed = Sequence(seq.prompt, tuple(whole.tokens[:5]), seq.sampling)
        rest = await rig.generate(key("a", 1), resumed)
        assert rest.tokens == whole.tokens[5:]
        await rig.settled()


async def test_kv_that_decode_has_cached_is_not_shipped_again() -> None:
    async with worker_pair() as rig:
        seq = sequence(40)
        first = await rig.generate(key("a"), seq)
        again = await rig.generate(key("b"), seq)
        assert (first.cached_tokens, again.cached_tokens) == (0, 32)
        assert again.kv_bytes == 8 * 16
        assert again.tokens == first.tokens
        await rig.settled()


async def test_kv_is_pulled_in_pieces_of_the_configured_size() -> None:
    async with worker_pair(settings=WorkerSettings(max_pull_bytes=160)) as rig:
        split = await rig.generate(key("a"), sequence(45, max_tokens=6))
        local = await rig.generate_locally(key("b"), sequence(45, max_tokens=6))
        assert split.tokens == local.tokens
        assert split.kv_bytes == 45 * 16
        await rig.settled()


@pytest.mark.parametrize(("kept_kv_bytes", "late_copies"), [(45 * 16, 0), (45 * 16 - 1, 1)])
async def test_kv_is_copied_out_with_the_first_token_as_far_as_the_setting_allows(
    monkeypatch: pytest.MonkeyPatch, kept_kv_bytes: int, late_copies: int
) -> None:
    """Promise: the host memory of finished prompts is bounded; what is beyond is copied when it is pulled, with the same tokens."""
    late: list[tuple[int, int]] = []
    async with worker_pair(settings=WorkerSettings(kept_kv_bytes=kept_kv_bytes)) as rig:
        engine = rig.prefill.host.engine
        export_kv = engine.export_kv

        async def counted(attempt: AttemptKey, first: int, last: int) -> SealedKV:
            late.append((first, last))
            return await export_kv(attempt, first, last)

        monkeypatch.setattr(engine, "export_kv", counted)
        for name in ("a", "b"):
            seq = sequence(45, max_tokens=6, start=ord(name))
            split = await rig.generate(key(name), seq)
            assert split.kv_bytes == 45 * 16
            assert split.tokens == (await rig.generate_locally(key(f"{name}-local"), seq)).tokens
        await rig.settled()
    # The second request shows that the first one's room came back.
    assert late == [(0, 45)] * 2 * late_copies


async def test_a_request_that_its_first_token_ends_ships_nothing() -> None:
    async with worker_pair() as rig:
        seq = sequence(20, max_tokens=1)
        decode = rig.decode_call(key("a"), seq)
        assert (await decode.read()).WhichOneof("event") == "reserved"
        events = [event async for event in rig.prefill_call(key("a"), seq)]
        assert [e.WhichOneof("event") for e in events] == ["started", "first_token"]
        assert events[-1].first_token.finish_reason
        assert isinstance(await error_of(decode), PreconditionError)
        await rig.settled()


async def test_many_requests_at_once_keep_their_own_tokens() -> None:
    async with worker_pair() as rig:
        jobs = [sequence(10 + i, max_tokens=5 + i % 7, start=i) for i in range(24)]
        answers = await asyncio.gather(
            *(rig.generate(key(f"r{i}"), job) for i, job in enumerate(jobs))
        )
        for i, job in enumerate(jobs):
            alone = await rig.generate_locally(key(f"local{i}"), job)
            assert answers[i].tokens == alone.tokens
        await rig.settled()


STAGES = ("decode queued", "reserved", "prefill started", "first token", "kv received", "tokens")


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancel_at_any_stage_frees_everything_on_both_sides(stage: str) -> None:
    """Whatever instant a caller gives up at, no block stays held."""
    slow = replace(SIM, step_s=0.01)
    async with worker_pair(prefill_sim=slow, decode_sim=slow) as rig:
        seq = sequence(60, max_tokens=200)
        decode = rig.decode_call(key("a"), seq)
        prefill = None
        if stage != "decode queued":
            await decode.read()
        if stage not in ("decode queued", "reserved"):
            prefill = rig.prefill_call(key("a"), seq)
            await prefill.read()
        if stage in ("first token", "kv received", "tokens"):
            assert prefill is not None
            while (await prefill.read()).WhichOneof("event") != "first_token":
                pass
        if stage in ("kv received", "tokens"):
            assert (await decode.read()).WhichOneof("event") == "kv_received"
        if stage == "tokens":
            assert (await decode.read()).WhichOneof("event") == "tokens"
        decode.cancel()
        if prefill is not None:
            prefill.cancel()
        await rig.settled()


async def test_three_hundred_random_cancellations_strand_no_block() -> None:
    """A caller may leave at any instant, in any number, while others go on; afterwards every block is free or cached."""
    chance = random.Random(20240607)
    quick = replace(SIM, step_s=0.001)
    async with worker_pair(prefill_sim=quick, decode_sim=quick) as rig:

        async def one(i: int) -> None:
            seq = sequence(chance.randrange(5, 90), max_tokens=chance.randrange(1, 30), start=i)
            try:
                async with asyncio.timeout(chance.uniform(0, 0.12)):
                    await rig.generate(key(f"r{i}"), seq)
            except (TimeoutError, BatonError):
                pass

        for wave in range(15):
            await asyncio.gather(*(one(wave * 20 + i) for i in range(20)))
        await rig.settled()
        seq = sequence(30)
        assert (await rig.generate(key("after"), seq)).tokens


async def test_a_second_call_of_the_same_attempt_is_refused_and_harms_nothing() -> None:
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.3)) as rig:
        seq = sequence(60)
        first = asyncio.create_task(rig.generate(key("a"), seq))
        async with asyncio.timeout(5):
            while not rig.prefill.host.num_calls:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for call in (rig.decode_call(key("a"), seq), rig.prefill_call(key("a"), seq)):
            assert isinstance(await error_of(call), AlreadyExistsError)
        assert len((await first).tokens) == 8
        await rig.settled()


async def test_decode_learns_at_once_that_prefill_was_cancelled() -> None:
    """Decode does not wait for KV that will never come."""
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.05)) as rig:
        seq = sequence(100)
        decode = rig.decode_call(key("a"), seq)
        await decode.read()
        prefill = rig.prefill_call(key("a"), seq)
        await prefill.read()
        prefill.cancel()
        assert isinstance(await error_of(decode), PreconditionError)
        await rig.settled()


async def test_decode_learns_at_once_that_its_source_is_gone() -> None:
    """A prefill process that dies fails the waiting attempt with UNAVAILABLE, which the router retries elsewhere."""
    async with worker_pair() as rig:
        decode = rig.decode_call(key("a"), sequence(30))
        await decode.read()
        rig.sources.remove("prefill-0")
        assert isinstance(await error_of(decode), UnavailableError)
        await rig.settled()


async def test_a_callers_deadline_ends_the_attempt_on_both_sides() -> None:
    """The deadline that the caller set bounds every wait."""
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.2)) as rig:
        seq = sequence(200)
        calls = (
            rig.decode_call(key("a"), seq, timeout=0.3),
            rig.prefill_call(key("a"), seq, timeout=0.3),
        )
        for call in calls:
            assert isinstance(await error_of(call), DeadlineError)
        await rig.settled()


async def test_finished_kv_that_nobody_pulls_is_freed_after_the_handoff_timeout() -> None:
    """A decode worker that never comes costs prefill its blocks for a bounded time only."""
    settings = WorkerSettings(handoff_timeout_s=0.2)
    async with worker_pair(settings=settings) as rig:
        error = await error_of(rig.prefill_call(key("a"), sequence(30)))
        assert isinstance(error, DeadlineError)
        assert error.stage == "handoff"
        await rig.settled()


class Breaking:
    """A transport that fails its pulls as told."""

    def __init__(self, inner: KVTransport) -> None:
        self.inner = inner
        self.hang = False
        self.flip = False
        self.error: BatonError | None = None

    async def ready(
        self, address: str, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway:
        return await self.inner.ready(address, key, timeout_s, piece)

    def pull(
        self, address: str, request: PullRequest, *, spec: KVSpec, timeout_s: float
    ) -> AbstractAsyncContextManager[SealedKV]:
        @asynccontextmanager
        async def broken() -> AsyncIterator[SealedKV]:
            if self.hang:
                async with asyncio.timeout(timeout_s):
                    await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            async with self.inner.pull(address, request, spec=spec, timeout_s=timeout_s) as kv:
                if self.flip:
                    data = kv.data.copy()
                    data.reshape(-1).view(np.uint8)[-1] ^= 1
                    kv = SealedKV(data, kv.checksum)  # noqa: PLW2901
                yield kv

        return broken()

    async def close(self) -> None:
        await self.inner.close()


async def broken_pair(rig: Rig, name: str) -> BatonError:
    with pytest.raises(BatonError) as failed:
        await rig.generate(key(name), sequence(30))
    await rig.settled()
    return failed.value


async def test_a_transfer_error_reaches_the_caller_as_itself_and_frees_both_sides() -> None:
    transports: list[Breaking] = []

    def wrap(inner: KVTransport) -> KVTransport:
        transports.append(Breaking(inner))
        return transports[0]

    async with worker_pair(wrap=wrap) as rig:
        transports[0].error = CorruptKVError("checksum differs")
        assert isinstance(await broken_pair(rig, "a"), CorruptKVError)
        transports[0].error = None
        assert len((await rig.generate(key("b"), sequence(30))).tokens) == 8
        text = (await metrics_of(rig)).replace("_created", "")
        assert 'handoff_failures_total{reason="corrupt_kv",role="decode"} 1.0' in text


async def test_a_flipped_bit_fails_its_attempt_and_is_never_cached() -> None:
    transports: list[Breaking] = []

    def wrap(inner: KVTransport) -> KVTransport:
        transports.append(Breaking(inner))
        return transports[0]

    async with worker_pair(wrap=wrap) as rig:
        transports[0].flip = True
        assert isinstance(await broken_pair(rig, "a"), CorruptKVError)
        transports[0].flip = False
        again = await rig.generate(key("b"), sequence(30))
        assert again.cached_tokens == 0
        assert again.tokens == (await rig.generate_locally(key("c"), sequence(30))).tokens


async def test_a_pull_that_is_never_answered_ends_when_the_caller_leaves() -> None:
    transports: list[Breaking] = []

    def wrap(inner: KVTransport) -> KVTransport:
        transports.append(Breaking(inner))
        transports[0].hang = True
        return transports[0]

    async with worker_pair(wrap=wrap) as rig:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await rig.generate(key("a"), sequence(30))
        await rig.settled()


async def test_a_failed_engine_ends_its_calls_and_turns_new_ones_away() -> None:
    """An engine failure is an error for every request it held, never a hang."""
    async with worker_pair() as rig:
        decode = rig.decode_call(key("a"), sequence(30))
        await decode.read()
        rig.decode.host.engine._fail("the device is gone")
        assert isinstance(await error_of(decode), InternalError)
        again = rig.decode_call(key("b"), sequence(30))
        assert isinstance(await error_of(again), UnavailableError)
        async with asyncio.timeout(2):
            await rig.decode.host.failed()


async def metrics_of(rig: Rig) -> str:
    """The decode worker's exposition."""
    reader, writer = await asyncio.open_connection(*rig.decode.host.info.metrics_address.split(":"))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return text


async def test_a_caller_that_leaves_after_the_last_word_is_no_cancellation() -> None:
    async with worker_pair() as rig:
        seq = sequence(20, max_tokens=3)
        call = rig.decode_call(key("a"), seq, local=True)
        async for response in call:
            if response.WhichOneof("event") == "finished":
                call.cancel()
                break
        await rig.settled()
        metrics = generate_latest(rig.decode.host.metrics.registry).decode()
    assert 'baton_worker_requests_total{outcome="ok",role="decode"} 1.0' in metrics
    assert 'outcome="cancelled"' not in metrics
