"""A request's outputs, one for each of its completions, between the attempts that produce them and the stream that takes them.

Attempts put tokens in without ever waiting; the stream takes whatever is there as one piece, so that a slow reader delays
nobody and gets larger pieces. What was put in counts as sent: the next attempt goes on after it. Used on the router's event
loop; an output has one producer at a time, all have one consumer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    """One completion's."""

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
        self._known_tokens = known_tokens
        self._known_characters = known_characters
        self._pieces: list[Piece] = []
        self._said: list[str] = []
        self._untold: list[TokenChunk] = []
        """Tokens after those of the pieces."""
        self._closed = False
        self._on_change: Callable[[], None] = lambda: None
        self._on_close: Callable[[], None] = lambda: None
        self.generated: list[int] = []
        """Every token of the output."""
        self.logprobs: list[PositionLogprobs] = []
        """Theirs, where they were asked for."""
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
        self._tell()
        return "".join(self._said)

    @property
    def overflowed(self) -> bool:
        """Whether the stream takes so little that the output is given up."""
        return self._unread_bytes > self._max_unread_bytes

    def put(self, chunk: TokenChunk) -> bool:
        """Takes the next tokens. True where no more are wanted: a stop string was met, which workers cannot see, a worker went on past
        the end, or the stream does not take what is there. Where a token ends the output, the worker knows, and its own word is waited for.
        """
        room = self._max_tokens - len(self.generated)
        ids = chunk.token_ids if len(chunk.token_ids) <= room else chunk.token_ids[:room]
        immediate = self._text.needs_every_token
        update = self._text.push(ids) if immediate else self._text.scan(ids)
        taken = _until(chunk, update.consumed_tokens)
        self.stop = self.stop or update.stop
        if update.stop_token_id is not None:
            self.stop_token_id = update.stop_token_id
        if taken.token_ids:
            self.generated.extend(taken.token_ids)
            self.logprobs.extend(taken.logprobs)
            if immediate:
                self._add(update.text, taken)
            else:
                self._untold.append(taken)
                self._unread_bytes += self._unknown_bytes(taken)
            self._on_change()
        cut = len(taken.token_ids) < len(chunk.token_ids)
        return cut or self.stop is not None or self.overflowed

    def finish(self) -> None:
        """The output is complete: gives out the text that was held back."""
        self._tell()
        rest = self._text.finish()
        if rest:
            self._add(rest, None)
            self._on_change()

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        if not self._closed:
            self._closed = True
            self._on_close()
            self._on_change()

    @property
    def closed(self) -> bool:
        """Whether nothing more will come, beside what was not taken yet."""
        return self._closed

    def watch(self, on_change: Callable[[], None], on_close: Callable[[], None]) -> None:
        """`on_change` is called when something may be to be taken, or nothing more will come, then after `on_close`."""
        self._on_change, self._on_close = on_change, on_close

    def take(self) -> Piece | None:
        """Everything new, as far as it fits one message; None where nothing is."""
        self._tell()
        if not self._pieces:
            return None
        piece = self._pieces.pop(0)
        while self._pieces and _length(piece) + _length(self._pieces[0]) <= MAX_PIECE_TOKENS:
            piece = _joined(piece, self._pieces.pop(0))
        if not self.overflowed:
            self._unread_bytes -= _bytes(piece)
        return piece

    def _tell(self) -> None:
        """Makes pieces of the tokens whose text nothing depended on so far."""
        untold, self._untold = self._untold, []
        while untold:
            chunk = untold.pop(0)
            while untold and len(chunk.token_ids) + len(untold[0].token_ids) <= MAX_PIECE_TOKENS:
                chunk = _joined_chunk(chunk, untold.pop(0))
            self._unread_bytes -= self._unknown_bytes(chunk)
            self._add(self._text.text_of(chunk.token_ids), chunk)

    def _add(self, text: str, tokens: TokenChunk | None) -> None:
        self._said.append(text)
        fresh = text[self._known_characters :]
        self._known_characters -= len(text) - len(fresh)
        if tokens is not None and tokens.first_index < self._known_tokens:
            tokens = _after(tokens, self._known_tokens)
        if fresh or tokens is not None:
            piece = Piece(fresh, tokens, self._choice)
            self._unread_bytes += _bytes(piece)
            self._pieces.append(piece)

    def _unknown_bytes(self, tokens: TokenChunk) -> int:
        """About what the client lacks of it."""
        known = tokens.first_index < self._known_tokens
        unknown = _after(tokens, self._known_tokens) if known else tokens
        return 0 if unknown is None else _token_bytes(unknown)


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


def _until(chunk: TokenChunk, count: int) -> TokenChunk:
    """The chunk's first tokens."""
    if count == len(chunk.token_ids):
        return chunk
    return TokenChunk(chunk.first_index, chunk.token_ids[:count], chunk.logprobs[:count])


def _after(chunk: TokenChunk, index: int) -> TokenChunk | None:
    """The chunk's tokens from an output position on, where there are any."""
    known = index - chunk.first_index
    if known >= len(chunk.token_ids):
        return None
    return TokenChunk(index, chunk.token_ids[known:], chunk.logprobs[known:])


def _length(piece: Piece) -> int:
    return 0 if piece.tokens is None else len(piece.tokens.token_ids)


def _bytes(piece: Piece) -> int:
    """About what it takes on the wire; joining pieces does not change it."""
    return len(piece.text) + (0 if piece.tokens is None else _token_bytes(piece.tokens))


def _token_bytes(tokens: TokenChunk) -> int:
    entries = sum(1 + len(position.top) for position in tokens.logprobs)
    return TOKEN_BYTES * len(tokens.token_ids) + LOGPROB_BYTES * entries


def _joined(first: Piece, second: Piece) -> Piece:
    text = first.text + second.text
    if first.tokens is None or second.tokens is None:
        return replace(first, text=text, tokens=first.tokens or second.tokens)
    return replace(first, text=text, tokens=_joined_chunk(first.tokens, second.tokens))


def _joined_chunk(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    return TokenChunk(
        first.first_index, first.token_ids + second.token_ids, first.logprobs + second.logprobs
    )
