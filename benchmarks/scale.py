"""One router at scale: 500 workers, 20,000 live sessions, 2,000 streams at once; errors, and the router's memory.

Workers are fakes in one process, which compute nothing. Every session is made and has a first turn; then as many as there are streams
have a second one. What placement alone takes in such a fleet is `benchmarks.placement_scale`.

python -m benchmarks.scale
"""

import argparse
import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from baton.v1 import session_pb2, session_pb2_grpc
from benchmarks.report import write_report
from benchmarks.router_load import (
    CHANNEL_OPTIONS,
    Measured,
    run_load,
    running_router,
    running_workers,
)

CREATING = 64
"""Sessions that are made at once."""
CHANNELS = 16


async def create_sessions(router: Measured, count: int) -> list[str]:
    """Their ids."""
    ids: list[str] = []
    left: Iterator[int] = iter(range(count))
    async with grpc.aio.insecure_channel(router.address, options=CHANNEL_OPTIONS) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)

        async def create() -> None:
            for _ in left:
                created = await stub.Create(session_pb2.SessionServiceCreateRequest(), timeout=60)
                ids.append(created.session.session_id)

        await asyncio.gather(*(create() for _ in range(CREATING)))
    return ids


async def measure(router: Measured, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of each turn."""
    load = partial(run_load, router, prompt_tokens=args.prompt_tokens, channels=CHANNELS)
    warm = min(args.streams, 256)
    await load(concurrency=warm, requests=2 * warm, new_tokens=4)
    idle_bytes = router.resident_bytes
    sessions = await create_sessions(router, args.sessions)
    first = await load(
        concurrency=args.streams,
        requests=len(sessions),
        new_tokens=args.first_tokens,
        sessions=sessions,
    )
    grown_bytes = router.resident_bytes - idle_bytes
    second = await load(
        concurrency=args.streams,
        requests=args.streams,
        new_tokens=args.second_tokens,
        sessions=sessions[: args.streams],
    )
    memory = {
        "sessions": len(sessions),
        "router_idle_mb": round(idle_bytes / 1e6, 1),
        "router_grown_mb": round(grown_bytes / 1e6, 1),
        # All that the router grew by, streams included, is laid to the sessions.
        "kb_per_session": round(grown_bytes / 1000 / len(sessions), 2),
    }
    return {"first_turns": first, "second_turns": second, "memory": memory}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--first-tokens", type=int, default=8)
    parser.add_argument("--second-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    args = parser.parse_args()
    settings: dict[str, Any] = {
        "max_running": 2 * args.streams,
        "max_queued": 2 * args.streams,
        "lease_s": 15,
        "heartbeat_s": 3,
        "session_store": "sqlite://",
    }
    fleet = {"prefill": args.fleet // 2, "decode": args.fleet - args.fleet // 2}
    with (
        running_router(**settings) as router,
        running_workers(router, kind="fake", step_ms=250, **fleet),
    ):
        summary = asyncio.run(measure(router, args))
    for name, figures in summary.items():
        print(name, figures)
    given = {k: v for k, v in vars(args).items() if k != "out"}
    write_report(args.out, settings=given, raw={}, summary=summary)


if __name__ == "__main__":
    main()
