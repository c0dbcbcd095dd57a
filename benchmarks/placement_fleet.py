"""The replays of `benchmarks.placement` on a real fleet, in slow motion: a router and 8 prefill and 8 decode workers as they are
shipped, in two processes, with simulated engines that take as long as the workers of the replays in virtual time; clients go on with
what was really answered. Both are told side by side: how far virtual time can be believed. Engines, arrivals and pauses take `SLOW`
times as long, since two cores run all of it, and what is measured is divided by that. Takes about a quarter of an hour.

    python -m benchmarks.placement_fleet --output benchmarks/results/placement_fleet.json

KV is handed over within a process, which costs next to nothing, and placement sees one node; in virtual time there are several. A
session's turn waits for the one before it; in virtual time it does not.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt

from baton.service.settings import PlacementPolicy
from baton.v1 import common_pb2, inference_pb2
from benchmarks.placement import (
    DECODE,
    HEADLINE_PER_S,
    PREFILL,
    REPLAYED,
    Figures,
    figures_of,
)
from benchmarks.placement_sim import BLOCK_TOKENS, SimFleet, Speeds, TraceRequest
from benchmarks.placement_traces import AGENT, CONVERSATION, Shape, owner_of, trace
from benchmarks.report import write_report
from benchmarks.router_load import CHANNEL_OPTIONS, GENERATE, running_router, running_workers
from router.policies import policy_of

VOCAB = 50_000
MAX_CONTEXT_TOKENS = 200_000
CHUNK_TOKENS = 2048
CHANNELS = 4
LOCAL_TOKENS = 32
SLOW = 2.0
SHORT_S = 0.005
"""A shorter wait is none."""


@dataclass(slots=True)
class Played:
    """One request of a replay, and what became of it."""

    request: TraceRequest
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    cached_tokens: int = 0
    """Found in a cache, on either side."""
    waited_s: float = 0.0
    """For its session's turn before; no part of the time to its first token."""


@dataclass(slots=True)
class Conversation:
    """What has been said in one session; its turns follow one another."""

    said: list[int] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Clients:
    """Ask what the trace asks, when it does."""

    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        self._calls = [
            channel.unary_stream(
                GENERATE,
                request_serializer=inference_pb2.GenerateRequest.SerializeToString,
                response_deserializer=inference_pb2.GenerateResponse.FromString,
            )
            for channel in channels
        ]
        self._sessions: dict[int, Conversation] = {}

    async def play(self, requests: list[TraceRequest]) -> list[Played]:
        """Returns once all are answered. Raises what any fails with."""
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for number, request in enumerate(requests):
                await asyncio.sleep(began_s + SLOW * request.at_s - time.monotonic())
                tasks.append(group.create_task(self._ask(number, request)))
        return [task.result() for task in tasks]

    async def _ask(self, number: int, request: TraceRequest) -> Played:
        session = self._sessions.setdefault(owner_of(request.whole[-1]), Conversation())
        arrived_s = time.monotonic()
        async with session.turn:
            waited_s = time.monotonic() - arrived_s
            prompt = _prompt(request, session.said)
            played, answer = await self._generate(number, request, prompt)
            session.said = prompt + answer
        played.waited_s = waited_s / SLOW
        return played

    async def _generate(
        self, number: int, request: TraceRequest, prompt: list[int]
    ) -> tuple[Played, list[int]]:
        asked = inference_pb2.GenerateRequest(
            tokens=common_pb2.TokenIds(ids=prompt),
            sampling=common_pb2.SamplingParams(
                max_tokens=request.output_tokens, temperature=0, seed=1, ignore_eos=True
            ),
        )
        began_s = first_s = last_s = time.monotonic()
        played = Played(request)
        answer: list[int] = []
        async for response in self._calls[number % len(self._calls)](asked, timeout=300):
            match response.WhichOneof("event"):
                case "chunk":
                    last_s = time.monotonic()
                    first_s = last_s if not answer else first_s
                    answer += response.chunk.tokens.token_ids
                case "finished":
                    played.cached_tokens = response.finished.usage.cached_tokens
        assert len(answer) == request.output_tokens
        played.ttft_s = (first_s - began_s) / SLOW
        played.tpot_s = (last_s - first_s) / SLOW / max(1, len(answer) - 1)
        return played, answer


def _prompt(request: TraceRequest, said: list[int]) -> list[int]:
    """What was said before and what is new; or, where nothing was, the shared beginning and what is the session's own."""
    prompt = said[: request.prompt_tokens]
    while len(prompt) < request.prompt_tokens:
        index, offset = divmod(len(prompt), BLOCK_TOKENS)
        owner = owner_of(request.whole[min(index, len(request.whole) - 1)])
        prompt += _block(owner, index)[offset:].tolist()
    return prompt[: request.prompt_tokens]


def _block(owner: int, index: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((owner, index)).integers(1, VOCAB, BLOCK_TOKENS)


def engine_settings(speeds: Speeds) -> dict[str, str]:
    """Flags of `benchmarks.processes.many_workers`: simulated engines of those speeds."""
    both = {
        "vocab_size": VOCAB,
        "block_size_tokens": BLOCK_TOKENS,
        "num_blocks": speeds.pool_tokens // BLOCK_TOKENS,
        "max_context_tokens": MAX_CONTEXT_TOKENS,
        "max_batch_tokens": CHUNK_TOKENS,
    }
    prefill = both | {"token_s": SLOW / speeds.prefill_tokens_per_s}
    # The first request's share is in the step.
    step_s = speeds.step_s - speeds.step_per_request_s
    decode = both | {"step_s": SLOW * step_s, "token_s": SLOW * speeds.step_per_request_s}
    return {"prefill_sim": json.dumps(prefill), "decode_sim": json.dumps(decode)}


def replay_in_virtual_time(policy: PlacementPolicy, played: list[TraceRequest]) -> Figures:
    """As `benchmarks.placement`, but for what counts as found in a cache."""
    fleet = SimFleet(
        policy_of(policy, local_prefill_tokens=LOCAL_TOKENS),
        prefill=PREFILL,
        decode=DECODE,
        speeds=Speeds(),
    )
    outcomes = [
        Played(
            each.request,
            each.ttft_s,
            each.tpot_s,
            max(each.cached_tokens, BLOCK_TOKENS * each.skip_blocks),
        )
        for each in fleet.play(played)
    ]
    return figures_of(outcomes, played)


def replay_on_fleet(policy: PlacementPolicy, played: list[TraceRequest]) -> Figures:
    """On real processes."""

    async def play(address: str) -> list[Played]:
        channels = [
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(CHANNELS)
        ]
        outcomes = await Clients(channels).play(played)
        await asyncio.gather(*(channel.close(None) for channel in channels))
        return outcomes

    with (
        running_router(
            max_running=4096, local_prefill_tokens=LOCAL_TOKENS, placement=policy.value
        ) as router,
        running_workers(
            router, kind="sim", prefill=PREFILL, decode=DECODE, **engine_settings(Speeds())
        ) as workers,
    ):
        processes, began_s = {"router": router, "workers": workers}, time.monotonic()
        before_s = {name: each.cpu_s for name, each in processes.items()}
        outcomes = asyncio.run(play(router.address))
        wall_s = time.monotonic() - began_s
        busy = {
            f"{name}_utilisation": (each.cpu_s - before_s[name]) / wall_s
            for name, each in processes.items()
        }
    waited = [each.waited_s for each in outcomes if each.waited_s > SHORT_S]
    turns = {"turns_that_waited": float(len(waited)), "longest_wait_s": max(waited, default=0.0)}
    return figures_of(outcomes, played) | busy | turns


def _print_table(shape: Shape, rate: float, kinds: Mapping[str, Mapping[str, Figures]]) -> None:
    print(f"\n{shape.name}, {rate:g} requests a second")
    columns = ("goodput_per_s", "ttft_p50_s", "ttft_p90_s", "tpot_p90_s", "prefix_hit_share")
    print(f"| {'policy':14} | time    | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for policy, by_kind in kinds.items():
        for kind, values in by_kind.items():
            row = " | ".join(f"{values[c]:{len(c)}.3f}" for c in columns)
            print(f"| {policy:14} | {kind:7} | {row} |", flush=True)


def main() -> None:
    """Prints the tables, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=400, help="of each replay")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual rates")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, Figures]]] = {}
    rates = {name: given.share * rate for name, rate in HEADLINE_PER_S.items()}
    for shape in (CONVERSATION, AGENT):
        rate = rates[shape.name]
        played = trace(shape, requests=given.requests, rate_per_s=rate)
        results[shape.name] = {
            policy.value: {
                "virtual": replay_in_virtual_time(policy, played),
                "real": replay_on_fleet(policy, played),
            }
            for policy in PlacementPolicy
        }
        _print_table(shape, rate, results[shape.name])
    if given.output is not None:
        settings = REPLAYED | {
            "requests": given.requests,
            "requests_per_s": rates,
            "slow": SLOW,
        }
        write_report(given.output, settings=settings, raw=dict(results), summary=dict(results))


if __name__ == "__main__":
    main()
