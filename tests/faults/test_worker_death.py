"""Real processes, the real model, the real object store: workers are killed under load, clients vanish and cancel.

One fleet of two prefill and two decode workers serves the whole module; `baton serve` replaces those that are killed.
"""

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

from baton.client import AsyncClient, Client, Result, SamplingOptions
from baton.errors import BatonError
from baton.types import Role, WorkerInfo
from tests.faults.probes import blocks_at_rest
from tests.served import Served, served, until

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(240)]

GREEDY = SamplingOptions(max_tokens=160, temperature=0.0, ignore_eos=True)
WARM = SamplingOptions(
    max_tokens=160,
    temperature=0.9,
    top_p=0.95,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    logit_bias={40: 1.0},
    seed=77,
    ignore_eos=True,
)


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and what an undisturbed fleet answers."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    token_ids: tuple[int, ...]
    text: str


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ["--prefill", "2", "--decode", "2", "--kv-tokens", "16384", "--threads", "1"]
    # Small chunks, so that a prompt takes many steps and a kill can come between them.
    with served(tmp_path_factory.mktemp("fleet"), *flags, "--max-batch-tokens", "64") as running:
        yield running


@pytest.fixture(scope="module")
def cases(fleet: Served) -> list[Case]:
    """Long and short prompts, greedy and sampled, answered while nothing is wrong."""
    rng = random.Random(1)
    found = []
    with Client(fleet.address) as client:
        vocab_size = client.model().vocab_size
        for number, length in enumerate((40, 90, 200, 350, 600, 900)):
            prompt = tuple(rng.randrange(10, vocab_size) for _ in range(length))
            sampling = WARM if number % 2 else GREEDY
            result = client.complete(prompt, sampling=sampling)
            assert len(result.token_ids) == 160
            found.append(Case(prompt, sampling, result.token_ids, result.text))
    return found


def until_whole(fleet: Served) -> None:
    """Waits until every death was noticed and made up for."""

    def all_alive() -> bool:
        workers, processes = fleet.workers(), fleet.processes()
        return len(workers) == 4 and all(w.pid in processes for w in workers)

    until(all_alive, 60, "the fleet is whole", fleet.output)


@pytest.fixture
def whole(fleet: Served) -> Served:
    """The fleet with all of its members, whatever the test before this one has killed."""
    until_whole(fleet)
    return fleet


async def ask(client: AsyncClient, case: Case) -> Result:
    result = await client.complete(case.prompt, sampling=case.sampling, timeout_s=60)
    assert result.token_ids == case.token_ids, "the stream differs from the undisturbed one"
    assert result.text == case.text
    return result


async def ask_all_while_killing(
    fleet: Served, cases: list[Case], victim: WorkerInfo, after_s: float
) -> list[Result]:
    async with AsyncClient(fleet.address) as client:
        tasks = [asyncio.create_task(ask(client, case)) for case in cases * 2]
        await asyncio.sleep(after_s)
        fleet.kill(victim)
        return await asyncio.gather(*tasks)


def assert_pools_rest(fleet: Served) -> None:
    workers = fleet.workers()
    until(lambda: all(blocks_at_rest(w) for w in workers), 2, "both pools are at their baseline")


@pytest.mark.parametrize("role", [Role.DECODE, Role.PREFILL])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_worker_costs_no_stream_a_token(
    whole: Served, cases: list[Case], role: Role, seed: int
) -> None:
    """Promise: SIGKILL of a prefill or decode worker at any instant, under load: every stream goes on with the same tokens."""
    rng = random.Random(f"{role}{seed}")
    victim = rng.choice(whole.workers(role))
    results = asyncio.run(ask_all_while_killing(whole, cases, victim, rng.uniform(0.05, 0.6)))
    failed = [a for r in results for a in r.attempts[:-1]]
    others = [a for a in failed if victim.worker_id not in (a.prefill_worker, a.decode_worker)]
    assert not others, f"{victim.worker_id} was killed\n{whole.output()}"
    until_whole(whole)
    assert_pools_rest(whole)


def test_a_prefill_worker_killed_right_after_the_first_token_costs_nothing(
    whole: Served, cases: list[Case]
) -> None:
    """Promise: the same during the handoff, when the client has one token and decode may have no KV yet."""
    case = cases[-1]

    async def run() -> list[int]:
        tokens: list[int] = []
        async with (
            AsyncClient(whole.address) as client,
            client.generate(case.prompt, sampling=case.sampling, timeout_s=60) as stream,
        ):
            async for chunk in stream:
                if not tokens:
                    for worker in whole.workers(Role.PREFILL):
                        whole.kill(worker)
                tokens += chunk.token_ids
        return tokens

    assert tuple(asyncio.run(run())) == case.token_ids


def test_both_roles_killed_at_once_cost_no_stream_a_token(whole: Served, cases: list[Case]) -> None:
    """Promise: one worker of each role dies in the same instant; the others take over."""
    prefill, decode = whole.workers(Role.PREFILL)[0], whole.workers(Role.DECODE)[0]

    async def run() -> None:
        async with AsyncClient(whole.address) as client:
            tasks = [asyncio.create_task(ask(client, case)) for case in cases]
            await asyncio.sleep(0.2)
            whole.kill(prefill)
            whole.kill(decode)
            await asyncio.gather(*tasks)

    asyncio.run(run())


def test_300_cancellations_at_random_instants_strand_no_block(
    whole: Served, cases: list[Case]
) -> None:
    """Promise: both pools are back at their baseline within 2 s of a storm of cancellations."""
    rng = random.Random(9)

    async def doomed(client: AsyncClient, case: Case) -> None:
        task = asyncio.create_task(client.complete(case.prompt, sampling=case.sampling))
        await asyncio.sleep(rng.random() * 0.5)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def storm() -> None:
        async with AsyncClient(whole.address) as client:
            for _ in range(10):
                await asyncio.gather(*(doomed(client, rng.choice(cases)) for _ in range(30)))

    asyncio.run(storm())
    assert_pools_rest(whole)


@pytest.mark.parametrize("timeout_s", [0.005, 0.05, 0.2])
def test_a_deadline_that_passes_in_any_stage_frees_everything(
    whole: Served, cases: list[Case], timeout_s: float
) -> None:
    """Promise: a deadline ends a request with a typed status, and no block stays held."""

    async def run() -> list[BaseException | Result]:
        async with AsyncClient(whole.address) as client:
            calls = [
                client.complete(c.prompt, sampling=c.sampling, timeout_s=timeout_s)
                for c in cases * 3
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(run())
    reasons = {o.reason for o in outcomes if isinstance(o, BatonError)}
    # Admission refuses at once what it sees cannot make it.
    assert reasons <= {"DEADLINE_EXCEEDED", "NO_CAPACITY"}
    assert all(isinstance(o, BatonError | Result) for o in outcomes), outcomes
    if timeout_s < 0.1:
        assert reasons, "some cannot make it"
    assert_pools_rest(whole)


def test_a_client_process_that_is_killed_frees_everything(whole: Served) -> None:
    """Promise: a client that vanishes without a word frees its requests on both sides."""
    program = (
        "from baton.client import Client, SamplingOptions\n"
        f"client = Client({whole.address!r})\n"
        "streams = [client.generate(list(range(20, 500)), sampling=SamplingOptions(max_tokens=1000, "
        "temperature=0.0, ignore_eos=True)) for _ in range(6)]\n"
        "next(iter(streams[0]))\n"
        "print('streaming', flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"streaming\n"
        client.send_signal(signal.SIGKILL)
    assert_pools_rest(whole)


def test_a_stopped_worker_delays_its_streams_by_a_lease_and_costs_no_token(
    whole: Served, cases: list[Case]
) -> None:
    """Promise: a worker that hangs (SIGSTOP) is an error in bounded time: its streams go on elsewhere."""
    victim = whole.workers(Role.DECODE)[0]
    began_s = time.monotonic()
    try:

        async def run() -> None:
            async with AsyncClient(whole.address) as client:
                tasks = [asyncio.create_task(ask(client, case)) for case in cases]
                await asyncio.sleep(0.1)
                whole.kill(victim, signal.SIGSTOP)
                await asyncio.gather(*tasks)

        asyncio.run(run())
        assert time.monotonic() - began_s < 20
    finally:
        whole.kill(victim, signal.SIGKILL)
