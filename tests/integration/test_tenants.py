"""What one tenant can know of another: nothing. Router and workers as they are shipped, simulated engines, real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.engine.sim import SimConfig
from baton.errors import (
    AbortedError,
    BatonError,
    CancelledError,
    CapacityError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
)
from baton.service.keys import TenantLimits, add_key, new_key, remove_key
from baton.service.status import error_from_rpc
from baton.v1 import fleet_pb2_grpc, inference_pb2, session_pb2
from tests.integration.router_fakes import SETTINGS, Answer, request
from tests.integration.sim_house import SIM, House, house, prompt_of
from tests.worker_rig import error_of


class Keys:
    """A keys file."""

    def __init__(self, directory: Path) -> None:
        self.file = str(directory / "keys.json")
        self.ids: dict[str, str] = {}

    def make(
        self,
        tenant: str,
        *,
        admin: bool = False,
        private: bool = False,
        limits: TenantLimits | None = None,
    ) -> str:
        entry, key = new_key(
            tenant, limits=limits or TenantLimits(), is_admin=admin, private_cache=private
        )
        add_key(self.file, entry)
        self.ids[key] = entry.id
        return key

    def revoke(self, key: str) -> None:
        remove_key(self.file, self.ids[key])


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@asynccontextmanager
async def guarded(
    keys: Keys, *, private_caches: bool = False, sim: SimConfig = SIM
) -> AsyncIterator[House]:
    settings = replace(
        SETTINGS,
        api_keys_file=keys.file,
        fleet_listen="127.0.0.1:0",
        private_caches=private_caches,
    )
    async with house(1, 1, settings=settings, sim=sim) as here:
        yield here


def bearing(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def ask(here: House, key: str, number: int = 1, **changes: Any) -> Answer:
    """Raises the BatonError that the router meant."""
    message = request(prompt=prompt_of(number), ignore_eos=True, **changes)
    answer = Answer()
    try:
        async for response in here.inference.Generate(message, timeout=20, metadata=bearing(key)):
            answer.add(response)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return answer


async def ask_for_ever(here: House, key: str) -> None:
    while True:
        await ask(here, key)


async def failure(call: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return error_from_rpc(failed.value)


async def test_no_method_of_the_clients_port_answers_without_a_valid_key(keys: Keys) -> None:
    """Promise: UNAUTHENTICATED for a key that is absent, unknown, wrong, doubled, or of another scheme; health is open."""
    key = keys.make("acme")
    wrong = key[:-4] + ("aaaa" if key[-4:] != "aaaa" else "bbbb")
    bad: list[tuple[tuple[str, str], ...]] = [
        (),
        bearing("baton_unknown_0123456789abcdef"),
        bearing(wrong),
        bearing(""),
        bearing(key) + bearing(key),
        (("authorization", f"Basic {key}"),),
    ]
    async with guarded(keys) as here:
        stub = here.inference
        for metadata in bad:
            assert isinstance(
                await failure(stub.GetModel(inference_pb2.GetModelRequest(), metadata=metadata)),
                UnauthenticatedError,
            )
            cancel = stub.Cancel(inference_pb2.CancelRequest(request_id="r"), metadata=metadata)
            assert isinstance(await failure(cancel), UnauthenticatedError)
            generate = stub.Generate(request(), metadata=metadata)
            assert isinstance(await failure(generate.read()), UnauthenticatedError)
            listing = session_pb2.SessionServiceListRequest()
            listed = here.sessions.List(listing, metadata=metadata)
            assert isinstance(await failure(listed), UnauthenticatedError)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{here.app.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            join = fleet_pb2_grpc.FleetServiceStub(channel).Join(metadata=bearing(key), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await join.read()
            assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await ask(here, key)).end.usage.completion_tokens == 10


async def test_a_key_counts_from_when_it_is_made_until_it_is_revoked(keys: Keys) -> None:
    """Promise: without a restart. A file that became unusable changes nothing."""
    keys.make("first")
    async with guarded(keys) as here:
        late = keys.make("late")
        await ask(here, late)
        await asyncio.to_thread(Path(keys.file).write_text, "{")
        await ask(here, late)
        await asyncio.to_thread(Path(keys.file).unlink)
        other = keys.make("other")
        await ask(here, other)
        keys.revoke(other)
        with pytest.raises(UnauthenticatedError):
            await ask(here, other)


async def test_another_tenants_request_is_as_if_it_were_not_there(keys: Keys) -> None:
    """Promise: its id can be taken, and cancelling or attaching to it is NOT_FOUND, in the words that a request which never was gets.
    Its own tenant attaches with another key.
    """
    ours, also_ours, theirs = keys.make("acme"), keys.make("acme"), keys.make("rival")
    async with guarded(keys) as here:
        stub = here.inference
        message = request(prompt=prompt_of(3), max_tokens=3000, ignore_eos=True, request_id="r1")
        call = stub.Generate(message, metadata=bearing(ours), timeout=30)
        await call.read()
        cancel = inference_pb2.CancelRequest(request_id="r1")
        refused = await failure(stub.Cancel(cancel, metadata=bearing(theirs)))
        assert isinstance(refused, NotFoundError)
        never = inference_pb2.CancelRequest(request_id="r2")
        unknown = await failure(stub.Cancel(never, metadata=bearing(theirs)))
        assert refused.message == unknown.message.replace("r2", "r1")
        attach = inference_pb2.AttachRequest(request_id="r1")
        theirs_read = stub.Attach(attach, metadata=bearing(theirs), timeout=5)
        assert isinstance(await error_of(theirs_read), NotFoundError)
        answer = await ask(here, theirs, 4, request_id="r1")
        assert answer.accepted is not None
        assert answer.accepted.request_id == "r1"
        second = stub.Attach(attach, metadata=bearing(also_ours), timeout=30)
        assert (await second.read()).accepted.request_id == "r1"
        assert isinstance(await error_of(call), AbortedError)
        await stub.Cancel(cancel, metadata=bearing(also_ours))
        assert isinstance(await error_of(second), CancelledError)


async def test_who_attaches_needs_neither_a_place_nor_tokens_anew(keys: Keys) -> None:
    """Promise: a tenant whose one place and whose tokens its request has taken goes on with it all the same, and at once."""
    limits = TenantLimits(max_running=1, tokens_per_s=0.01, burst_tokens=100)
    ours = keys.make("acme", limits=limits)
    async with guarded(keys) as here:
        message = request(prompt=prompt_of(3), max_tokens=3000, ignore_eos=True, request_id="r1")
        call = here.inference.Generate(message, metadata=bearing(ours), timeout=30)
        await call.read()
        attach = inference_pb2.AttachRequest(request_id="r1")
        second = here.inference.Attach(attach, metadata=bearing(ours), timeout=30)
        assert (await second.read()).accepted.request_id == "r1"
        cancel = inference_pb2.CancelRequest(request_id="r1")
        await here.inference.Cancel(cancel, metadata=bearing(ours))
        for each in (call, second):
            each.cancel()
        assert await here.app.table.idle(20)
        with pytest.raises(CapacityError, match="rate"):
            await ask(here, ours)


async def test_an_answer_that_is_told_again_is_paid_once(keys: Keys) -> None:
    """Promise: a session's turn that is repeated, and an answer that is read once more, cost its tenant no tokens."""
    ours = keys.make("acme", limits=TenantLimits(tokens_per_s=0.01, burst_tokens=400))
    async with guarded(keys) as here:
        create = session_pb2.SessionServiceCreateRequest()
        mine = (await here.sessions.Create(create, metadata=bearing(ours))).session.session_id
        turn = {"session_id": mine, "request_id": "r1", "max_tokens": 200}
        told = await ask(here, ours, **turn)
        assert len(told.tokens) == 200
        assert (await ask(here, ours, **turn)).tokens == told.tokens
        attach, again = inference_pb2.AttachRequest(request_id="r1"), Answer()
        async for response in here.inference.Attach(attach, metadata=bearing(ours), timeout=20):
            again.add(response)
        assert again.tokens == told.tokens
        registry = here.app.metrics.registry
        assert registry.get_sample_value("baton_completion_tokens_total") == 200
        assert registry.get_sample_value("baton_time_to_first_token_seconds_count") == 1
        # 90 and 200 of 400 are taken, and that is what 90 and 20 leave room for.
        await ask(here, ours, max_tokens=20)
        with pytest.raises(CapacityError, match="rate"):
            await ask(here, ours, max_tokens=20)


async def sessions_of(here: House, key: str) -> list[str]:
    listing = session_pb2.SessionServiceListRequest()
    listed = await here.sessions.List(listing, metadata=bearing(key))
    return [each.session_id for each in listed.sessions]


async def test_another_tenants_session_is_as_if_it_were_not_there(keys: Keys) -> None:
    """Promise: NOT_FOUND in whatever call, in the words for one that never was, and in no list. Its own tenant has it by another key."""
    ours, also_ours, theirs = keys.make("acme"), keys.make("acme"), keys.make("rival")
    async with guarded(keys) as here:
        create = session_pb2.SessionServiceCreateRequest()
        mine = (await here.sessions.Create(create, metadata=bearing(ours))).session.session_id
        other = (await here.sessions.Create(create, metadata=bearing(theirs))).session.session_id
        assert await sessions_of(here, also_ours) == [mine]
        assert await sessions_of(here, theirs) == [other]
        get = session_pb2.SessionServiceGetRequest(session_id=mine)
        close = session_pb2.SessionServiceCloseRequest(session_id=mine)
        turn = request(prompt=prompt_of(3), session_id=mine)
        refused = [
            await failure(here.sessions.Get(get, metadata=bearing(theirs))),
            await failure(here.sessions.Close(close, metadata=bearing(theirs))),
            await failure(here.inference.Generate(turn, metadata=bearing(theirs)).read()),
        ]
        never = "s" + "0" * 32
        get_never = session_pb2.SessionServiceGetRequest(session_id=never)
        unknown = await failure(here.sessions.Get(get_never, metadata=bearing(theirs)))
        for each in refused:
            assert isinstance(each, NotFoundError)
            assert each.message == unknown.message.replace(never, mine)
        assert (await ask(here, ours, session_id=mine)).end.session.turn == 1
        assert (await ask(here, also_ours, session_id=mine)).end.session.turn == 2
        await here.sessions.Close(close, metadata=bearing(also_ours))
        assert await sessions_of(here, ours) == []
        assert await sessions_of(here, theirs) == [other]


async def test_another_tenants_turn_is_not_to_be_attached_to(keys: Keys) -> None:
    """Promise: its own tenant goes on with it, and the session has the turn; to another tenant there is none."""
    ours, also_ours, theirs = keys.make("acme"), keys.make("acme"), keys.make("rival")
    async with guarded(keys) as here:
        create = session_pb2.SessionServiceCreateRequest()
        mine = (await here.sessions.Create(create, metadata=bearing(ours))).session.session_id
        message = request(
            prompt=prompt_of(3), max_tokens=900, ignore_eos=True, request_id="r1", session_id=mine
        )
        call = here.inference.Generate(message, metadata=bearing(ours), timeout=30)
        await call.read()
        attach = inference_pb2.AttachRequest(request_id="r1")
        theirs_read = here.inference.Attach(attach, metadata=bearing(theirs), timeout=5)
        answer = Answer()
        async for response in here.inference.Attach(
            attach, metadata=bearing(also_ours), timeout=30
        ):
            answer.add(response)
        assert answer.end.session.session_id == mine
        assert answer.end.session.turn == 1
        assert len(answer.tokens) == 900
        assert isinstance(await error_of(call), AbortedError)
        assert isinstance(await error_of(theirs_read), NotFoundError)
        get = session_pb2.SessionServiceGetRequest(session_id=mine)
        assert (await here.sessions.Get(get, metadata=bearing(ours))).session.turns == 1


async def test_a_tenants_limits_are_those_of_its_last_key(keys: Keys) -> None:
    """Promise: they bind its older keys too, and no other tenant."""
    ours, theirs = keys.make("acme"), keys.make("rival")
    async with guarded(keys) as here:
        for key in (ours, ours, theirs):
            await ask(here, key)
        keys.make("acme", limits=TenantLimits(tokens_per_s=0.01, burst_tokens=150))
        await ask(here, ours)
        with pytest.raises(CapacityError, match="rate") as refused:
            await ask(here, ours)
        assert refused.value.retry_after_s > 10
        await ask(here, theirs)
        keys.make("acme")
        await ask(here, ours)


async def test_changed_limits_count_for_a_tenant_that_is_never_at_rest(keys: Keys) -> None:
    """Promise: more concurrency lets in who waits, without another call; less, and a lower token rate, count for whoever comes next."""
    key = keys.make("acme", limits=TenantLimits(max_running=1))
    async with guarded(keys, sim=replace(SIM, step_s=0.01)) as here, asyncio.timeout(40):

        async def waiting(count: int) -> None:
            while here.app.table.num_waiting != count:  # noqa: ASYNC110 - the router's own tasks
                await asyncio.sleep(0.01)

        message = request(prompt=prompt_of(3), max_tokens=3000, ignore_eos=True)
        long = here.inference.Generate(message, metadata=bearing(key), timeout=60)
        await long.read()
        second = asyncio.create_task(ask(here, key))
        await waiting(1)
        keys.make("acme", limits=TenantLimits(max_running=2))
        await second
        keys.make("acme", limits=TenantLimits(max_running=1))
        while not here.app.table.num_waiting:
            third = asyncio.create_task(ask(here, key))
            while not (third.done() or here.app.table.num_waiting):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        keys.make("acme", limits=TenantLimits(tokens_per_s=0.01, burst_tokens=1))
        await third
        with pytest.raises(CapacityError, match="rate"):
            await ask_for_ever(here, key)
        assert (await long.read()).HasField("chunk"), "it runs on"
        long.cancel()
        assert await here.app.table.idle(10)


async def test_only_administrators_see_the_workers(keys: Keys) -> None:
    user, admin = keys.make("acme"), keys.make("ops", admin=True)
    async with guarded(keys) as here:
        ask_model = inference_pb2.GetModelRequest()
        seen = await here.inference.GetModel(ask_model, metadata=bearing(user))
        assert seen.model
        assert not seen.workers
        seen = await here.inference.GetModel(ask_model, metadata=bearing(admin))
        assert len(seen.workers) == 2


@pytest.mark.parametrize("by_key", [True, False], ids=["by key", "by setting"])
async def test_a_private_cache_tells_no_other_tenant_what_was_asked(
    keys: Keys,
    by_key: bool,  # noqa: FBT001
) -> None:
    """Promise: another tenant's identical prompt finds nothing cached and is computed in full, on both workers; the same tenant's is
    found. The tokens are the same.
    """
    ours, theirs = keys.make("acme", private=by_key), keys.make("rival", private=by_key)
    async with guarded(keys, private_caches=not by_key) as here:
        first = await ask(here, ours)
        again = await ask(here, ours)
        assert again.end.usage.cached_tokens >= 80
        other = await ask(here, theirs)
        assert other.end.usage.cached_tokens == 0
        assert other.end.timings.handoff_bytes == first.end.timings.handoff_bytes
        assert other.end.attempts[0].prefill_worker, "placed as one that nobody has the KV of"
        assert first.tokens == again.tokens == other.tokens
        third = await ask(here, theirs)
        assert third.end.usage.cached_tokens >= 80


async def test_tenants_share_a_cache_unless_it_is_private(keys: Keys) -> None:
    ours, theirs = keys.make("acme"), keys.make("rival")
    async with guarded(keys) as here:
        await ask(here, ours)
        assert (await ask(here, theirs)).end.usage.cached_tokens >= 80


async def test_a_client_can_split_its_cache_by_a_salt_and_cannot_reach_anothers(
    keys: Keys,
) -> None:
    """Promise: a salt counts within its tenant. Nobody reaches a private cache by guessing what its salts are called."""
    ours, theirs = keys.make("acme", private=True), keys.make("rival")
    async with guarded(keys) as here:
        await ask(here, ours)
        await ask(here, ours, cache_salt="a")
        for key, salt in ((ours, "b"), (theirs, "a"), (theirs, "acme/a"), (theirs, "acme/")):
            answer = await ask(here, key, cache_salt=salt)
            assert answer.end.usage.cached_tokens == 0, salt
        assert (await ask(here, ours, cache_salt="a")).end.usage.cached_tokens >= 80
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            await ask(here, ours, cache_salt="x" * 129)
