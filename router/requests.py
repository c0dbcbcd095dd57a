"""The requests that the router serves now: their ids, their turn, and how to end one from outside.

Used on the router's event loop. An entry is held by the request's own task, inside `enter`, and goes with it. Whose turn it is,
and who is refused, is `router.admission`'s decision.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DrainingError,
    NotFoundError,
)
from baton.service.metrics import RouterMetrics
from baton.types import RequestId
from router.admission import Admission, Admit, Reject, late_by_s, too_late
from router.tenants import Demand, Ticket

MIN_REST_S = 0.005
"""Shorter rests would join little, and cost a timer."""
MAX_REST_S = 0.1
"""Tokens that wait longer would be seen to come in jerks."""
LIMITS_INTERVAL_S = 1.0
"""How often it is looked whether tenants' limits have changed."""


class _Running:
    """One request, and the task that serves it."""

    def __init__(self, task: asyncio.Task[object], completion_tokens: Callable[[], int]) -> None:
        self._task = task
        self.completion_tokens = completion_tokens
        self.ticket: Ticket | None = None
        """Its place, once it has one."""
        self.lender: _Running | None = None
        """Whose place it took."""
        self.over = False
        self.error: BatonError | None = None

    @property
    def living_lender(self) -> "_Running | None":
        """Whose place it has, where that one goes on, or the one that had it from."""
        while self.lender is not None and self.lender.over:
            self.lender = self.lender.lender
        return self.lender

    def abort(self, error: BatonError) -> None:
        """The request ends with `error`, at its next await. The first call decides."""
        if self.error is None:
            self.error = error
            self._task.cancel()

    def uncancel(self) -> None:
        """The cancellation has arrived."""
        self._task.uncancel()


class RequestTable:
    """See the module docstring."""

    def __init__(
        self,
        admission: Admission,
        metrics: RouterMetrics,
        *,
        client_messages_per_s: float = math.inf,
    ) -> None:
        self._client_messages_per_s = client_messages_per_s
        self._num_streams = 0
        """Completions that are told to clients."""
        self._admission = admission
        self._metrics = metrics
        self._requests: dict[tuple[str, RequestId], _Running] = {}
        """By tenant and id: an id says nothing outside its tenant."""
        self._turns: dict[Ticket, asyncio.Future[Reject | None]] = {}
        """Of requests that wait; the result is the refusal of one that must give way."""
        self._refuses = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def rest_s(self) -> float:
        """How long tokens may wait for more of their completion, so that all together make no more messages than the settings say."""
        rest_s = self._num_streams / self._client_messages_per_s
        return min(rest_s, MAX_REST_S) if rest_s >= MIN_REST_S else 0.0

    @property
    def refuses(self) -> bool:
        """Whether no request may enter any more."""
        return self._refuses

    @property
    def completion_tokens(self) -> int:
        """What the requests that are here have generated so far."""
        return sum(running.completion_tokens() for running in self._requests.values())

    @property
    def num_waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._turns)

    @contextmanager
    def streaming(self, completions: int) -> Iterator[None]:
        """Tells so many completions to a client inside the context."""
        self._num_streams += completions
        try:
            yield
        finally:
            self._num_streams -= completions

    @asynccontextmanager
    async def enter(
        self,
        request_id: RequestId,
        demand: Demand,
        *,
        predicted_ttft_s: Callable[[], float | None],
        completion_tokens: Callable[[], int],
        goes_on: bool = False,
    ) -> AsyncIterator[None]:
        """Serves a request inside the context, once it is its turn. `predicted_ttft_s` tells how long it would take to its first token
        if it were served now, `completion_tokens` what it has generated so far. One that `goes_on` with the request of that id and
        tenant takes its id and its place, where one is here; that one will end, and else has them back. Raises `DrainingError` while
        draining, `AlreadyExistsError` where one of that id and tenant is here, `CapacityError` where admission refuses it, and what the
        request was aborted with.
        """
        if self._refuses:
            self._metrics.record_rejection("draining")
            raise DrainingError("the router is draining")
        name = (demand.tenant, request_id)
        earlier = self._requests.get(name)
        if earlier is not None and not goes_on:
            self._metrics.record_rejection("duplicate")
            raise AlreadyExistsError(f"a request {request_id!r} runs")
        task = asyncio.current_task()
        assert task is not None
        running = self._requests[name] = _Running(task, completion_tokens)
        self._idle.clear()
        try:
            if earlier is not None and earlier.ticket is not None:
                running.ticket, earlier.ticket, running.lender = earlier.ticket, None, earlier
            else:
                running.ticket = await self._turn(demand, predicted_ttft_s)
            self._metrics.running.inc()
            try:
                yield
            finally:
                self._metrics.running.dec()
        except asyncio.CancelledError:
            if running.error is None:
                raise
            running.uncancel()
            raise running.error from None
        finally:
            self._end(name, running, earlier)

    def _end(
        self, name: tuple[str, RequestId], running: _Running, earlier: _Running | None
    ) -> None:
        """Gives back what a request has."""
        running.over = True
        ticket, lender = running.ticket, running.living_lender
        running.ticket = None
        if ticket is not None and lender is not None:
            lender.ticket = ticket
        elif ticket is not None:
            self._leave(ticket, running.completion_tokens())
        if self._requests.get(name) is running:
            del self._requests[name]
            heir = earlier if lender is None else lender
            if heir is not None and not heir.over:
                self._requests[name] = heir
        if not self._requests:
            self._idle.set()

    def cancel(self, request_id: str, tenant: str) -> None:
        """Ends a request with `CancelledError`. Raises `NotFoundError`, also for another tenant's."""
        running = self._requests.get((tenant, RequestId(request_id)))
        if running is None:
            raise NotFoundError("request", request_id)
        running.abort(CancelledError(f"request {request_id!r} was cancelled"))

    def refuse_new(self) -> None:
        """From now on, no request enters."""
        self._refuses = True

    async def follow_limits(self) -> None:
        """Applies changes of tenants' limits to those who are here. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(LIMITS_INTERVAL_S)
            for admitted in self._admission.refresh(time.monotonic()):
                self._tell(admitted, None)

    async def idle(self, timeout_s: float) -> bool:
        """Returns once no request is here; False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_all(self, error: BatonError) -> None:
        """Ends every request."""
        for running in tuple(self._requests.values()):
            running.abort(error)

    async def _turn(self, demand: Demand, predicted_ttft_s: Callable[[], float | None]) -> Ticket:
        """Returns when it is the request's turn: at once where there is a place, so that what was predicted is still true."""
        arrived_s = time.monotonic()
        verdict = self._admission.offer(demand, arrived_s, predicted_ttft_s())
        if isinstance(verdict, Reject):
            raise self._refused(verdict)
        ticket = verdict.ticket
        if isinstance(verdict, Admit):
            return ticket
        try:
            if verdict.displaced is not None:
                self._tell(*verdict.displaced)
            await self._wait(ticket, predicted_ttft_s)
            waited_s = time.monotonic() - arrived_s
            self._metrics.record_queue_wait(demand.priority, waited_s)
            self._check_budget(demand, waited_s + (predicted_ttft_s() or 0.0))
        except BaseException:
            self._leave(ticket)
            raise
        return ticket

    def _leave(self, ticket: Ticket, completion_tokens: int = 0) -> None:
        for admitted in self._admission.leave(ticket, time.monotonic(), completion_tokens):
            self._tell(admitted, None)

    async def _wait(self, ticket: Ticket, predicted_ttft_s: Callable[[], float | None]) -> None:
        """Returns when it is the request's turn. Raises `CapacityError` where that does not come in time for a first token."""
        queued = self._metrics.queued(ticket.demand.priority)
        turn = self._turns[ticket] = asyncio.get_running_loop().create_future()
        budget_s = ticket.demand.ttft_budget_s
        queued.inc()
        try:
            async with asyncio.timeout(None if math.isinf(budget_s) else budget_s) as timer:
                refusal = await turn
        except TimeoutError:
            if timer.expired():
                raise self._refused(self._admission.expire(ticket, predicted_ttft_s())) from None
            raise
        finally:
            queued.dec()
            del self._turns[ticket]
        if refusal is not None:
            raise self._refused(refusal)

    def _tell(self, ticket: Ticket, refusal: Reject | None) -> None:
        turn = self._turns[ticket]
        # One that is cancelled in this very moment leaves by itself, and gives its turn on.
        if not turn.done():
            turn.set_result(refusal)

    def _check_budget(self, demand: Demand, ttft_s: float) -> None:
        late_s = late_by_s(demand.ttft_budget_s, ttft_s)
        if late_s > 0:
            raise self._refused(too_late(late_s))

    def _refused(self, verdict: Reject) -> CapacityError:
        self._metrics.record_rejection(verdict.refusal.value)
        return CapacityError(verdict.message, retry_after_s=verdict.retry_after_s)
