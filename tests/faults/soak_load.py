"""The soak's steady load: clients that ask without a pause, compare every answer with the undisturbed one, and time its gaps."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from baton.client import AsyncClient, ConnectionOptions, Result, SamplingOptions

TOKENS = 60
CACHED_EVERY = 4
"""Of so many requests, one may find its prompt's KV in a prefix cache."""
CONNECTION = ConnectionOptions(keepalive_s=1.0, keepalive_timeout_s=1.0)
"""A router that is cut off is found within two seconds."""


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and what an undisturbed fleet answers."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    answer: object


@dataclass(slots=True)
class Trace:
    """One request, as its client saw it."""

    heard_at_s: float = field(default_factory=time.monotonic)
    gap_s: float = 0.0
    """The longest wait for a message."""
    gap_began_s: float = 0.0
    disturbed: bool = False
    """Whether an attempt failed or moved, or the stream broke."""
    gap_at: int = 0
    """Messages before the longest wait."""
    messages: int = 0
    attempts: tuple[str, ...] = ()
    """Each one's workers, the tokens that it resumed, why it failed."""
    times: str = ""
    """When its stages happened, as the router that ended it tells."""

    def hear(self) -> None:
        now_s = time.monotonic()
        if now_s - self.heard_at_s > self.gap_s:
            self.gap_s, self.gap_began_s = now_s - self.heard_at_s, self.heard_at_s
            self.gap_at = self.messages
        self.heard_at_s = now_s
        self.messages += 1


def cases() -> list[tuple[tuple[int, ...], SamplingOptions]]:
    """Prompts of several lengths; greedy, seeded, with log-probabilities, and several completions."""
    rng = random.Random(11)
    base = SamplingOptions(max_tokens=TOKENS, seed=5, ignore_eos=True)
    ways = (replace(base, temperature=0.0), base, replace(base, logprobs=1), replace(base, n=2))
    return [
        (tuple(rng.randrange(1, 256) for _ in range(rng.choice((20, 90, 200, 600)))), way)
        for way in ways
        for _ in range(6)
    ]


def answer_of(result: Result) -> object:
    return [(c.text, c.token_ids, c.logprobs, c.finish_reason) for c in result.completions]


class Load:
    """Used on one event loop; `addresses` are the routers', as a client takes them, one list for each client."""

    def __init__(self, addresses: list[str], known: list[Case]) -> None:
        self._clients = [AsyncClient(each, connection=CONNECTION) for each in addresses]
        self._cases = known
        self._turn = itertools.count()
        self.traces: list[Trace] = []
        """Of requests that have ended."""

    @contextmanager
    def running(self, group: asyncio.TaskGroup, width: int) -> Iterator[None]:
        """So many requests at any time inside the context; afterwards each client is told to stop, which the group waits for."""
        stop = asyncio.Event()
        for number in range(width):
            group.create_task(self._ask_until(stop, self._clients[number % len(self._clients)]))
        try:
            yield
        finally:
            stop.set()

    async def ask(self, client: AsyncClient | None = None, *, pause_s: float = 0.0) -> Result:
        """One request; its reader pauses after each message. Raises AssertionError for a wrong answer."""
        client = client or self._clients[0]
        turn = next(self._turn)
        case = self._cases[turn % len(self._cases)]
        # Most prompts are nowhere in a cache: prefill computes them, and their KV is handed over.
        salt = f"{turn}" if turn % CACHED_EVERY else ""
        trace = Trace()
        async with client.generate(
            case.prompt, sampling=case.sampling, cache_salt=salt, timeout_s=60
        ) as stream:
            call = stream._call
            async for _ in stream:
                trace.hear()
                if pause_s:
                    await asyncio.sleep(pause_s)
            result = stream.result
        assert answer_of(result) == case.answer, "the stream differs from the undisturbed one"
        trace.attempts = tuple(
            f"{a.prefill_worker or '-'} {a.decode_worker} +{a.resumed_tokens} {a.failure}"
            for a in result.attempts
        )
        trace.times = str(result.timings)
        trace.disturbed = stream._call is not call or any(a.failure for a in result.attempts)
        if not pause_s:
            self.traces.append(trace)
        return result

    def know(self, known: list[Case]) -> None:
        """What is asked from now on."""
        self._cases = known

    @property
    def client(self) -> AsyncClient:
        return self._clients[0]

    def any_case(self) -> Case:
        return self._cases[next(self._turn) % len(self._cases)]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def _ask_until(self, stop: asyncio.Event, client: AsyncClient) -> None:
        while not stop.is_set():
            await self.ask(client)


async def undisturbed(address: str) -> list[Case]:
    """The cases with their answers."""
    async with AsyncClient(address) as client:
        asked = cases()
        results = await asyncio.gather(
            *(client.complete(prompt, sampling=sampling) for prompt, sampling in asked)
        )
        return [
            Case(prompt, sampling, answer_of(result))
            for (prompt, sampling), result in zip(asked, results, strict=True)
        ]
