"""Where an attempt's Prefill call and decode's pulls meet. Pure bookkeeping on the worker's event loop; knows no engine.

    Prefill call    open ── keep ── keep ─────── computed ──────────── wait_handed ──▶ close
    decode             ready(last) ▶ Underway, pull ▶ ready ▶ Ready, pull ▶ last pull ─┘

Either side may come first. The Prefill call owns the attempt: when it leaves, in any way, every waiter is refused and later
pulls find nothing. A key is free for another attempt as soon as its call has left.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from baton.errors import AlreadyExistsError, BatonError, PreconditionError
from baton.kv.spec import SealedKV
from baton.transfer.base import Ready, Refused, Underway
from baton.types import AttemptKey


class Handoff:
    """One attempt's KV, from the moment its Prefill call arrives until decode has it all."""

    def __init__(self, num_tokens: int, copies: Iterable[tuple[int, int]] = ()) -> None:
        """`copies`: token ranges of which the engine makes copies, to be told by `keep`."""
        self.num_tokens = num_tokens
        """Length of the sequence: KV of tokens [0, num_tokens) is to be handed over."""
        self.kv_bytes = 0
        """Pulled so far."""
        loop = asyncio.get_running_loop()
        self._copies: dict[tuple[int, int], asyncio.Future[SealedKV | None]] = {
            copy: loop.create_future() for copy in copies
        }
        self._outcome: asyncio.Future[Ready | Refused] = loop.create_future()
        self._handed: asyncio.Future[None] = loop.create_future()
        self._pulling = 0
        self._last_pulled = False

    def computed(self, ready: Ready) -> None:
        """The KV can be pulled."""
        if not self._outcome.done():
            self._outcome.set_result(ready)

    @property
    def copying(self) -> bool:
        """Whether the engine still makes copies."""
        return not all(copy.done() for copy in self._copies.values())

    def keep(self, first: int, last: int, kv: SealedKV | None) -> None:
        """Keeps the copy of tokens [first, last) for the pull that asks for them; None where it failed."""
        copy = self._copies.get((first, last))
        if copy is not None and not copy.done():
            copy.set_result(kv)

    async def take(self, first: int, last: int) -> SealedKV | None:
        """The copy of just these tokens, once, waiting for it where it is to come; None where there is none."""
        copy = self._copies.get((first, last))
        if copy is None:
            return None
        await asyncio.shield(copy)
        self._copies.pop((first, last), None)
        return copy.result()

    def end(self, error: BatonError) -> None:
        """No KV can be pulled (any more); whoever waits learns why. The first end stands."""
        if not self._outcome.done():
            self._outcome.set_result(Refused(error.reason, error.message))
        for first, last in self._copies:
            self.keep(first, last, None)
        if not self._handed.done():
            self._handed.set_exception(error)
            self._handed.exception()  # nobody need be waiting

    def raise_if_ended(self) -> None:
        """Raises the error of `end`."""
        if self._handed.done():
            self._handed.result()

    async def outcome(self, last: int | None = None) -> Ready | Underway | Refused:
        """Waits until the KV can be pulled, or never can. With `last`: or until the copy that ends there is kept."""
        copy = next((copy for (_, end), copy in self._copies.items() if end == last), None)
        if copy is not None:
            either: list[asyncio.Future[Any]] = [self._outcome, copy]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._outcome.done() and copy.result() is not None:
                return Underway()
        return await asyncio.shield(self._outcome)

    async def wait_handed(self) -> None:
        """Waits until decode has pulled up to the last token. Raises the error of `end`."""
        await asyncio.shield(self._handed)

    @contextmanager
    def pulling(self, first: int, last: int) -> Iterator[Self]:
        """One pull; KV is not handed over while another pull runs. Raises `PreconditionError` where there is no such KV to pull."""
        copy = self._copies.get((first, last))
        is_there = self._outcome.done() or (copy is not None and copy.done())
        if not is_there or self._handed.done():
            raise PreconditionError("no computed KV is held for this attempt")
        if not 0 <= first < last <= self.num_tokens:
            raise PreconditionError(f"tokens [{first}, {last}) are not in [0, {self.num_tokens})")
        self._pulling += 1
        try:
            yield self
            self._last_pulled |= last == self.num_tokens
        finally:
            self._pulling -= 1
            if self._last_pulled and not self._pulling and not self._handed.done():
                self._handed.set_result(None)


class Handoffs:
    """All attempts on this worker, and the ready calls that came before their attempt."""

    def __init__(self) -> None:
        self._open: dict[AttemptKey, Handoff] = {}
        self._expected: dict[AttemptKey, list[asyncio.Future[Handoff]]] = {}

    @contextmanager
    def attempt(
        self, key: AttemptKey, num_tokens: int, copies: Iterable[tuple[int, int]] = ()
    ) -> Iterator[Handoff]:
        """Held by the Prefill call. Raises `AlreadyExistsError` where the key is held."""
        if key in self._open:
            raise AlreadyExistsError(f"attempt {key} is already here")
        handoff = self._open[key] = Handoff(num_tokens, copies)
        for waiter in self._expected.pop(key, []):
            if not waiter.done():
                waiter.set_result(handoff)
        try:
            yield handoff
        except BatonError as error:
            handoff.end(error)
            raise
        finally:
            del self._open[key]
            handoff.end(PreconditionError(f"attempt {key} ended"))

    def find(self, key: AttemptKey) -> Handoff | None:
        return self._open.get(key)

    async def arrival(self, key: AttemptKey) -> Handoff:
        """The attempt, once its Prefill call is here. The caller bounds the wait. Raises the error given to `refuse_expected`."""
        handoff = self._open.get(key)
        if handoff is not None:
            return handoff
        waiter: asyncio.Future[Handoff] = asyncio.get_running_loop().create_future()
        self._expected.setdefault(key, []).append(waiter)
        try:
            return await waiter
        finally:
            waiters = self._expected.get(key, [])
            if waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self._expected[key]

    def refuse_expected(self, error: BatonError, key: AttemptKey | None = None) -> None:
        """Ends the waits for an attempt that will not come; for all of them where no key is given."""
        keys = list(self._expected) if key is None else [key]
        for each in keys:
            for waiter in self._expected.pop(each, []):
                if not waiter.done():
                    waiter.set_exception(error)

    def check_integrity(self) -> None:
        """Raises AssertionError where a waiter was left behind."""
        assert all(waiters for waiters in self._expected.values())
        assert not self._expected.keys() & self._open.keys()
