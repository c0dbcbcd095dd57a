"""How long one router takes to place a request in a large fleet: the real `Fleet` with its registry, 8,600-token prompts, caches that
hold shared prefixes, heartbeats between the placements, and claims that come and go.

    python -m benchmarks.placement_scale --workers 500 --output benchmarks/results/placement_scale.json
"""

import argparse
import asyncio
import random
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from baton.kv.prefix import SequenceHashes, block_hashes
from baton.service.metrics import RouterMetrics
from baton.service.settings import PlacementPolicy, RouterSettings
from baton.types import BlockHash, PrefixDelta, Role, WorkerLoad
from benchmarks.placement_sim import worker_info
from benchmarks.report import write_report
from router.fleet import Fleet
from router.members import Member
from router.placement import Placement
from router.policies import policy_of

PROMPT_TOKENS = 8600
BLOCK_TOKENS = 16
SHARED_TOKENS = 4096
"""Each prompt begins with one of a few system prompts of this length."""
SYSTEM_PROMPTS = 8
SESSIONS = 200
HEARTBEAT_S = 0.5


async def measure(
    workers: int, placements: int, policy: PlacementPolicy, *, rate_per_s: float
) -> dict[str, list[float]]:
    """Seconds of each placement and of each heartbeat. A heartbeat of every worker falls into each half second of requests. `place_cpu`
    leaves out what other processes of a busy machine take.
    """
    rng = random.Random(1)
    fleet = Fleet(RouterSettings(), policy_of(policy, local_prefill_tokens=32), RouterMetrics())
    members = [
        fleet.join(worker_info(role, number, node=f"node-{number // 4}", block_tokens=BLOCK_TOKENS))
        for role in Role
        for number in range(workers // 2)
    ]
    systems = [[rng.randrange(50_000) for _ in range(SHARED_TOKENS)] for _ in range(SYSTEM_PROMPTS)]
    sessions = [
        rng.choice(systems) + [rng.randrange(50_000) for _ in range(PROMPT_TOKENS - SHARED_TOKENS)]
        for _ in range(SESSIONS)
    ]
    for member in members:
        stored = [h for s in systems for h in block_hashes(s, BLOCK_TOKENS)]
        for session in rng.sample(sessions, 4):
            stored += block_hashes(session, BLOCK_TOKENS)
        fleet.heartbeat(member, _load(rng), PrefixDelta(stored=tuple(stored)), draining=False)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("hash", "place", "place_cpu", "heartbeat")
    }
    beats = workers / HEARTBEAT_S / rate_per_s
    due, turn = 0.0, 0
    with ExitStack() as held:
        for number in range(placements):
            due += beats
            while due >= 1:
                due, turn = due - 1, turn + 1
                began_s = time.perf_counter()
                _beat(fleet, members[turn % workers], rng)
                seconds["heartbeat"].append(time.perf_counter() - began_s)
            prompt = tuple(rng.choice(sessions))
            began_s = time.perf_counter()
            hashes = SequenceHashes(prompt)
            hashes.of(BLOCK_TOKENS)
            hashed_s = time.perf_counter()
            cpu_s = time.thread_time()
            placement = fleet.place(hashes)
            seconds["place_cpu"].append(time.thread_time() - cpu_s)
            seconds["place"].append(time.perf_counter() - hashed_s)
            seconds["hash"].append(hashed_s - began_s)
            assert isinstance(placement, Placement)
            held.callback(fleet.hold(placement, PROMPT_TOKENS).release)
            if number % 500 == 0:
                held.close()
    await fleet.close()
    return seconds


def _beat(fleet: Fleet, member: Member, rng: random.Random) -> None:
    new = PrefixDelta(stored=tuple(BlockHash(rng.getrandbits(64)) for _ in range(200)))
    fleet.heartbeat(member, _load(rng), new, draining=False)


def _load(rng: random.Random) -> WorkerLoad:
    return WorkerLoad(
        running_requests=rng.randrange(40),
        queued_prefill_tokens=rng.randrange(20_000),
        free_blocks=rng.randrange(5000),
        cached_blocks=5000,
        prefill_tokens_per_s=rng.uniform(8_000, 12_000),
        decode_step_s=rng.uniform(0.02, 0.04),
    )


def main() -> None:
    """Prints the percentiles, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--placements", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    summary: dict[str, object] = {}
    for policy in PlacementPolicy:
        seconds = asyncio.run(
            measure(given.workers, given.placements, policy, rate_per_s=given.rate)
        )
        figures = {
            f"{name}_p{q}_ms": round(float(np.percentile(values, q)) * 1e3, 3)
            for name, values in seconds.items()
            for q in (50, 99)
        }
        summary[policy.value] = figures
        print(f"{policy.value:14}", "  ".join(f"{k} {v}" for k, v in figures.items()))
    if given.output is not None:
        settings = {"workers": given.workers, "placements": given.placements, "rate": given.rate}
        write_report(given.output, settings=settings, raw={}, summary=summary)


if __name__ == "__main__":
    main()
