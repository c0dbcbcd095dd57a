"""A request's outputs, one for each of its completions, between the attempts that produce them and the stream that takes them.

Attempts put tokens in without ever waiting; the stream takes whatever is there as one piece, so that a slow reader delays
nobody and gets larger pieces. What was put in counts as sent: the next attempt goes on after it. Used on the router's event
loop; an output has one producer at a time, all have one consumer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.types import FinishReason, PositionLogprobs, TokenChunk
from router.text import OutputText

MAX_PIECE_TOKENS = 256
"""Bounds a message: with 20 log-probabilities for each token, about 100 kB."""
TOKEN_BYTES = 4
LOGPROB_BYTES = 12


@dataclass(frozen=True, slots=True)
class Piece:
    """New output, for one message."""

    text: str
    tokens: TokenChunk | None
    """None where only text was left, held until the end."""
    choice: int = 0
    """Which of the completions."""


class Output:
    """One completion's.

    [0, given)      tokens that the client has, or knew
    [given, texted) whose text was made already: what it depends on had to be known, or somebody asked
    [texted, end)   counted only; their text is made when they are taken
    """

    def __init__(
        self,
        text: OutputText,
        max_tokens: int,
        *,
        max_unread_bytes: int,
        choice: int = 0,
        known_tokens: int = 0,
        known_characters: int = 0,
    ) -> None:
        """So many tokens, and so many characters of their text, the client has: they are taken in, but not given out.
        `max_unread_bytes` bounds what is held for the stream, in bytes of its messages.
        """
        self._text = text
        self._max_tokens = max_tokens
        self._max_unread_bytes = max_unread_bytes
        self._unread_bytes = 0
        self._choice = choice
        self._given = known_tokens
        self._known_characters = known_characters
        self._texted = 0
        self._fresh: deque[tuple[int, str]] = deque()
        """Text to be given out, and how many tokens the output had with it."""
        self._said: list[str] = []
        self._logprobs: list[PositionLogprobs | None] = []
        """Of each token, where they were asked for."""
        self._finished = False
        self._closed = False
        self.watch(lambda: None, lambda: None)
        self.generated: list[int] = []
        """Every token of the output."""
        self.stop: str | None = None
        """The stop string that ended it."""
        self.stop_token_id: int | None = None
        """The token that ended it."""

    @property
    def end(self) -> FinishReason | None:
        """Why no token can follow, whether or not a worker said so; None while some can."""
        if self.stop is not None or self.stop_token_id is not None:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.generated) >= self._max_tokens else None

    @property
    def said(self) -> str:
        """All of its text so far."""
        self._make_text(len(self.generated))
        return "".join(self._said)

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...]:
        """The tokens', where they were asked for."""
        return tuple(each for each in self._logprobs if each is not None)

    @property
    def overflowed(self) -> bool:
        """Whether the stream takes so little that the output is given up."""
        return self._unread_bytes > self._max_unread_bytes

    def put(self, chunk: TokenChunk) -> bool:
        """Takes the next tokens. True where no more are wanted: a stop string was met, which workers cannot see, a worker went on past
        the end, or the stream does not take what is there. Where a token ends the output, the worker knows, and its own word is waited for.
        """
        offered, before = chunk.token_ids, len(self.generated)
        room = self._max_tokens - before
        ids = offered if len(offered) <= room else offered[:room]
        if self._text.needs_every_token:
            update = self._text.push(ids)
            count, text = update.consumed_tokens, update.text
            self.stop = self.stop or update.stop
        else:
            count, text = self._text.scan(ids), ""
        if self._text.stop_token_id is not None:
            self.stop_token_id = self._text.stop_token_id
        if count:
            self.generated.extend(ids if count == len(ids) else ids[:count])
            after = before + count
            if self._text.needs_every_token:
                self._texted = after
                self._say(text)
            if chunk.logprobs:
                self._logprobs.extend([None] * (before - len(self._logprobs)))
                self._logprobs.extend(chunk.logprobs[:count])
            first = max(before, self._given)
            if first < after:
                self._unread_bytes += self._token_bytes(first, after)
            self._on_change()
        return count < len(offered) or self.stop is not None or self.overflowed

    def finish(self) -> None:
        """The output is complete: the text that was held back is given out too. Idempotent."""
        self._finished = True
        self._on_change()

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        if not self._closed:
            self._closed = True
            self._on_close()
            self._on_change()
            # Whoever watched may hold this output too: neither is to wait for a full collection.
            self.watch(lambda: None, lambda: None)

    @property
    def closed(self) -> bool:
        """Whether nothing more will come, beside what was not taken yet."""
        return self._closed

    def watch(self, on_change: Callable[[], None], on_close: Callable[[], None]) -> None:
        """`on_change` is called when something may be to be taken, or nothing more will come, then after `on_close`."""
        self._on_change: Callable[[], None] = on_change
        self._on_close: Callable[[], None] = on_close

    def take(self) -> Piece | None:
        """Everything new, as far as it fits one message; None where nothing is."""
        given, last = self._given, len(self.generated)
        end = min(last, given + MAX_PIECE_TOKENS)
        self._make_text(end)
        if self._finished and end == last:
            self._finished = False
            self._say(self._text.finish())
        text = ""
        while self._fresh and self._fresh[0][0] <= end:
            text += self._fresh.popleft()[1]
        if end <= given:
            if not text:
                return None
            tokens = None
        else:
            logprobs = tuple(each for each in self._logprobs[given:end] if each is not None)
            tokens = TokenChunk(given, tuple(self.generated[given:end]), logprobs)
            self._given = end
        if not self.overflowed:
            self._unread_bytes -= len(text)
            if tokens is not None:
                self._unread_bytes -= self._token_bytes(given, end)
        return Piece(text, tokens, self._choice)

    def _make_text(self, end: int) -> None:
        """Of the first `end` tokens."""
        if self._texted < end:
            text = self._text.text_of(self.generated[self._texted : end])
            self._texted = end
            self._say(text)

    def _say(self, text: str) -> None:
        self._said.append(text)
        known = self._known_characters
        if known:
            self._known_characters = max(0, known - len(text))
            text = text[known:]
        if text:
            self._fresh.append((self._texted, text))
            self._unread_bytes += len(text)

    def _token_bytes(self, first: int, end: int) -> int:
        """About what tokens take on the wire."""
        if not self._logprobs:
            return TOKEN_BYTES * (end - first)
        entries = sum(1 + len(each.top) for each in self._logprobs[first:end] if each is not None)
        return TOKEN_BYTES * (end - first) + LOGPROB_BYTES * entries


class Outputs:
    """All completions of a request, as its stream takes them."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = deque(outputs)
        self._changed = asyncio.Event()
        self._rest: asyncio.TimerHandle | None = None
        """Runs while nothing is to be taken, except the end."""
        self._num_open = sum(not output.closed for output in outputs)
        for output in outputs:
            output.watch(self._on_change, self._on_close)

    async def take(self, rest_s: float = 0.0) -> Piece | None:
        """The next piece, of each completion in turn; None once all was taken and every output is closed. What comes within `rest_s` is
        joined, unless the end comes too.
        """
        if rest_s and self._num_open:
            self._rest = asyncio.get_running_loop().call_later(rest_s, self._rested)
        try:
            while True:
                if self._rest is None or not self._num_open:
                    for output in tuple(self._outputs):
                        self._outputs.rotate(-1)
                        piece = output.take()
                        if piece is not None:
                            return piece
                    if not self._num_open:
                        return None
                self._changed.clear()
                await self._changed.wait()
        finally:
            if self._rest is not None:
                self._rest.cancel()
                self._rest = None

    def _on_change(self) -> None:
        if self._rest is None or not self._num_open:
            self._changed.set()

    def _on_close(self) -> None:
        self._num_open -= 1

    def _rested(self) -> None:
        self._rest = None
        self._changed.set()
