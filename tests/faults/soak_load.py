"""The soak's steady load: clients that ask without a pause, compare every answer with the undisturbed one, and time its gaps."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from baton.client import AsyncClient, ConnectionOptions, Result, SamplingOptions, Session
from baton.errors import CapacityError, DeadlineError, NotFoundError

CACHED_EVERY = 4
"""Of so many requests, one may find its prompt's KV in a prefix cache."""
CONNECTION = ConnectionOptions(keepalive_s=1.0, keepalive_timeout_s=1.0)
"""A router that is cut off is found within two seconds."""
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what an undisturbed fleet answers."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    answer: object


Case = tuple[Asked, ...]
"""One request, or the turns of a session."""


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

    @property
    def gap_ended_s(self) -> float:
        return self.gap_began_s + self.gap_s

    def hear(self) -> None:
        now_s = time.monotonic()
        if now_s - self.heard_at_s > self.gap_s:
            self.gap_s, self.gap_began_s = now_s - self.heard_at_s, self.heard_at_s
            self.gap_at = self.messages
        self.heard_at_s = now_s
        self.messages += 1


def answer_of(result: Result) -> object:
    return [(c.text, c.token_ids, c.logprobs, c.finish_reason) for c in result.completions]


class Gate:
    """Through which requests come, and which may be shut: a client gives up soon what no router has accepted."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._shut = 0
        self._unaccepted: set[object] = set()

    @asynccontextmanager
    async def entry(self) -> AsyncIterator[Callable[[], None]]:
        """A request is made inside; it calls what it is given once it was accepted."""
        while not self._open.is_set():
            await self._open.wait()
        request = object()
        self._unaccepted.add(request)
        try:
            yield lambda: self._unaccepted.discard(request)
        finally:
            self._unaccepted.discard(request)

    @asynccontextmanager
    async def shut(self) -> AsyncIterator[None]:
        """Inside, nobody asks anew, and what runs was accepted."""
        self._shut += 1
        self._open.clear()
        try:
            while self._unaccepted:  # noqa: ASYNC110 - which is often
                await asyncio.sleep(0.01)
            yield
        finally:
            self._shut -= 1
            if not self._shut:
                self._open.set()


class Load:
    """Used on one event loop; `addresses` are the routers', as a client takes them, one list for each client."""

    def __init__(self, addresses: list[str]) -> None:
        self._clients = [AsyncClient(each, connection=CONNECTION) for each in addresses]
        self._cases: list[Case] = []
        self._turn = itertools.count()
        self.gate = Gate()
        self.traces: list[Trace] = []
        """Of requests that have ended."""

    def know(self, known: list[Case]) -> None:
        """What is asked from now on."""
        self._cases = known

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

    async def ask(self, client: AsyncClient | None = None, *, pause_s: float = 0.0) -> list[Result]:
        """One case; its reader pauses after each message. Raises AssertionError for a wrong answer."""
        client = client or self._clients[0]
        turn = next(self._turn)
        case = self._cases[turn % len(self._cases)]
        # Most prompts are nowhere in a cache: prefill computes them, and their KV is handed over.
        salt = f"{turn}" if turn % CACHED_EVERY else ""
        if len(case) == 1:
            return [await self._one(client, case[0], salt, pause_s)]
        async with self.gate.entry():
            session = await client.sessions.create()
        results = [await self._one(client, asked, salt, pause_s, session) for asked in case]
        told = [result.session and result.session.turn for result in results]
        assert told == [*range(1, len(case) + 1)], f"turns are missing, or came twice: {told}"
        async with self.gate.entry():
            # The answer to the first try may have been lost.
            with suppress(NotFoundError):
                await client.sessions.close(session)
        return results

    async def expire(self, timeout_s: float) -> None:
        """A request with a deadline that it cannot keep, or only just."""
        asked = self._cases[next(self._turn) % len(self._cases)][0]
        async with self.gate.entry():
            # A deadline that cannot be kept is refused at once.
            with suppress(DeadlineError, CapacityError):
                await self._clients[0].complete(
                    asked.prompt, sampling=asked.sampling, timeout_s=timeout_s
                )

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def _one(
        self,
        client: AsyncClient,
        asked: Asked,
        salt: str,
        pause_s: float,
        session: Session | None = None,
    ) -> Result:
        async with self.gate.entry() as accepted:
            trace = Trace()
            async with client.generate(
                asked.prompt,
                sampling=asked.sampling,
                cache_salt=salt,
                session=session,
                timeout_s=TIMEOUT_S,
            ) as stream:
                call = stream._call
                async for _ in stream:
                    accepted()
                    trace.hear()
                    if pause_s:
                        await asyncio.sleep(pause_s)
                result = stream.result
        assert answer_of(result) == asked.answer, (
            f"differs from the undisturbed answer: {asked} {result}"
        )
        trace.attempts = tuple(
            f"{a.prefill_worker or '-'} {a.decode_worker} +{a.resumed_tokens} {a.failure}"
            for a in result.attempts
        )
        trace.times = str(result.timings)
        trace.disturbed = stream._call is not call or any(a.failure for a in result.attempts)
        if not pause_s:
            self.traces.append(trace)
        return result

    async def _ask_until(self, stop: asyncio.Event, client: AsyncClient) -> None:
        while not stop.is_set():
            await self.ask(client)
