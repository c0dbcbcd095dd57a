"""/status: what it tells of requests, workers and sessions while they run, and to whom."""

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.client import AsyncClient, SamplingOptions
from baton.service.access import LOCAL, Caller
from baton.service.keys import TenantLimits, add_key, new_key
from baton.v1 import session_pb2
from router.kserve.v2 import inference_pb2 as kserve
from router.kserve.v2 import inference_pb2_grpc as kserve_grpc
from router.status.activity import MAX_ENDED, MAX_LIVE
from router.status.board import FRESH_S
from router.status.snapshot import (
    SNAPSHOT,
    RequestState,
    RequestStatus,
    StageName,
    StatusSnapshot,
    WorkerState,
)
from tests.integration.http_house import HttpHouse, http_house
from tests.integration.router_fakes import Answer, Cluster, cluster, expected, request
from tests.integration.sim_house import prompt_of

OVER_S = 1.05
"""The present second is told when it is over."""
SPLIT = [StageName.RESERVE, StageName.PREFILL, StageName.HANDOFF, StageName.DECODE]


async def status_of(here: HttpHouse, key: str = "") -> StatusSnapshot:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await here.client.get("/status", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return SNAPSHOT.validate_json(answer.content)


def seen(here: Cluster) -> StatusSnapshot:
    return here.app.board.snapshot(LOCAL)


async def seen_when(here: Cluster, holds: Callable[[RequestStatus], bool]) -> RequestStatus:
    """The first live request, once that holds of it."""

    def now() -> list[RequestStatus]:
        return [each for each in seen(here).requests.live if holds(each)]

    await here.until(lambda: bool(now()))
    return now()[0]


def check_times(told: RequestStatus) -> None:
    """Stages follow one another without a hole; attempts do not overlap."""
    for attempt in told.attempts:
        for earlier, later in pairwise(attempt.stages):
            assert earlier.end_s == later.start_s
    spans = [(a.stages[0].start_s, a.stages[-1].end_s) for a in told.attempts]
    for (_, ended_s), (began_s, _) in pairwise(spans):
        assert ended_s is not None
        assert ended_s <= began_s
    assert 0 <= (told.admitted_s or 0.0) <= (told.placed_s or 0.0)
    assert told.placed_s == spans[0][0]
    assert (spans[-1][1] or 0.0) <= told.age_s


async def test_a_request_is_told_stage_by_stage_while_it_runs_and_after_it() -> None:
    """Promise: queue, reserve, prefill, handoff and decode as they come, and the same timeline once it has ended."""
    reached = asyncio.Event()
    halt = asyncio.Event()

    async def slow(stage: str) -> None:
        if stage == "token":
            reached.set()
            await halt.wait()

    async with cluster() as here:
        await here.prefill("p0", slow)
        await here.decode("d0")
        call = asyncio.create_task(here.generate(request_id="mine", priority=3))
        await reached.wait()
        live = await seen_when(here, lambda r: r.waits_for == "prefill")
        assert (live.request_id, live.state, live.priority) == ("mine", RequestState.RUNNING, 3)
        assert [s.stage for s in live.attempts[0].stages] == SPLIT[:2]
        assert live.attempts[0].stages[-1].end_s is None
        assert (live.first_token_s, live.completion_tokens, live.max_tokens) == (None, 0, 10)
        halt.set()
        await call
        await here.settled()
        status = seen(here)
        assert (status.requests.live, status.requests.running) == ((), 0)
        told = status.requests.ended[0]
        assert (told.state, told.waits_for, told.error) == (RequestState.FINISHED, "", "")
        assert (told.prompt_tokens, told.completion_tokens) == (100, 10)
        attempt = told.attempts[0]
        assert (attempt.prefill_worker, attempt.decode_worker) == ("p0", "d0")
        assert [stage.stage for stage in attempt.stages][-1] is StageName.DECODE
        check_times(told)


async def test_a_failed_attempt_stays_in_the_timeline_with_its_reason() -> None:
    """Promise: who failed and why, and that the next attempt went on after the tokens that were there."""
    died = asyncio.Event()

    async def dies(stage: str) -> None:
        if stage == "token:3" and not died.is_set():
            await seen_when(here, lambda r: r.completion_tokens > 1)
            died.set()
            await first.die()

    async with cluster() as here:
        await here.prefill("p0")
        first = await here.decode("d0", dies)
        call = asyncio.create_task(here.generate())
        await died.wait()
        await here.decode("d1")
        answer = await call
        assert answer.tokens == expected(range(1, 101), 10)
        await here.settled()
        told = seen(here).requests.ended[0]
        before, after = told.attempts
        assert (before.decode_worker, after.decode_worker) == ("d0", "d1")
        assert before.failure.startswith("UNAVAILABLE")
        assert (after.failure, after.resumed_tokens > 0) == ("", True)
        assert told.state is RequestState.FINISHED
        check_times(told)


async def test_every_way_to_end_is_told_apart() -> None:
    """Promise: finished, cancelled, failed by its reason; a refused one is told without what its client wrote."""
    async with cluster(worker_wait_s=0.2) as here:
        with pytest.raises(Exception, match="no worker"):
            await here.generate()
        await here.decode("d0")
        with pytest.raises(Exception, match="min_p"):
            await here.generate(text="swordfish", min_p=7.0, stop=["swordfish"])
        call = here.call(max_tokens=4000)
        await call.read()
        call.cancel()
        await here.settled()
        await here.generate()
        status = seen(here)
        told = [(each.state, each.error) for each in status.requests.ended]
        assert told == [
            (RequestState.FINISHED, ""),
            (RequestState.CANCELLED, "CANCELLED"),
            (RequestState.FAILED, "INVALID_REQUEST"),
            (RequestState.FAILED, "UNAVAILABLE"),
        ]
        assert b"swordfish" not in SNAPSHOT.dump_json(status)


async def test_what_waits_is_queued_and_both_lists_are_bounded() -> None:
    """Promise: counts are true whatever the lists leave out; the lists never grow beyond their bounds."""
    hold = asyncio.Event()

    async def holds(stage: str) -> None:
        if stage.startswith("token"):
            await hold.wait()

    many = MAX_LIVE + 5
    async with cluster(max_running=2, lease_s=10.0) as here:
        await here.decode("d0", holds)
        calls = [asyncio.create_task(here.generate(max_tokens=1)) for _ in range(many)]
        await here.until(lambda: seen(here).requests.queued == many - 2)
        requests = seen(here).requests
        assert (requests.running, len(requests.live)) == (2, MAX_LIVE)
        assert requests.live[-1].state is RequestState.QUEUED
        assert requests.live[-1].waits_for == "admission"
        hold.set()
        await asyncio.gather(*calls)
        assert len(seen(here).requests.ended) == MAX_ENDED


async def test_a_request_keeps_its_serial_number_and_shares_it_with_none() -> None:
    """Promise: whatever its id, in order of receipt, live and ended alike."""
    hold = asyncio.Event()

    async def holds(stage: str) -> None:
        if stage.startswith("token"):
            await hold.wait()

    async with cluster(lease_s=10.0) as here:
        await here.decode("d0", holds)
        calls = [asyncio.create_task(here.generate(max_tokens=1)) for _ in range(3)]
        await here.until(lambda: seen(here).requests.running == 3)
        live = seen(here).requests.live
        assert [each.serial for each in live] == [1, 2, 3]
        with pytest.raises(Exception, match="min_p"):
            await here.generate(min_p=7.0)
        hold.set()
        await asyncio.gather(*calls)
        await here.settled()
        told = {each.serial: each.request_id for each in seen(here).requests.ended}
        assert told == {each.serial: each.request_id for each in live} | {4: ""}


async def test_workers_are_told_with_their_load_and_their_state() -> None:
    async with cluster() as here:
        worker = await here.decode("d0")
        assert seen(here).fleet is not None

        def told() -> Any:
            fleet = seen(here).fleet
            assert fleet is not None
            return fleet[0]

        worker.draining = True
        await here.until(lambda: told().state is WorkerState.DRAINING)
        worker.draining = False
        await here.until(lambda: told().state is WorkerState.READY)
        worker.frozen = True
        await here.until(lambda: told().state is WorkerState.SILENT)
        worker.frozen = False
        kv = told().kv
        assert (kv.total, kv.free, told().worker_id) == (512, 512, "d0")
        assert 0 < told().heard_s < told().member_s


async def test_traffic_and_several_completions_are_told() -> None:
    """Promise: first tokens, gaps, output tokens and handed bytes are those of what ran."""
    async with http_house(1, 1) as here:
        sampling = SamplingOptions(max_tokens=12, ignore_eos=True, n=3)
        async with AsyncClient(f"127.0.0.1:{here.house.app.port}") as client:
            await client.complete(prompt_of(1), sampling=sampling)
        await asyncio.sleep(OVER_S)
        status = await status_of(here)
        traffic = status.traffic
        assert traffic.ttft.count == 1
        assert sum(traffic.completion_tokens.series_per_s) == 36
        assert sum(traffic.prompt_tokens.series_per_s) == 90
        ended = status.requests.ended[0]
        handed = sum(attempt.handoff_bytes for attempt in ended.attempts)
        assert sum(traffic.handoff_bytes.series_per_s) == handed > 0
        assert {attempt.choice for attempt in ended.attempts} == {0, 1, 2}


async def test_sessions_are_told_with_their_turns() -> None:
    async with http_house(1, 1) as here:
        created = await here.house.sessions.Create(session_pb2.SessionServiceCreateRequest())
        session_id = created.session.session_id
        for number in (1, 2):
            await here.house.generate(number, session_id=session_id)
        status = await status_of(here)
        (session,) = status.sessions.recent
        assert (session.session_id, session.turns, session.generating) == (session_id, 2, False)
        assert session.history_tokens == 2 * (90 + 12)
        assert session.cached_tokens > 0
        assert {each.session_id for each in status.requests.ended} == {session_id}
        await here.house.sessions.Close(
            session_pb2.SessionServiceCloseRequest(session_id=session_id)
        )
        assert here.house.app.board.snapshot(LOCAL).sessions.recent == ()


class Keys:
    """A keys file with two tenants and an administrator."""

    def __init__(self, directory: Path) -> None:
        self.file = str(directory / "keys.json")
        self.acme = self._make("acme")
        self.bolt = self._make("bolt")
        self.admin = self._make("ops", is_admin=True)

    def _make(self, tenant: str, *, is_admin: bool = False) -> str:
        entry, key = new_key(tenant, limits=TenantLimits(), is_admin=is_admin)
        add_key(self.file, entry)
        return key


async def ask(here: HttpHouse, key: str, **changes: Any) -> Answer:
    answer = Answer()
    message = request(prompt=prompt_of(5), **({"max_tokens": 12, "ignore_eos": True} | changes))
    metadata = (("authorization", f"Bearer {key}"),)
    async for response in here.house.inference.Generate(message, timeout=20, metadata=metadata):
        answer.add(response)
    return answer


async def test_a_tenant_sees_its_own_and_an_administrator_everything(tmp_path: Path) -> None:
    """Promise: nothing of another tenant's, in no part of the snapshot, and no workers; no snapshot at all without a key."""
    keys = Keys(tmp_path)
    async with http_house(1, 1, api_keys_file=keys.file, fleet_listen="127.0.0.1:0") as here:
        assert (await here.client.get("/status")).status_code == 401
        create = session_pb2.SessionServiceCreateRequest()
        metadata = (("authorization", f"Bearer {keys.bolt}"),)
        created = await here.house.sessions.Create(create, metadata=metadata)
        await ask(here, keys.acme, request_id="acme-1")
        await ask(here, keys.bolt, request_id="bolt-1", session_id=created.session.session_id)
        await asyncio.sleep(OVER_S)
        acme, bolt, all_of_it = [
            await status_of(here, key) for key in (keys.acme, keys.bolt, keys.admin)
        ]
        assert [r.request_id for r in acme.requests.ended] == ["acme-1"]
        assert [r.request_id for r in bolt.requests.ended] == ["bolt-1"]
        assert [r.request_id for r in all_of_it.requests.ended] == ["bolt-1", "acme-1"]
        # Serial numbers tell a tenant nothing of others' requests.
        assert [r.serial for r in bolt.requests.ended] == [1]
        assert [r.serial for r in all_of_it.requests.ended] == [2, 1]
        assert "bolt" not in SNAPSHOT.dump_json(acme).decode()
        assert (acme.fleet, acme.tenant, acme.sessions.recent) == (None, "acme", ())
        assert (acme.sessions.idle, acme.traffic.ttft.count) == (None, 1)
        assert [s.tenant for s in bolt.sessions.recent] == ["bolt"]
        assert (all_of_it.tenant, all_of_it.traffic.ttft.count) == (None, 2)
        assert all_of_it.fleet is not None
        assert len(all_of_it.fleet) == 2
        page = await here.client.get("/")
        assert page.status_code == 200


async def test_what_a_front_refuses_is_told_with_its_id_to_its_tenant(tmp_path: Path) -> None:
    """Promise: whichever protocol could not read it."""
    keys = Keys(tmp_path)
    bearer = f"Bearer {keys.acme}"
    async with http_house(0, 0, api_keys_file=keys.file, fleet_listen="127.0.0.1:0") as here:
        headers = {"authorization": bearer, "x-request-id": "mine"}
        answer = await here.client.post("/v1/completions", headers=headers, json={"prompt": {}})
        assert answer.status_code == 400
        async with grpc.aio.insecure_channel(f"127.0.0.1:{here.house.app.port}") as channel:
            stub = kserve_grpc.GRPCInferenceServiceStub(channel)
            infer = stub.ModelInfer(
                kserve.ModelInferRequest(id="also-mine"), metadata=(("authorization", bearer),)
            )
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await infer
        told = (await status_of(here, keys.acme)).requests.ended
        assert [each.request_id.partition(".")[0] for each in told] == ["also-mine", "mine"]
        assert {(each.tenant, each.error) for each in told} == {("acme", "INVALID_REQUEST")}
        assert (await status_of(here, keys.bolt)).requests.ended == ()


async def test_many_who_watch_cost_as_much_as_one_and_nobody_gets_anothers_view() -> None:
    """Promise: within `FRESH_S` the same view is made once; views are kept no longer than that."""
    async with cluster() as here:
        board, acme = here.app.board, Caller(tenant="acme")
        first = board.json(LOCAL)
        assert board.json(LOCAL) is first
        own = SNAPSHOT.validate_json(board.json(acme))
        assert (own.tenant, own.fleet) == ("acme", None)
        await asyncio.sleep(FRESH_S)
        assert board.json(LOCAL) is not first
        assert board._fresh.keys() == {None}


async def test_the_schema_describes_every_field() -> None:
    """Promise: OpenAPI holds the snapshot's schema, each field with its meaning where its name does not say it all."""
    async with http_house(0, 0) as here:
        schema = (await here.client.get("/openapi.json")).json()
        answer = schema["paths"]["/status"]["get"]["responses"]["200"]["content"]
        assert answer["application/json"]["schema"]["$ref"].endswith("/StatusSnapshot")
        schemas = schema["components"]["schemas"]
        assert schemas["KvBlocks"]["properties"]["reserved"]["description"].startswith("Held for")
        body = (await here.client.get("/status")).json()
        assert body.keys() == schemas["StatusSnapshot"]["properties"].keys()
        assert "/page/app.js" not in json.dumps(schema)


async def test_the_page_may_load_nothing_from_elsewhere_and_is_not_sent_twice() -> None:
    """Promise: a policy without any `unsafe`, no type sniffing, no framing; 304 while a file is the same."""
    async with http_house(0, 0) as here:
        for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
            answer = await here.client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "http://" not in answer.text.replace("http://www.w3.org/", "")
            assert "https://" not in answer.text
            etag = {"if-none-match": answer.headers["etag"]}
            again = await here.client.get(path, headers=etag)
            assert (again.status_code, again.content) == (304, b"")
        assert (await here.client.get("/page/../app.py")).status_code == 404
        assert (await here.client.get("/page/index.html")).status_code == 404
