"""Whatever happens to a worker, the client's stream is the undisturbed one: no gap, no repeat, and a report of what was tried."""

import asyncio
import time

import pytest

from baton.errors import (
    BatonError,
    CapacityError,
    CorruptKVError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from baton.types import Role
from tests.integration.router_fakes import PROMPT, Cluster, CutError, FakeWorker, cluster, expected


class Raise:
    """A script that raises the first time that a stage is reached by any of its workers."""

    def __init__(self, stage: str, error: Exception) -> None:
        self._stage = stage
        self._error: Exception | None = error

    async def __call__(self, stage: str) -> None:
        if stage == self._stage and self._error is not None:
            error, self._error = self._error, None
            raise error


async def two_of_each(here: Cluster) -> list[FakeWorker]:
    return [
        await here.prefill("p1"),
        await here.prefill("p2"),
        await here.decode("d1"),
        await here.decode("d2"),
    ]


def script_all(workers: list[FakeWorker], role: Role, stage: str, act: str) -> list[str]:
    """The first worker of the role to reach the stage dies or freezes; returns where its id is put."""
    hit: list[str] = []

    def scripted(worker: FakeWorker) -> None:
        async def script(reached: str) -> None:
            if reached == stage and not hit:
                hit.append(worker.worker_id)
                # A connection that breaks loses what is under way; what was said before is to have arrived.
                await asyncio.sleep(0.2)
                await (worker.die() if act == "die" else worker.freeze())

        worker.script = script

    for worker in workers:
        if worker.role is role:
            scripted(worker)
    return hit


async def test_an_undisturbed_request_takes_one_attempt() -> None:
    async with cluster() as here:
        await two_of_each(here)
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.text == bytes(answer.tokens).decode()
        assert answer.failures == []
        assert answer.end.usage.completion_tokens == 10
        assert answer.end.usage.prompt_tokens == len(PROMPT)
        assert answer.end.usage.cached_tokens == 32
        at = answer.end.timings
        assert (
            0
            < at.admitted_at_seconds
            <= at.placed_at_seconds
            <= at.reserved_at_seconds
            <= at.prefill_started_at_seconds
            <= at.first_token_at_seconds
            <= at.last_token_at_seconds
            <= at.finished_at_seconds
        )
        assert at.kv_received_at_seconds > 0


@pytest.mark.parametrize("index", range(1, 10))
async def test_decode_dies_before_any_token(index: int) -> None:
    """The other decode worker goes on after the tokens that the client has."""
    async with cluster() as here:
        workers = await two_of_each(here)
        hit = script_all(workers, Role.DECODE, f"token:{index}", "die")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]
        first, second = answer.end.attempts
        assert first.decode_worker == hit[0] != second.decode_worker
        assert second.resumed_tokens <= index, "what was on its way may be lost with the connection"
        assert hit[0] not in here.members


@pytest.mark.parametrize("stage", ["arrived", "reserved", "kv"])
async def test_decode_dies_before_it_generates(stage: str) -> None:
    """The request starts anew on the other decode worker."""
    async with cluster() as here:
        workers = await two_of_each(here)
        hit = script_all(workers, Role.DECODE, stage, "die")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]
        assert answer.end.attempts[1].decode_worker != hit[0]


async def test_decode_dies_between_its_last_token_and_its_word_that_it_was_the_last() -> None:
    """The output is complete, so there is nothing to recover."""
    async with cluster() as here:
        workers = await two_of_each(here)
        script_all(workers, Role.DECODE, "finish", "die")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == []


@pytest.mark.parametrize("stage", ["arrived", "started", "token"])
async def test_prefill_dies_before_its_token(stage: str) -> None:
    """The other prefill worker computes the prompt."""
    async with cluster() as here:
        workers = await two_of_each(here)
        hit = script_all(workers, Role.PREFILL, stage, "die")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]
        assert answer.end.attempts[0].prefill_worker == hit[0]
        assert answer.end.attempts[1].prefill_worker not in ("", hit[0])


async def test_decode_may_finish_before_prefills_token_has_come() -> None:
    """The two travel on different connections: the answer waits for the token, and no attempt is given up."""
    async with cluster() as here:
        prefill = await here.prefill("p")
        decode = await here.decode("d")

        async def late(stage: str) -> None:
            if stage == "token":
                for event in prefill.handoffs.computed.values():
                    event.set()
                await here.until(lambda: decode.running == 0)
                await asyncio.sleep(0.1)

        prefill.script = late
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == []


async def test_prefill_dies_with_the_kv_before_decode_took_it() -> None:
    """The token that the client has is kept; the KV is computed again."""
    async with cluster() as here:
        workers = await two_of_each(here)
        holding = asyncio.Event()
        for worker in workers:
            if worker.role is Role.DECODE:

                async def hold(stage: str) -> None:
                    if stage == "reserved" and not holding.is_set():
                        holding.set()
                        await asyncio.Event().wait()

                worker.script = hold
        hit = script_all(workers, Role.PREFILL, "computed", "die")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]
        assert answer.end.attempts[1].resumed_tokens == 1
        assert answer.end.attempts[1].prefill_worker != hit[0]


async def test_prefill_dies_after_the_handoff() -> None:
    """Decode owns what it pulled: nothing happens to the request."""
    async with cluster() as here:
        workers = await two_of_each(here)
        hit = script_all(workers, Role.PREFILL, "handed", "die")
        for worker in workers:
            if worker.role is Role.DECODE:

                async def slow(stage: str) -> None:
                    if stage == "token:5":
                        await here.until(lambda: hit[0] not in here.members)

                worker.script = slow
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == []


@pytest.mark.parametrize(
    ("role", "stage"),
    [
        (Role.DECODE, "arrived"),
        (Role.DECODE, "kv"),
        (Role.DECODE, "token:4"),
        (Role.PREFILL, "arrived"),
        (Role.PREFILL, "token"),
    ],
)
async def test_a_worker_that_stops_without_a_word_is_given_up_with_its_lease(
    role: Role, stage: str
) -> None:
    """Its connections stay open, so only the lease can tell."""
    async with cluster(lease_s=0.6) as here:
        workers = await two_of_each(here)
        hit = script_all(workers, role, stage, "freeze")
        began_s = time.monotonic()
        answer = await here.generate()
        assert 0.4 < time.monotonic() - began_s < 4
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]
        assert hit[0] not in here.members


async def test_a_source_that_freezes_after_its_last_word_is_given_up_too() -> None:
    """Promise: KV that prefill says it has handed over, and that never comes, costs a lease and a grace, not the handoff's timeout."""
    async with cluster(lease_s=0.6) as here:
        workers = await two_of_each(here)
        frozen = script_all(workers, Role.PREFILL, "over", "freeze")
        waiting: list[str] = []

        def scripted(worker: FakeWorker) -> None:
            async def script(stage: str) -> None:
                if stage == "kv" and not waiting:
                    waiting.append(worker.worker_id)
                    await asyncio.Event().wait()

            worker.script = script

        for worker in workers:
            if worker.role is Role.DECODE:
                scripted(worker)
        began_s = time.monotonic()
        answer = await here.generate()
        assert time.monotonic() - began_s < 8
        assert waiting
        assert frozen
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]


@pytest.mark.parametrize(
    ("role", "stage", "error", "blamed"),
    [
        (Role.DECODE, "arrived", PreconditionError("wrong digest"), "decode"),
        (Role.DECODE, "arrived", CapacityError("full"), "decode"),
        (Role.DECODE, "arrived", UnavailableError("draining"), "decode"),
        (Role.DECODE, "kv", CorruptKVError("checksum"), "prefill"),
        (Role.DECODE, "kv", PreconditionError("KV expired"), "prefill"),
        (Role.DECODE, "token:3", InternalError("engine"), "decode"),
        (Role.DECODE, "token:3", RuntimeError("a bug"), "decode"),
        (Role.PREFILL, "arrived", CapacityError("full"), "prefill"),
        (Role.PREFILL, "started", InternalError("engine"), "prefill"),
        (Role.PREFILL, "token", PreconditionError("lost"), "prefill"),
    ],
)
async def test_a_failed_attempt_is_repeated_without_the_worker_that_failed_it(
    role: Role, stage: str, error: Exception, blamed: str
) -> None:
    async with cluster() as here:
        workers = await two_of_each(here)
        once = Raise(stage, error)
        for worker in workers:
            if worker.role is role:
                worker.script = once
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        reason = error.reason if isinstance(error, BatonError) else "INTERNAL"
        assert answer.failures == [reason]
        first, second = answer.end.attempts
        if blamed == "decode":
            assert first.decode_worker != second.decode_worker
        else:
            assert first.prefill_worker != second.prefill_worker


async def test_an_error_that_no_worker_can_mend_ends_the_request() -> None:
    async with cluster() as here:
        workers = await two_of_each(here)
        invalid = InvalidRequestError(FieldViolation("sequence", "never fits"))
        for worker in workers:
            worker.script = Raise("arrived", invalid)
        with pytest.raises(InvalidRequestError) as refused:
            await here.generate()
        assert refused.value.violations == invalid.violations
        assert sum(len(worker.keys) for worker in workers) == 1


async def test_attempts_without_a_new_token_are_limited() -> None:
    async with cluster(max_attempts=3) as here:
        workers = await two_of_each(here)

        async def full(stage: str) -> None:
            if stage == "arrived":
                raise CapacityError("full", retry_after_s=7.0)

        for worker in workers:
            worker.script = full
        with pytest.raises(CapacityError) as refused:
            await here.generate()
        assert refused.value.retry_after_s == 7.0
        assert sum(len(worker.keys) for worker in workers) == 3


async def test_attempts_that_bring_tokens_are_not_limited() -> None:
    async with cluster(max_attempts=2) as here:
        workers = await two_of_each(here)

        async def one_token(stage: str) -> None:
            if stage.startswith("token:"):
                raise UnavailableError("enough")

        for worker in workers:
            if worker.role is Role.DECODE:
                worker.script = one_token
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert len(answer.failures) == 9
        assert [attempt.resumed_tokens for attempt in answer.end.attempts] == list(range(10))


async def test_with_one_worker_of_each_a_request_waits_for_the_replacement() -> None:
    async with cluster() as here:
        await here.prefill("p1")
        first = await here.decode("d1")
        script_all([first], Role.DECODE, "token:5", "die")
        running = asyncio.create_task(here.generate())
        await here.until(lambda: here.members == ["p1"])
        await here.decode("d2")
        answer = await running
        assert answer.tokens == expected(PROMPT, 10)
        assert [attempt.decode_worker for attempt in answer.end.attempts] == ["d1", "d2"]


async def test_a_prefill_call_that_broke_is_followed_by_a_release() -> None:
    async with cluster() as here:
        prefill = await here.prefill("p1")
        await here.decode("d1")
        prefill.script = Raise("token", CutError())
        answer = await here.generate(request_id="r")
        assert answer.tokens == expected(PROMPT, 10)
        await here.until(lambda: prefill.released == ["r#0"])


async def test_the_first_token_that_ends_the_request_needs_no_handoff() -> None:
    async with cluster() as here:
        await two_of_each(here)
        answer = await here.generate(max_tokens=1)
        assert answer.tokens == expected(PROMPT, 1)
        assert answer.failures == []
        assert answer.end.timings.kv_received_at_seconds == 0


async def test_without_prefill_workers_decode_computes_the_prompt() -> None:
    async with cluster() as here:
        await here.decode("d1")
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert [attempt.prefill_worker for attempt in answer.end.attempts] == [""]


async def test_a_short_prompt_does_not_visit_a_prefill_worker() -> None:
    async with cluster() as here:
        workers = await two_of_each(here)
        answer = await here.generate(prompt=PROMPT[:20])
        assert answer.tokens == expected(PROMPT[:20], 10)
        assert [worker.keys for worker in workers if worker.role is Role.PREFILL] == [[], []]
