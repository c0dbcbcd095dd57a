"""One request's output between its attempts, which produce it, and its client's stream, which takes it.

Attempts put tokens in without ever waiting; the stream takes whatever is there as one piece, so that a slow reader delays
nobody and gets larger pieces. What was put in counts as sent: the next attempt goes on after it. Used on the router's event
loop; one producer at a time, one consumer.
"""

import asyncio
from dataclasses import dataclass, replace

from baton.types import FinishReason, TokenChunk
from router.text import OutputText

MAX_PIECE_TOKENS = 256
"""Bounds a message: with 20 log-probabilities for each token, about 100 kB."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New output, for one message."""

    text: str
    tokens: TokenChunk | None
    """None where only text was left, held until the end."""


class Output:
    """See the module docstring."""

    def __init__(self, text: OutputText, max_tokens: int) -> None:
        self._text = text
        self._max_tokens = max_tokens
        self._pieces: list[Piece] = []
        self._closed = False
        self._changed = asyncio.Event()
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

    def put(self, chunk: TokenChunk) -> bool:
        """Takes the next tokens. True where no more are wanted: a stop string was met, which workers cannot see, or a worker went on
        past the end. Where a token ends the output, the worker knows, and its own word is waited for.
        """
        room = self._max_tokens - len(self.generated)
        update = self._text.push(chunk.token_ids[:room])
        taken = replace(
            chunk,
            token_ids=chunk.token_ids[: update.consumed_tokens],
            logprobs=chunk.logprobs[: update.consumed_tokens],
        )
        self.stop = self.stop or update.stop
        if update.stop_token_id is not None:
            self.stop_token_id = update.stop_token_id
        if taken.token_ids:
            self.generated.extend(taken.token_ids)
            self._add(Piece(update.text, taken))
        return self.stop is not None or len(taken.token_ids) < len(chunk.token_ids)

    def finish(self) -> None:
        """The output is complete: gives out the text that was held back."""
        rest = self._text.finish()
        if rest:
            self._add(Piece(rest, None))

    def close(self) -> None:
        """Nothing more will come. Idempotent."""
        self._closed = True
        self._changed.set()

    async def take(self) -> Piece | None:
        """Everything new, as far as it fits one message; None once all was taken and the output is closed."""
        while not self._pieces:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        piece = self._pieces.pop(0)
        while self._pieces and _length(piece) + _length(self._pieces[0]) <= MAX_PIECE_TOKENS:
            piece = _joined(piece, self._pieces.pop(0))
        return piece

    def _add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._changed.set()


def _length(piece: Piece) -> int:
    return 0 if piece.tokens is None else len(piece.tokens.token_ids)


def _joined(first: Piece, second: Piece) -> Piece:
    text = first.text + second.text
    if first.tokens is None or second.tokens is None:
        return Piece(text, first.tokens or second.tokens)
    tokens = replace(
        first.tokens,
        token_ids=first.tokens.token_ids + second.tokens.token_ids,
        logprobs=first.tokens.logprobs + second.tokens.logprobs,
    )
    return Piece(text, tokens)
