"""What every `KVTransport` promises, run on each of them."""

import asyncio
import random
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from baton.errors import (
    BatonError,
    CancelledError,
    CapacityError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
from baton.kv.pool import KVPool
from baton.kv.spec import KVSpec
from baton.transfer.base import Piece, PullRequest, Ready, Underway
from baton.transfer.ray_runtime import RayCluster
from tests.contract.fake_source import (
    HALF_SPEC,
    LARGE_SPEC,
    SPEC,
    Act,
    key_for,
    kv_of,
    refused_key,
    request_for,
)
from tests.contract.transport_rigs import RayPeers, Rig, memory_rig

PEER_LOSS_S = 5.0
"""A peer's death is known this soon."""


@pytest.fixture(scope="module")
def ray_peers(ray_cluster: RayCluster) -> Iterator[RayPeers]:
    del ray_cluster
    peers = RayPeers()
    yield peers
    peers.close()


@pytest.fixture(params=["memory", pytest.param("ray", marks=pytest.mark.ray)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "memory":
        with memory_rig() as rig:
            yield rig
    else:
        peers: RayPeers = request.getfixturevalue("ray_peers")
        yield peers.rig()


async def pulled(
    rig: Rig, request: PullRequest, spec: KVSpec = SPEC, timeout_s: float = 20
) -> bytes:
    async with rig.transport.pull(rig.address, request, spec=spec, timeout_s=timeout_s) as kv:
        everything: bytes = kv.data.tobytes()
        return everything


def assert_idle(rig: Rig) -> None:
    rig.budget.check_integrity()
    assert rig.budget.in_use_bytes == 0
    assert rig.budget.waiting == 0


@pytest.mark.parametrize("spec", [SPEC, HALF_SPEC, LARGE_SPEC], ids=["f32", "bf16", "large"])
async def test_a_pull_returns_every_bit(rig: Rig, spec: KVSpec) -> None:
    request = request_for(key_for(Act.GOOD), 3, 23, spec)
    async with rig.transport.pull(rig.address, request, spec=spec, timeout_s=20) as kv:
        assert kv.data.shape == spec.wire_shape(20)
        assert kv.data.dtype == spec.dtype.wire_dtype
        assert kv.data.tobytes() == kv_of(request, spec).tobytes()
        assert rig.budget.in_use_bytes == kv.data.nbytes
        with pytest.raises(ValueError, match="read-only"):
            kv.data[...] = 0
    assert_idle(rig)


async def test_an_empty_range_is_a_pull_like_any_other(rig: Rig) -> None:
    assert await pulled(rig, request_for(key_for(Act.GOOD), 5, 5)) == b""
    assert_idle(rig)


async def test_ready_waits_until_the_prompt_is_computed(rig: Rig) -> None:
    start_s = time.monotonic()
    ready = await rig.transport.ready(rig.address, key_for(Act.LATE, attempt=4), 20)
    assert time.monotonic() - start_s >= 0.3
    assert isinstance(ready, Ready)
    assert (ready.first_token, ready.done_unix_s) == (4, 1.5)


async def test_ready_tells_of_a_piece_before_the_whole(rig: Rig) -> None:
    ready, key = rig.transport.ready, key_for(Act.PIECES, attempt=4)
    assert await ready(rig.address, key, 20, Piece(31, has_begun=False)) == Underway()
    assert await ready(rig.address, key, 20, Piece(32, has_begun=True)) == Ready(4, 1.5)
    assert await ready(rig.address, key, 20) == Ready(4, 1.5)


async def test_ready_ends_in_time_for_an_attempt_that_never_comes(rig: Rig) -> None:
    start_s = time.monotonic()
    with pytest.raises(DeadlineError):
        await rig.transport.ready(rig.address, key_for(Act.NEVER), 0.5)
    assert time.monotonic() - start_s < 2


async def test_a_pull_ends_in_time_where_the_source_does_not_answer(rig: Rig) -> None:
    start_s = time.monotonic()
    with pytest.raises(DeadlineError):
        await pulled(rig, request_for(key_for(Act.NEVER)), timeout_s=0.5)
    assert time.monotonic() - start_s < 2
    assert_idle(rig)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError,
        PreconditionError,
        CapacityError,
        CorruptKVError,
        CancelledError,
        InternalError,
        DeadlineError,
    ],
)
async def test_a_refusal_is_raised_as_the_error_it_names(rig: Rig, error: type[BatonError]) -> None:
    key = refused_key(error.reason)
    with pytest.raises(error):
        await rig.transport.ready(rig.address, key, 20)
    with pytest.raises(error):
        await pulled(rig, request_for(key))
    assert_idle(rig)


async def test_a_refusal_of_an_unknown_reason_is_a_precondition(rig: Rig) -> None:
    with pytest.raises(PreconditionError, match="as asked"):
        await rig.transport.ready(rig.address, refused_key("FROM_THE_FUTURE"), 20)


async def test_a_broken_source_is_an_internal_error(rig: Rig) -> None:
    with pytest.raises(InternalError, match="the source is broken"):
        await rig.transport.ready(rig.address, key_for(Act.BROKEN), 20)
    with pytest.raises(InternalError, match="the source is broken"):
        await pulled(rig, request_for(key_for(Act.BROKEN)))
    assert_idle(rig)


async def test_a_source_refuses_another_spec(rig: Rig) -> None:
    request = PullRequest(key=key_for(Act.GOOD), first=0, last=1, digest="no such spec")
    with pytest.raises(PreconditionError, match="no such spec"):
        await pulled(rig, request)
    assert_idle(rig)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (Act.TRUNCATED, "shape"),
        (Act.TRANSPOSED, "shape"),
        (Act.RETYPED, "element type"),
        (Act.FORTRAN, "contiguous"),
        (Act.STALE, "#0"),
        (Act.SHIFTED, r"\[3, 8\)"),
        (Act.FOREIGN, HALF_SPEC.digest),
        (Act.MISSING, "no buffer"),
    ],
)
@pytest.mark.parametrize("spec", [SPEC, LARGE_SPEC], ids=["small", "large"])
async def test_kv_that_is_not_what_was_asked_is_corrupt(
    rig: Rig, act: Act, told: str, spec: KVSpec
) -> None:
    with pytest.raises(CorruptKVError, match=told):
        await pulled(rig, request_for(key_for(act), spec=spec), spec)
    assert_idle(rig)


@pytest.mark.parametrize("spec", [SPEC, LARGE_SPEC], ids=["small", "large"])
async def test_a_flipped_bit_is_refused_by_the_pool_and_leaves_no_trace(
    rig: Rig, spec: KVSpec
) -> None:
    pool = KVPool(spec, num_blocks=4, block_size_tokens=4, device="cpu")
    request = request_for(key_for(Act.FLIPPED), spec=spec)
    loop, dropped = asyncio.get_running_loop(), asyncio.Event()
    watch: list[object] = []

    async def pull_and_import() -> None:
        async with rig.transport.pull(rig.address, request, spec=spec, timeout_s=20) as kv:
            watch.append(weakref.ref(kv.data, lambda _: loop.call_soon_threadsafe(dropped.set)))
            try:
                pool.write_kv((2, 0, 3), request.first, kv)
            finally:
                del kv

    with pytest.raises(CorruptKVError, match="checksum") as caught:
        await pull_and_import()
    assert not pool.data.any()
    assert_idle(rig)
    # The error, which is still here, does not keep the buffer; Ray drops it on a thread of its own.
    async with asyncio.timeout(PEER_LOSS_S):
        await dropped.wait()
    assert caught.value.__traceback__ is not None


async def test_credit_bounds_the_bytes_in_flight(rig: Rig) -> None:
    requests = [request_for(key_for(Act.SLOW, i), 0, 4) for i in range(12)]
    most = 0

    async def one(request: PullRequest) -> None:
        nonlocal most
        async with rig.transport.pull(rig.address, request, spec=SPEC, timeout_s=30) as kv:
            rig.budget.check_integrity()
            most = max(most, rig.budget.in_use_bytes)
            assert kv.data.tobytes() == kv_of(request, SPEC).tobytes()

    rig.budget.budget_bytes = 3 * 4 * SPEC.token_bytes
    await asyncio.gather(*map(one, requests))
    assert 0 < most <= rig.budget.budget_bytes
    assert_idle(rig)


async def test_a_pull_that_waits_for_credit_keeps_its_deadline(rig: Rig) -> None:
    rig.budget.budget_bytes = 4 * SPEC.token_bytes
    request = request_for(key_for(Act.GOOD), 0, 4)
    async with rig.transport.pull(rig.address, request, spec=SPEC, timeout_s=20):
        with pytest.raises(DeadlineError):
            await pulled(rig, request_for(key_for(Act.GOOD, 1), 0, 4), timeout_s=0.3)
    assert_idle(rig)


async def test_a_storm_of_cancellations_leaves_nothing_held(rig: Rig) -> None:
    """However and whenever pulls are cancelled, credit and references come back, and the next pull works."""
    dice = random.Random(5)
    rig.budget.budget_bytes = 8 * LARGE_SPEC.token_bytes

    async def one(i: int) -> None:
        act = dice.choice([Act.GOOD, Act.SLOW, Act.NEVER, Act.TRUNCATED])
        num_tokens = dice.choice([1, 3, 8, 20])
        request = request_for(key_for(act, i), 0, num_tokens, LARGE_SPEC)
        async with rig.transport.pull(rig.address, request, spec=LARGE_SPEC, timeout_s=2) as kv:
            assert kv.data.tobytes() == kv_of(request, LARGE_SPEC).tobytes()
            await asyncio.sleep(dice.random() / 20)

    tasks = []
    for i in range(40):
        tasks.append(asyncio.create_task(one(i)))
        await asyncio.sleep(dice.random() / 50)
        dice.choice(tasks).cancel()
        rig.budget.check_integrity()
    for task in tasks:
        if dice.random() < 0.7:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    allowed = (CorruptKVError, DeadlineError, asyncio.CancelledError)
    assert [o for o in outcomes if o is not None and not isinstance(o, allowed)] == []
    del outcomes, tasks
    assert_idle(rig)
    await rig.drained()
    request = request_for(key_for(Act.GOOD), 0, 8, LARGE_SPEC)
    assert await pulled(rig, request, LARGE_SPEC) == kv_of(request, LARGE_SPEC).tobytes()


async def test_an_address_where_nobody_serves_is_unavailable(rig: Rig) -> None:
    with pytest.raises(UnavailableError):
        await rig.transport.ready("nobody", key_for(Act.GOOD), 20)
    request = request_for(key_for(Act.GOOD))
    with pytest.raises(UnavailableError):
        async with rig.transport.pull("nobody", request, spec=SPEC, timeout_s=20):
            pytest.fail("nobody answered")
    assert_idle(rig)


@pytest.mark.parametrize("warm", [False, True], ids=["unknown peer", "known peer"])
async def test_a_peer_that_died_before_the_call_is_unavailable(rig: Rig, *, warm: bool) -> None:
    """A dead prefill worker becomes UNAVAILABLE within seconds, never a hang."""
    if warm:
        await rig.transport.ready(rig.address, key_for(Act.GOOD), 20)
    await rig.kill()
    start_s = time.monotonic()
    with pytest.raises(UnavailableError):
        await rig.transport.ready(rig.address, key_for(Act.GOOD), 20)
    with pytest.raises(UnavailableError):
        await pulled(rig, request_for(key_for(Act.GOOD)))
    assert time.monotonic() - start_s < PEER_LOSS_S
    assert_idle(rig)


@pytest.mark.parametrize("stage", ["ready", "pull"])
async def test_a_peer_that_dies_during_a_call_is_unavailable(rig: Rig, stage: str) -> None:
    """The ready call doubles as a death watch: prefill's death ends it within seconds; so it does a pull."""
    await rig.transport.ready(rig.address, key_for(Act.GOOD), 20)
    key = key_for(Act.NEVER)
    call: asyncio.Task[Ready | Underway | bytes] = asyncio.create_task(
        rig.transport.ready(rig.address, key, 20)
        if stage == "ready"
        else pulled(rig, request_for(key))
    )
    await asyncio.sleep(0.2)
    assert not call.done()
    await rig.kill()
    start_s = time.monotonic()
    with pytest.raises(UnavailableError):
        await call
    assert time.monotonic() - start_s < PEER_LOSS_S
    assert_idle(rig)


async def test_bytes_that_were_pulled_outlive_their_source(rig: Rig) -> None:
    """Decode owns what it pulled: prefill's death after its answer loses nothing."""
    request = request_for(key_for(Act.GOOD), 0, 20, LARGE_SPEC)
    async with rig.transport.pull(rig.address, request, spec=LARGE_SPEC, timeout_s=20) as kv:
        await rig.kill()
        await asyncio.sleep(0.3)
        assert np.array_equal(kv.data.view(np.uint32), kv_of(request, LARGE_SPEC).view(np.uint32))
        del kv
    assert_idle(rig)


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.012, 0.03])
async def test_a_peer_that_dies_at_any_instant_loses_or_delivers(rig: Rig, delay_s: float) -> None:
    """Whenever prefill dies, each pull either delivers every bit or raises UNAVAILABLE."""
    await rig.transport.ready(rig.address, key_for(Act.GOOD), 20)
    requests = [request_for(key_for(Act.GOOD, i), 0, 20, LARGE_SPEC) for i in range(4)]
    calls = [asyncio.create_task(pulled(rig, request, LARGE_SPEC)) for request in requests]
    await asyncio.sleep(delay_s)
    await rig.kill()
    async with asyncio.timeout(PEER_LOSS_S):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, bytes):
            assert outcome == kv_of(request, LARGE_SPEC).tobytes()
        else:
            assert isinstance(outcome, UnavailableError), outcome
    assert_idle(rig)
