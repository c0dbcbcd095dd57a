"""Real processes, the real model, the real object store: workers turn from one role to the other while clients are answered."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import grpc
import pytest

from baton.client import AsyncClient, Client, SamplingOptions
from baton.codec import load_from_proto, role_to_proto
from baton.types import Role, WorkerInfo
from baton.v1 import worker_pb2, worker_pb2_grpc
from tests.faults.roles import set_role
from tests.served import Served, served, until

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(240)]

PREFILL, DECODE = Role.PREFILL, Role.DECODE


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and what an undisturbed fleet answers."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    token_ids: tuple[int, ...]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ["--prefill", "2", "--decode", "2", "--kv-tokens", "16384", "--threads", "1"]
    with served(tmp_path_factory.mktemp("fleet"), *flags, "--max-batch-tokens", "64") as running:
        yield running


@pytest.fixture(scope="module")
def cases(fleet: Served) -> list[Case]:
    rng = random.Random(4)
    found = []
    with Client(fleet.address) as client:
        vocab_size = client.model().vocab_size
        for number, length in enumerate((50, 120, 300, 600)):
            prompt = tuple(rng.randrange(10, vocab_size) for _ in range(length))
            sampling = SamplingOptions(
                max_tokens=60, temperature=0.8 * (number % 2), seed=number, ignore_eos=True
            )
            result = client.complete(prompt, sampling=sampling)
            found.append(Case(prompt, sampling, result.token_ids))
    return found


def member(fleet: Served, worker_id: str) -> WorkerInfo:
    return next(w for w in fleet.workers() if w.worker_id == worker_id)


def until_known(fleet: Served, worker: WorkerInfo) -> None:
    until(lambda: member(fleet, worker.worker_id) == worker, 5, "the router knows the role")


async def turn(worker: WorkerInfo, role: Role, drain_timeout_s: float) -> None:
    answer = await set_role(worker.address, role, drain_timeout_s)
    assert answer.previous_role == role_to_proto(worker.role)
    assert answer.info.role == role_to_proto(role)


async def ask_until(stop: asyncio.Event, client: AsyncClient, cases: list[Case]) -> int:
    """Returns how many answers came; each was right, and no attempt failed: it may move on, with its KV."""
    asked = 0
    while not stop.is_set():
        for case in cases:
            result = await client.complete(case.prompt, sampling=case.sampling, timeout_s=60)
            assert result.token_ids == case.token_ids, "the stream differs from the undisturbed one"
            moved = [attempt.failure for attempt in result.attempts[:-1]]
            assert all(why.startswith("DRAINING") for why in moved), "a role change cost an attempt"
            asked += 1
    return asked


def at_rest(worker: WorkerInfo) -> bool:
    with grpc.insecure_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=5)
    load = load_from_proto(status.load)
    return (
        status.running_calls == load.running_requests == load.waiting_requests == 0
        and load.free_blocks + load.cached_blocks == worker.num_blocks
    )


def assert_pools_rest(fleet: Served) -> None:
    workers = fleet.workers()
    assert len(workers) == 4
    until(lambda: all(at_rest(worker) for worker in workers), 2, "every pool is at its baseline")


@pytest.mark.parametrize("drain_timeout_s", [10.0, 0.0])
def test_roles_change_back_and_forth_under_load_without_a_trace(
    fleet: Served, cases: list[Case], drain_timeout_s: float
) -> None:
    """Promise: role changes back and forth lose no request, change no token, fail no attempt and leave the pools at rest; also where the
    new role is announced while calls of the old one run.
    """

    async def run() -> None:
        stop = asyncio.Event()
        async with AsyncClient(fleet.address) as client:
            asking = [asyncio.create_task(ask_until(stop, client, cases)) for _ in range(4)]
            for name, role in (
                ("prefill-1", DECODE),
                ("decode-0", PREFILL),
                ("prefill-1", PREFILL),
                ("decode-0", DECODE),
            ):
                worker = await asyncio.to_thread(member, fleet, name)
                await turn(worker, role, drain_timeout_s)
                await asyncio.to_thread(until_known, fleet, replace(worker, role=role))
            stop.set()
            assert min(await asyncio.gather(*asking)) > 0

    asyncio.run(run())
    assert_pools_rest(fleet)


def test_both_roles_are_answered_by_workers_that_turned(fleet: Served, cases: list[Case]) -> None:
    """Promise: workers that all do what they were not started for give the same tokens, over the real transport."""

    async def swap(prefills: tuple[str, str], decodes: tuple[str, str]) -> None:
        for first, second in zip(prefills, decodes, strict=True):
            for name, role in ((first, DECODE), (second, PREFILL)):
                worker = await asyncio.to_thread(member, fleet, name)
                await turn(worker, role, 10.0)
                await asyncio.to_thread(until_known, fleet, replace(worker, role=role))

    asyncio.run(swap(("prefill-0", "prefill-1"), ("decode-0", "decode-1")))
    with Client(fleet.address) as client:
        for case in cases:
            prompt = (*reversed(case.prompt), *case.prompt)
            first = client.complete(prompt, sampling=case.sampling)
            assert first.attempts[-1].prefill_worker.startswith("decode-")
            assert first.attempts[-1].decode_worker.startswith("prefill-")
            again = client.complete(case.prompt, sampling=case.sampling)
            assert again.token_ids == case.token_ids
    asyncio.run(swap(("decode-0", "decode-1"), ("prefill-0", "prefill-1")))
    assert_pools_rest(fleet)


def baton(fleet: Served, *arguments: str) -> str:
    command = [sys.executable, "-m", "baton", "fleet", "--address", fleet.address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return f"{done.returncode}: {done.stdout}{done.stderr}"


def test_an_operator_lists_and_turns_workers_from_the_command_line(fleet: Served) -> None:
    """Promise: `baton fleet` shows every worker and turns one, and does not take a role's last worker unasked."""
    listing = baton(fleet)
    assert all(f"{role}-{n}" in listing for role in ("prefill", "decode") for n in range(2))
    assert listing.count("ready") == 4
    assert baton(fleet, "set-role", "prefill-1", "decode") == "0: prefill-1: prefill -> decode\n"
    assert "the last prefill worker" in baton(fleet, "set-role", "prefill-0", "decode")
    until(lambda: member(fleet, "prefill-1").role is DECODE, 5, "the router knows the role")
    assert baton(fleet, "set-role", "prefill-1", "prefill") == "0: prefill-1: decode -> prefill\n"
    assert baton(fleet, "set-role", "nobody", "decode").startswith("2: ")


def test_a_stopped_actor_is_out_after_its_lease_and_back_when_it_goes_on(
    fleet: Served, cases: list[Case]
) -> None:
    """Promise: a process that is stopped cannot tell its health, but the router's view does: it is no member after its lease, requests
    go elsewhere, and one that goes on is a member again.
    """
    victim = member(fleet, "prefill-0")
    fleet.kill(victim, signal.SIGSTOP)
    try:
        until(lambda: len(fleet.workers()) == 3, 10, "it is out after its lease")
        with Client(fleet.address) as client:
            case = cases[2]
            result = client.complete(case.prompt, sampling=case.sampling)
        assert result.token_ids == case.token_ids
        assert len(result.attempts) == 1
    finally:
        fleet.kill(victim, signal.SIGCONT)
    until(lambda: len(fleet.workers()) == 4, 20, "it is back")
