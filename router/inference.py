"""What clients can ask of a router, whatever protocol they speak: validation, admission, the stream to the client, and the account at
the end. Each protocol's front translates to these messages and back, and does nothing else.

Runs on the router's event loop, in the task of the client's call. A call of `generate` is the lease on everything that its request
holds: however it ends (completed, failed, cancelled by id, the client gone, its deadline passed, a client that does not read), its
attempt's calls are cancelled, which frees the workers. Raises `BatonError`; each front has its own form for those.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import replace
from functools import partial
from typing import NoReturn, Protocol

from baton import codec
from baton.errors import (
    BatonError,
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from baton.kv.prefix import SequenceHashes
from baton.lifecycle import Event, Timeline
from baton.service.access import Caller
from baton.service.logging import bind
from baton.service.metrics import Objectives, RouterMetrics
from baton.service.settings import RouterSettings
from baton.service.tracing import Origin, Tracing
from baton.types import TokenChunk
from baton.v1 import inference_pb2 as pb
from router.account import Account
from router.answer import Answer, Resumption
from router.attach import HeldAttempt, find_held
from router.chat import ChatTurn
from router.fleet import Fleet
from router.model import ServedModel
from router.output import Piece
from router.replies import accepted, chunk, finished
from router.request_span import request_traced
from router.requests import RequestTable
from router.resume import repeat, resume
from router.sessions.manager import SessionManager
from router.sessions.record import mark_of
from router.sessions.turn import Turn, TurnResult
from router.status.activity import Activity
from router.tenants import Demand
from router.validation import (
    NO_HISTORY,
    ModelFacts,
    ValidRequest,
    chat_turns,
    is_request_id,
    parse_generate,
)

MAX_TIMEOUT_S = 1e6
"""A client that asks for more gets this: calls to workers cannot express any number, and would time out at once."""
INLINE_BYTES = 8192
"""Requests up to this size are tokenized on the event loop: that takes less time than a thread's turn."""


UNTOLD = Origin()
NO_TURN: AbstractAsyncContextManager[Turn | None] = nullcontext()


class AnswerStream(Protocol):
    """Takes what a client is to read."""

    async def write(self, response: pb.GenerateResponse) -> None:
        """Returns once the next message may come. Raises `CapacityError` where the client has not read for too long."""
        ...


class Inference:
    """See the module docstring."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        table: RequestTable,
        sessions: SessionManager,
        *,
        settings: RouterSettings,
        metrics: RouterMetrics,
        tracing: Tracing,
        activity: Activity,
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._table = table
        self._sessions = sessions
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._activity = activity
        self._since_s = time.monotonic()
        self._targets = Objectives(
            ttft_s=settings.ttft_target_s or settings.default_ttft_slo_s,
            tpot_s=settings.tpot_target_s,
        )

    async def generate(
        self,
        request: pb.GenerateRequest,
        caller: Caller,
        stream: AnswerStream,
        *,
        timeout_s: float | None = None,
        origin: Origin = UNTOLD,
    ) -> None:
        """Writes one Accepted, Chunks, and one Finished. `timeout_s` is the client's; None stands for the settings' default."""
        now_s = time.monotonic()
        deadline_s = now_s + self._timeout_s(timeout_s)
        account = Account(Timeline(received_s=now_s), tenant=caller.tenant, targets=self._targets)
        if request.WhichOneof("prompt") == "chat":
            account.operation = "chat"
        turn = NO_TURN
        if request.session_id:
            turn = self._begun(request, account, deadline_s)
        with (
            request_traced(self._tracing, origin, account, self._settings),
            self._activity.follow(account),
            account.counted(self._metrics),
        ):
            async with turn as account.turn, account.bounded(deadline_s):
                facts = await self._facts()
                account.model = facts.model
                if account.turn is not None and account.turn.is_past:
                    request, account.resumption = repeat(request, account.turn)
                valid = account.request = await self._parse(request, facts, caller, account.turn)
                bind(request=valid.request_id)
                account.stage = "admission"
                if time.monotonic() >= deadline_s:
                    # Not for admission to refuse: no later try with this deadline can succeed.
                    raise DeadlineError(account.stage)
                hashes = SequenceHashes(valid.prompt, valid.cache_salt)
                demand = self._demand(valid, account.timeline, deadline_s)
                if account.resumption.is_told_again:
                    demand = _admitted_once(valid.tenant, account.resumption)
                entry = self._table.enter(
                    valid.request_id,
                    demand,
                    predicted_ttft_s=lambda: self._fleet.predicted_ttft_s(hashes, valid.resident),
                    completion_tokens=lambda: account.completion_tokens,
                )
                async with entry:
                    await self._answer(facts, account, stream, hashes, deadline_s=deadline_s)

    async def attach(
        self,
        request: pb.AttachRequest,
        caller: Caller,
        stream: AnswerStream,
        *,
        timeout_s: float | None = None,
        origin: Origin = UNTOLD,
    ) -> None:
        """Writes one Accepted, the Chunks that the client lacks, and one Finished."""
        now_s = time.monotonic()
        deadline_s = now_s + self._timeout_s(timeout_s)
        tenant = caller.tenant
        account = Account(Timeline(received_s=now_s), tenant=tenant)
        with (
            request_traced(self._tracing, origin, account, self._settings),
            self._activity.follow(account),
            account.counted(self._metrics),
        ):
            async with account.bounded(deadline_s):
                facts = await self._facts()
                account.model = facts.model
                account.stage = "attach"
                found = await self._find(request.request_id, tenant)
                valid, resumption = resume(request, found)
                account.request, account.resumption = valid, resumption
                bind(request=valid.request_id)
                deadline_s = min(deadline_s, now_s + resumption.left_s(time.time()))
                entry = self._table.enter(
                    valid.request_id,
                    _admitted_once(tenant, resumption),
                    predicted_ttft_s=lambda: None,
                    completion_tokens=lambda: account.completion_tokens,
                    goes_on=True,
                )
                async with (
                    self._session_of(valid) as account.turn,
                    account.bounded(deadline_s),
                    entry,
                ):
                    await self._answer(
                        facts,
                        account,
                        stream,
                        SequenceHashes(valid.prompt, valid.cache_salt),
                        deadline_s=deadline_s,
                    )

    def cancel(self, request_id: str, caller: Caller) -> None:
        """Ends a running request of the caller's tenant. Raises `NotFoundError`."""
        self._table.cancel(request_id, caller.tenant)

    async def refuse(
        self, error: BatonError, caller: Caller, request_id: str, *, origin: Origin = UNTOLD
    ) -> NoReturn:
        """Raises the error of a request that its front could not read, and counts it as those that are refused here. The id is one that
        may be shown.
        """
        account = Account(
            Timeline(received_s=time.monotonic()), tenant=caller.tenant, refused_id=request_id
        )
        with (
            request_traced(self._tracing, origin, account, self._settings),
            self._activity.follow(account),
            account.counted(self._metrics),
        ):
            raise error

    @property
    def serves(self) -> bool:
        """False once the router drains."""
        return not self._table.refuses

    def can_serve(self) -> bool:
        """Whether a request would find workers now."""
        return self.serves and self._fleet.can_place()

    def describe(self, model: str, caller: Caller) -> pb.GetModelResponse:
        """The served model; only who administers learns of the workers. Raises `NotFoundError` for any other name but an empty one."""
        name, latest = self._model.name, self._model.latest
        if model and model != name:
            raise NotFoundError("model", model)
        response = pb.GetModelResponse(
            model=name,
            has_chat_template=self._model.tokenizer.has_chat_template,
        )
        if caller.is_admin:
            infos = self._fleet.registry.infos()
            response.workers.extend(codec.worker_info_to_proto(info) for info in infos)
        if latest is not None:
            response.fingerprint = latest.spec.model_fingerprint
            response.dtype = latest.spec.dtype.value
            response.vocab_size = latest.vocab_size
            response.max_context_tokens = latest.max_context_tokens
            response.eos_token_ids.extend(latest.eos_token_ids)
        return response

    def _timeout_s(self, given_s: float | None) -> float:
        if given_s is None:
            return self._settings.default_timeout_s
        return min(MAX_TIMEOUT_S, max(0.0, given_s))

    async def _facts(self) -> ModelFacts:
        """Waits, within limits, for the first worker: only workers know the model's limits."""
        end_s = time.monotonic() + self._settings.worker_wait_s
        while (facts := self._model.facts) is None:
            if not await self._fleet.wait_for_change(end_s - time.monotonic()):
                raise UnavailableError("no worker has joined")
        return facts

    async def _parse(
        self, request: pb.GenerateRequest, facts: ModelFacts, caller: Caller, turn: Turn | None
    ) -> ValidRequest:
        history = NO_HISTORY if turn is None or turn.is_past else turn.history
        tokenizer = self._model.tokenizer
        parse = partial(parse_generate, request, facts, tokenizer, caller=caller, history=history)
        # A conversation may have to be tokenized anew.
        inline = request.ByteSize() + 4 * len(history.tokens) <= INLINE_BYTES
        valid = parse() if inline else await asyncio.to_thread(parse)
        if turn is None or turn.is_past:
            return valid
        if valid.sampling.n > 1:
            problem = "must be 1 in a session, which goes on with one answer"
            raise InvalidRequestError(FieldViolation("sampling.n", problem))
        turn.messages = chat_turns(request.chat)
        unreported_s = 2 * self._settings.heartbeat_s
        resident = turn.resident(valid.prompt, valid.cache_salt, unreported_s)
        return replace(valid, resident=resident, turn=turn.record())

    @asynccontextmanager
    async def _begun(
        self, request: pb.GenerateRequest, account: Account, deadline_s: float
    ) -> AsyncIterator[Turn | None]:
        """Runs the session's turn that a request is. Raises `DeadlineError` where it has not begun by the deadline, which is the caller's
        to keep from then on.
        """
        turn = self._sessions.turn(
            account.tenant, request.session_id, model=self._model.name, mark=mark_of(request)
        )
        next_stage, account.stage = account.stage, "session"
        async with AsyncExitStack() as stack:
            async with account.bounded(deadline_s):
                begun = await stack.enter_async_context(turn)
            account.stage = next_stage
            yield begun

    @asynccontextmanager
    async def _session_of(self, valid: ValidRequest) -> AsyncIterator[Turn | None]:
        """Goes on with the session's turn that a request is which another router began."""
        record = valid.turn
        if record is None:
            yield None
            return
        async with self._sessions.turn(
            valid.tenant, record.session_id, model=self._model.name, lease_id=record.lease_id
        ) as turn:
            assert turn is not None
            turn.messages = [ChatTurn(role, content) for role, content in record.said]
            yield turn

    def _demand(self, valid: ValidRequest, timeline: Timeline, deadline_s: float) -> Demand:
        slo_s = valid.ttft_slo_s or self._settings.default_ttft_slo_s or math.inf
        late_at_s = min(deadline_s, timeline.received_s + slo_s)
        return Demand(
            tenant=valid.tenant,
            prompt_tokens=len(valid.prompt),
            max_tokens=valid.sampling.max_tokens * valid.sampling.n,
            priority=valid.priority,
            ttft_budget_s=max(0.0, late_at_s - time.monotonic()),
        )

    async def _find(self, request_id: str, tenant: str) -> dict[int, HeldAttempt]:
        """What workers hold of a tenant's request. Raises `NotFoundError`; a router that has just come up waits for its workers first."""
        if not is_request_id(request_id):
            # Nobody need be asked, least of all every worker about megabytes.
            raise NotFoundError("request", request_id)
        end_s = self._since_s + self._settings.worker_wait_s
        while True:
            members = self._fleet.decode_members()
            if held := await find_held(members, request_id, tenant):
                return held
            if not await self._fleet.wait_for_change(end_s - time.monotonic()):
                raise NotFoundError("request", request_id)

    async def _answer(
        self,
        facts: ModelFacts,
        account: Account,
        stream: AnswerStream,
        hashes: SequenceHashes,
        *,
        deadline_s: float,
    ) -> None:
        valid = account.request
        assert valid is not None
        if account.turn is not None:
            account.turn.outlives = True
        account.timeline.record(Event.ADMITTED, time.monotonic())
        answer = account.answer = Answer(
            valid,
            facts,
            self._model.tokenizer,
            fleet=self._fleet,
            settings=self._settings,
            metrics=self._metrics,
            meter=account.meter,
            timeline=account.timeline,
            deadline_s=deadline_s,
            resumption=account.resumption,
            hashes=hashes,
            span=account.span,
        )
        async with answer.running() as outputs:
            with self._table.streaming(valid.sampling.n):
                await stream.write(accepted(valid, facts))
                rest_s = 0.0
                while (piece := await outputs.take(rest_s)) is not None:
                    await stream.write(chunk(piece))
                    self._wrote(piece, account)
                    rest_s = 0.0 if answer.rests else self._table.rest_s
        account.timeline.record(Event.FINISHED, time.monotonic())
        if account.turn is not None:
            # Before the client is told: it may begin its next turn at once.
            await account.turn.finish(self._turn_result(facts, account))
        await stream.write(finished(account))

    def _turn_result(self, facts: ModelFacts, account: Account) -> TurnResult:
        """Precondition: the output is complete."""
        answer, valid = account.answer, account.request
        assert answer is not None
        assert valid is not None
        output, report = answer.outputs[0], answer.generations[0].reports[-1]
        end = output.stop_token_id
        special = end is not None and self._model.tokenizer.special_text(end)
        return TurnResult(
            model=facts.model,
            prompt=valid.prompt,
            output=TokenChunk(0, tuple(output.generated), output.logprobs),
            reason=answer.reasons[0],
            seed=valid.sampling.seed,
            answer=output.said,
            exact=output.stop is None and (end is None or bool(special)),
            cached_tokens=account.cached_tokens,
            cache_salt=valid.cache_salt,
            prefill_worker=report.prefill_worker,
            decode_worker=report.decode_worker,
        )

    def _wrote(self, piece: Piece, account: Account) -> None:
        if piece.tokens is None:
            return
        timeline, count, now_s = account.timeline, len(piece.tokens.token_ids), time.monotonic()
        age_s = now_s - timeline.received_s
        last_s, account.heard_s[piece.choice] = account.heard_s.get(piece.choice), age_s
        if account.resumption.is_told_again:
            pass  # nothing was generated
        elif last_s is not None:
            self._metrics.record_token_gap(age_s - last_s)
            account.meter.tokens(count, now_s, gap_s=age_s - last_s)
        elif account.goes_on or timeline.at_s(Event.FIRST_TOKEN) is not None:
            account.meter.tokens(count, now_s)
        else:
            account.meter.first_tokens(count, now_s, ttft_s=age_s)
        timeline.record(Event.FIRST_TOKEN, now_s)
        timeline.record(Event.LAST_TOKEN, now_s)


def _admitted_once(tenant: str, resumption: Resumption) -> Demand:
    """Of a request that goes on, or is told again: it waits for a place, but nothing refuses it for being late, or for its tokens, of which
    its tenant pays for those that are yet to be generated.
    """
    return Demand(
        tenant=tenant, prompt_tokens=0, max_tokens=0, generated_tokens=resumption.earlier_tokens
    )
