"""Decode for foreign routers: goes on from what a prefill leg handed over, and computes the prompt itself where that is nothing, or cannot
be used, or is gone. A request that can be served never fails for the sake of its KV.

Of several choices the first one brings the prompt's KV here; the others find it in the prefix cache. KV that a request has no use
for is given back by pulling its last token, which ends its hold. Runs on the worker's event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count

from baton.errors import BatonError
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVTransport, PullRequest, Ready
from baton.types import AttemptKey, FinishReason, RequestId, SamplingParams, Sequence
from baton.vllm.handoff import HandedOver, fingerprint_of, stands
from baton.vllm.legs import Finished, ForeignRequest, LegEvent, Placed, Tokens
from decode_worker.decoder import (
    DecodeJob,
    Decoder,
    JobEvent,
    JobFinished,
    JobKvReceived,
    JobReserved,
    JobTokens,
)

_log = logging.getLogger(__name__)


class ForeignDecode:
    """Implements `baton.vllm.legs.DecodeLeg`."""

    def __init__(self, host: WorkerHost, decoder: Decoder, transport: KVTransport) -> None:
        self._host = host
        self._decoder = decoder
        self._transport = transport
        self._epochs = count()
        self._giving_back: set[asyncio.Task[None]] = set()

    async def run(
        self, request: ForeignRequest, timeout_s: float
    ) -> AsyncGenerator[LegEvent, None]:
        end_s = time.monotonic() + timeout_s
        events = self._first(request, end_s)
        if request.sampling.n > 1:
            events = self._all(request, events, end_s)
        async with aclosing(events):
            async for event in events:
                yield event

    async def close(self) -> None:
        """The worker stops."""
        for task in self._giving_back:
            task.cancel()
        await asyncio.gather(*self._giving_back, return_exceptions=True)

    async def _all(
        self, request: ForeignRequest, first: AsyncGenerator[LegEvent, None], end_s: float
    ) -> AsyncGenerator[LegEvent, None]:
        """All choices at once, as soon as the first one has computed or pulled the prompt."""
        told: asyncio.Queue[LegEvent | Exception] = asyncio.Queue()
        prompt_cached = asyncio.Event()

        async def read(choice: int) -> None:
            is_placed = False
            try:
                if choice:
                    await prompt_cached.wait()
                source = self._local(request, choice, request.sequence(choice), end_s)
                async with aclosing(source if choice else first) as events:
                    async for event in events:
                        told.put_nowait(event)
                        is_placed |= isinstance(event, Placed)
                        if is_placed and isinstance(event, Tokens):
                            prompt_cached.set()
            except Exception as error:  # noqa: BLE001 - raised where the events are read
                told.put_nowait(error)
            finally:
                prompt_cached.set()

        running = request.sampling.n
        tasks = [asyncio.create_task(read(choice)) for choice in range(running)]
        try:
            while running:
                event = await told.get()
                if isinstance(event, Exception):
                    raise event
                running -= isinstance(event, Finished)
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first(self, request: ForeignRequest, end_s: float) -> AsyncGenerator[LegEvent, None]:
        """The choice that has a use for what was handed over."""
        sequence, handed = request.sequence(), request.handed
        if handed is not None and not self._is_usable(handed, sequence):
            self._give_back(handed)
            handed = None
        if handed is None:
            rest = self._local(request, 0, sequence, end_s)
        else:
            finish = self._finish_of(handed.first.token_ids[0], sequence)
            if finish is not None:
                self._give_back(handed)
                yield Tokens(0, handed.first)
                yield Placed(0, handed.cached_tokens)
                yield Finished(0, finish)
                return
            rest = self._pulled(request, sequence, handed, end_s)
        async with aclosing(rest):
            async for event in rest:
                yield event

    async def _pulled(
        self, request: ForeignRequest, sequence: Sequence, handed: HandedOver, end_s: float
    ) -> AsyncGenerator[LegEvent, None]:
        """The first token, and what follows it: by prefill's KV, and without it where it cannot be had."""
        # The KV is there, or gone: whoever does not answer soon is not waited for.
        timeout_s = min(end_s - time.monotonic(), self._host.settings.handoff_timeout_s)
        job = DecodeJob(
            key=self._key(request),
            sequence=sequence,
            source=handed.address,
            source_key=handed.key,
            ready=Ready(handed.first.token_ids[0], handed.done_unix_s),
            digest=handed.digest,
            timeout_s=timeout_s,
            trace=request.trace,
        )
        is_here = False
        try:
            yield Tokens(0, handed.first)
            async with aclosing(self._decoder.run(job)) as events:
                async for event in events:
                    is_here |= isinstance(event, JobKvReceived)
                    for told in _told(0, event, handed.cached_tokens):
                        yield told
        except BatonError as error:
            if is_here:
                raise
            _log.info("%s: computing the prompt here: %s", job.key, error.message)
        finally:
            if not is_here:
                self._give_back(handed)
        if not is_here:
            resumed = replace(sequence, generated=handed.first.token_ids)
            async with aclosing(self._local(request, 0, resumed, end_s)) as rest:
                async for told in rest:
                    yield told

    async def _local(
        self, request: ForeignRequest, choice: int, sequence: Sequence, end_s: float
    ) -> AsyncGenerator[LegEvent, None]:
        """Computes the prompt here, and generates."""
        job = DecodeJob(
            key=self._key(request),
            sequence=sequence,
            source=None,
            digest=self._host.engine.info.spec.digest,
            timeout_s=end_s - time.monotonic(),
            trace=request.trace,
        )
        async with aclosing(self._decoder.run(job)) as events:
            async for event in events:
                for told in _told(choice, event, 0):
                    yield told

    def _key(self, request: ForeignRequest) -> AttemptKey:
        """Of one try; no router of Baton's makes an id with two slashes."""
        return AttemptKey(RequestId(f"{request.request_id}/vllm/decode"), next(self._epochs))

    def _is_usable(self, handed: HandedOver, sequence: Sequence) -> bool:
        engine, token_id = self._host.engine.info, handed.first.token_ids[0]
        return (
            handed.digest == engine.spec.digest
            and handed.fingerprint == fingerprint_of(sequence)
            and 0 <= token_id < engine.vocab_size
            and stands(token_id, sequence.sampling, engine.eos_token_ids)
        )

    def _finish_of(self, token_id: int, sequence: Sequence) -> FinishReason | None:
        """Whether the first token is the last."""
        params: SamplingParams = sequence.sampling
        ends = () if params.ignore_eos else self._host.engine.info.eos_token_ids
        if token_id in {*ends, *params.stop_token_ids}:
            return FinishReason.STOP
        return FinishReason.LENGTH if params.max_tokens == 1 else None

    def _give_back(self, handed: HandedOver) -> None:
        task = asyncio.create_task(self._pull_last(handed), name=f"give back {handed.key}")
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)

    async def _pull_last(self, handed: HandedOver) -> None:
        request = PullRequest(
            key=handed.key,
            first=handed.num_tokens - 1,
            last=handed.num_tokens,
            digest=handed.digest,
        )
        spec, timeout_s = self._host.engine.info.spec, self._host.settings.handoff_timeout_s
        try:
            async with self._transport.pull(
                handed.address, request, spec=spec, timeout_s=timeout_s
            ):
                pass
        except BatonError as error:
            _log.debug("%s is not given back: %s", handed.key, error.message)


def _told(choice: int, event: JobEvent, cached_tokens: int) -> tuple[LegEvent, ...]:
    """`cached_tokens`: what prefill had in its cache."""
    match event:
        case JobReserved(_, cached):
            return (Placed(choice, max(cached, cached_tokens)),)
        case JobTokens(chunk):
            return (Tokens(choice, chunk),)
        case JobFinished(reason):
            return (Finished(choice, reason),)
        case JobKvReceived():
            return ()
