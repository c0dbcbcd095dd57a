"""Workers that come to a halt for chosen attempts, so that a test kills them exactly there, in a process of their own.

Which attempts, and where, a client says by its request id: `k17.greedy` halts on decode once 17 tokens of the output were told;
`pulling.3` halts on prefill in that stage. Only first attempts halt; so whoever takes the request over does not.
"""

import asyncio
from collections.abc import AsyncGenerator
from enum import Enum
from typing import Any

from baton.kv.spec import WireKV
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.types import AttemptKey, TokenChunk
from baton.worker.actor import ActorConfig
from decode_worker import decoder
from decode_worker.actor import DecodeActor
from decode_worker.held import HeldAttempt, HeldAttempts, Terms
from decode_worker.worker import DecodeWorker
from prefill_worker import prefiller
from prefill_worker.actor import PrefillActor
from prefill_worker.worker import PrefillWorker


class PrefillStage(Enum):
    """Where a prefill worker comes to a halt."""

    CALLED = "called"
    """Nothing was told yet."""
    STARTED = "started"
    """It computes the prompt."""
    COMPUTED = "computed"
    """Nobody has the first token yet."""
    FIRST_TOKEN = "first-token"
    """The client has it; decode does not know that the KV is ready."""
    PULLING = "pulling"
    """Decode waits for the KV."""
    PULLED = "pulled"
    """It has told that the KV is handed over, which is still on its way."""
    HANDED = "handed"
    """Decode has the KV; only the call's end is missing."""


def mark(key: AttemptKey) -> str:
    """What its client's request id says before the dot; empty for later attempts."""
    return "" if key.attempt else key.request_id.partition(".")[0]


class Halts:
    """The attempts that have come to a halt in this process."""

    def __init__(self) -> None:
        self.keys: set[AttemptKey] = set()

    async def halt(self, key: AttemptKey) -> None:
        """Never returns."""
        self.keys.add(key)
        await asyncio.Event().wait()


class HaltingAttempts(HeldAttempts):
    """Tells as many tokens as the request id says."""

    def __init__(self, halts: Halts) -> None:
        super().__init__()
        self._halts = halts

    def start(
        self, job: decoder.DecodeJob, terms: Terms, events: AsyncGenerator[Any, None]
    ) -> HeldAttempt:
        told = mark(job.key)
        if told.startswith("k"):
            events = self._until(events, job.key, int(told[1:]))
        return super().start(job, terms, events)

    async def _until(
        self, events: AsyncGenerator[Any, None], key: AttemptKey, num_tokens: int
    ) -> AsyncGenerator[Any, None]:
        """What comes before the output has more than so many tokens."""
        try:
            async for event in events:
                if isinstance(event, decoder.JobTokens) and event.chunk.end_index >= num_tokens:
                    chunk = event.chunk
                    count = num_tokens - chunk.first_index
                    if count > 0:
                        yield decoder.JobTokens(
                            TokenChunk(
                                chunk.first_index, chunk.token_ids[:count], chunk.logprobs[:count]
                            )
                        )
                    await self._halts.halt(key)
                yield event
        finally:
            await events.aclose()


class HaltingDecodeActor(DecodeActor):
    """A decode worker that halts after a number of tokens."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        assert isinstance(self._worker, DecodeWorker)
        self._worker._attempts = HaltingAttempts(Halts())


class HaltingPrefiller(prefiller.Prefiller):
    """Halts before it tells what would lead out of the stage."""

    def __init__(self, host: WorkerHost, halts: Halts) -> None:
        super().__init__(host)
        self._halts = halts

    async def run(self, job: prefiller.PrefillJob) -> AsyncGenerator[Any, None]:
        stage = mark(job.key)
        if stage == PrefillStage.CALLED.value:
            await self._halts.halt(job.key)
        events = super().run(job)
        try:
            async for event in events:
                first = isinstance(event, prefiller.JobFirstToken)
                if first and stage == PrefillStage.COMPUTED.value:
                    await self._halts.halt(job.key)
                if isinstance(event, prefiller.JobHanded) and stage == PrefillStage.HANDED.value:
                    await self._halts.halt(job.key)
                yield event
                started = isinstance(event, prefiller.JobStarted)
                if started and stage == PrefillStage.STARTED.value:
                    await self._halts.halt(job.key)
        finally:
            await events.aclose()


class HaltingPrefillActor(PrefillActor):
    """A prefill worker that halts in a stage."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        assert isinstance(self._worker, PrefillWorker)
        self._halts = Halts()
        self._worker._prefiller = HaltingPrefiller(self._worker.host, self._halts)

    async def num_halted(self) -> int:
        """Attempts that have come to their halt."""
        return len(self._halts.keys)

    async def kv_ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        if mark(key) in {PrefillStage.COMPUTED.value, PrefillStage.FIRST_TOKEN.value}:
            await self._halts.halt(key)
        return await super().kv_ready(key, timeout_s, piece)

    async def kv_pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        if mark(request.key) == PrefillStage.PULLING.value:
            await self._halts.halt(request.key)
        answer = await super().kv_pull(request)
        if mark(request.key) == PrefillStage.PULLED.value:
            await self._halts.halt(request.key)
        return answer
