"""One turn of a session while it runs: what it builds on, and what it makes of the session at its end.

Belongs to the task that runs the turn, on the router's event loop; made by `router.sessions.manager`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from baton.errors import SessionLostError
from baton.types import FinishReason, TokenChunk, TurnRecord, WorkerId
from router.chat import ChatTurn
from router.placement import Resident
from router.sessions.prompt import history_after
from router.sessions.record import (
    Answered,
    History,
    Lease,
    Session,
    SessionKey,
    is_same_turn,
    mark_in,
)

MAX_EARLIER = 15
"""Requests before the last one that a session knows to be turns of its."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnResult:
    """How a turn went that finished."""

    model: str
    prompt: Sequence[int]
    """With the history."""
    output: TokenChunk
    """All of it."""
    reason: FinishReason
    seed: int
    answer: str
    exact: bool
    """The answer is the text of the output's tokens, but for a special token that ends it."""
    cached_tokens: int
    cache_salt: str = ""
    prefill_worker: str
    decode_worker: str


class Turn:
    """See the module docstring."""

    def __init__(
        self,
        session: Session,
        history: History,
        lease: Lease,
        *,
        commit: "Callable[[Turn, Session], Awaitable[None]]",
        clock: Callable[[], float],
        outlives: bool,
    ) -> None:
        """`session` and `history` are what they were before the turn."""
        self.session = session
        self.history = history
        self.lease = lease
        self.messages: Sequence[ChatTurn] = ()
        """What the client says in it; empty where it is no chat."""
        self.finished = False
        self.outlives = outlives
        """Workers hold it: where this router ends it, another one may go on with it, under the same lease."""
        self._commit = commit
        self._clock = clock
        self._ending = False
        self._task: asyncio.Task[object] | None = None
        self._lost: SessionLostError | None = None

    @property
    def key(self) -> SessionKey:
        return self.session.key

    @property
    def is_past(self) -> bool:
        """It is the last turn that the session has, and is read, or asked for, once more."""
        return is_same_turn(self.session.last_lease_id, self.lease.lease_id)

    @property
    def number(self) -> int:
        """1 for the session's first."""
        return self.session.turns + (not self.is_past)

    def record(self) -> TurnRecord:
        """What another router must know to go on with it."""
        said = tuple((message.role, message.content) for message in self.messages)
        return TurnRecord(self.key.session_id, self.lease.lease_id, said)

    def resident(self, prompt: Sequence[int], cache_salt: str, within_s: float) -> Resident | None:
        """Where the KV of this turn's prompt is, where the last turn ended so shortly ago that its worker may not have reported it."""
        known = len(self.history.tokens)
        recent = self._clock() - self.session.updated_s < within_s
        if not recent or not known or cache_salt != self.session.cache_salt:
            return None
        if list(prompt[:known]) != self.history.tokens.tolist():
            return None
        # The last token of an output is not computed.
        return Resident(WorkerId(self.session.decode_worker), known - 1)

    async def finish(self, result: TurnResult) -> None:
        """Makes the turn part of the session. Raises `SessionLostError`, or `UnavailableError` where the store fails; then it is none.
        No effect on one that is past.
        """
        if self.is_past:
            return
        before, self._ending = self.session, True
        history = history_after(
            self.history,
            self.messages,
            prompt=result.prompt,
            output=result.output.token_ids,
            answer=result.answer,
            exact=result.exact,
        )
        earlier = (*before.earlier_marks, mark_in(before.last_lease_id))
        if mark_in(self.lease.lease_id):
            answered = Answered(result.seed, result.reason, result.output)
            history = replace(history, answered=answered)
        self.history = history
        await self._commit(
            self,
            replace(
                before,
                model=result.model,
                updated_s=self._clock(),
                turns=self.number,
                history_tokens=len(result.prompt) + len(result.output.token_ids),
                prompt_tokens=before.prompt_tokens + len(result.prompt),
                cached_tokens=before.cached_tokens + result.cached_tokens,
                completion_tokens=before.completion_tokens + len(result.output.token_ids),
                last_cached_tokens=result.cached_tokens,
                prefill_worker=result.prefill_worker,
                decode_worker=result.decode_worker,
                cache_salt=result.cache_salt,
                last_lease_id=self.lease.lease_id,
                earlier_marks=tuple(filter(None, earlier))[-MAX_EARLIER:],
            ),
        )
        self.finished = True

    def lost(self, why: str) -> SessionLostError:
        """What a turn ends with whose session is its no more."""
        return SessionLostError(f"session {self.key.session_id!r} is lost: {why}")

    def lose(self, why: str) -> None:
        """Ends the turn at its next await. For other tasks than its own. No effect on one that is being written: the store's answer to
        that tells whether the lease was held, and a renewal that comes after it finds none.
        """
        if self._lost is None and self._task is not None and not self._ending:
            self._lost = self.lost(why)
            self._task.cancel()

    @contextmanager
    def losable(self) -> Iterator[None]:
        """The turn runs inside the context, in this task."""
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            yield
        except asyncio.CancelledError:
            if self._lost is None:
                raise
            self._task.uncancel()
            raise self._lost from None
        finally:
            self._task = None
