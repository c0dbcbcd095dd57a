"""Prefill for foreign routers: a call ends with the first token, and the KV stays for as long as its time to live.

    call      Placed ─▶ Tokens, Held, Finished ─▶ (answered)
    job       ────────────────────────────────── KV held ──▶ pulled, or aborted, or `foreign_kv_ttl_s` is over

The job that holds the KV is a task of its own, which counts as a call of the worker's: a drain waits for it. A call that breaks
before it was answered takes its job along. Runs on the worker's event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from itertools import count

from baton.errors import DeadlineError, UnavailableError
from baton.service.worker_host import WorkerHost
from baton.types import AttemptKey, FinishReason, RequestId
from baton.vllm.handoff import HandedOver, fingerprint_of
from baton.vllm.legs import Finished, ForeignRequest, Held, LegEvent, Placed, Tokens
from prefill_worker.prefiller import JobEvent, JobFirstToken, JobStarted, Prefiller, PrefillJob

_log = logging.getLogger(__name__)

_Job = asyncio.Task[Exception]
"""Results in what ended it."""
_Told = asyncio.Queue[JobEvent | Exception]


class ForeignPrefill:
    """Implements `baton.vllm.legs.PrefillLeg`."""

    def __init__(self, host: WorkerHost, prefiller: Prefiller) -> None:
        self._host = host
        self._prefiller = prefiller
        self._epochs = count()
        self._jobs: dict[str, set[_Job]] = {}
        """By the router's request id."""

    async def run(self, request: ForeignRequest) -> AsyncGenerator[LegEvent, None]:
        """Precondition: `request.as_prefill`."""
        job = PrefillJob(
            # A router that tries again may use the same id; no router of Baton's makes one with two slashes.
            key=AttemptKey(RequestId(f"{request.request_id}/vllm/prefill"), next(self._epochs)),
            sequence=request.sequence(),
            skip_tokens=0,
            digest=self._host.engine.info.spec.digest,
            trace=request.trace,
            hold_s=self._host.settings.foreign_kv_ttl_s,
        )
        told: _Told = asyncio.Queue()
        task = self._start(request.request_id, job, told)
        answered = False
        cached_tokens = 0
        try:
            while not answered:
                event = await told.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, JobStarted):
                    cached_tokens = event.cached_tokens
                    yield Placed(0, cached_tokens)
                if isinstance(event, JobFirstToken):
                    yield Tokens(0, event.token)
                    if event.finish is None:
                        yield Held(self._handed(job, event, cached_tokens))
                    yield Finished(0, FinishReason.LENGTH)
                    answered = True
        finally:
            if not answered:
                task.cancel()
                await asyncio.wait({task})

    def abort(self, request_id: str) -> None:
        for task in self._jobs.get(request_id, ()):
            task.cancel()

    async def close(self) -> None:
        """Frees whatever is held: the worker stops."""
        tasks = [task for tasks in self._jobs.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _handed(self, job: PrefillJob, event: JobFirstToken, cached_tokens: int) -> HandedOver:
        length = len(job.sequence)
        return HandedOver(
            address=self._host.info.transfer_address,
            key=job.key,
            digest=job.digest,
            fingerprint=fingerprint_of(job.sequence),
            num_tokens=length,
            kv_bytes=length * self._host.engine.info.spec.token_bytes,
            cached_tokens=cached_tokens,
            first=event.token,
            done_unix_s=time.time(),
        )

    def _start(self, request_id: str, job: PrefillJob, told: _Told) -> _Job:
        task = asyncio.create_task(self._hold(job, told), name=f"hold {job.key}")
        self._jobs.setdefault(request_id, set()).add(task)
        task.add_done_callback(partial(self._forget, request_id, told))
        return task

    def _forget(self, request_id: str, told: _Told, task: _Job) -> None:
        tasks = self._jobs[request_id]
        tasks.discard(task)
        if not tasks:
            del self._jobs[request_id]
        # What ended it is told, too, for a call that was not answered; also of one that was aborted before it ran.
        told.put_nowait(_released() if task.cancelled() else task.result())

    async def _hold(self, job: PrefillJob, told: _Told) -> Exception:
        """Runs a job to its end; returns what ended it."""
        try:
            async with aclosing(self._prefiller.run(job)) as events:
                async for event in events:
                    told.put_nowait(event)
        except DeadlineError as error:
            _log.info("nobody came for the KV of %s", job.key)
            return error
        except Exception as error:  # noqa: BLE001 - raised where the call is answered
            return error
        return _released()


def _released() -> Exception:
    return UnavailableError("the KV was released")
