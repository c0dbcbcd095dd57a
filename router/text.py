"""Text in and out of token ids: the tokenizer, and the output's text as its tokens arrive.

A `Tokenizer` is immutable and safe in any thread; encoding a long prompt is worth a thread of its own. `OutputText`, and the two
machines it is made of, belong to one request and are driven from the router's event loop.

`tokenizers.decoders.DecodeStream` is not used: it raises for good where byte-fallback tokens turn out to be no UTF-8, cannot give
up what it holds when the output ends, and decodes ever longer stretches while a model emits broken bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from tokenizers import decoders, models, pre_tokenizers

from baton.errors import FieldViolation, InvalidRequestError, ModelLoadError
from baton.types import SamplingParams
from router.chat import (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    ChatTemplate,
    ChatTurn,
    load_chat_template,
)
from router.control_tokens import ControlTokens
from router.token_bytes import byte_symbols, bytes_of

_TOKENIZER_FILE = "tokenizer.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_INCOMPLETE = 3
"""Most bytes, hence replacement characters, that a UTF-8 character can lack its last byte by."""
_CONTEXT_TOKENS = 8
_MAX_PENDING_TOKENS = 32
_STEP_TOKENS = 16
"""Decoded at once, where so many come together."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate | None = None) -> None:
        """Takes over `backend`."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self._control = None if template is None else ControlTokens(backend)
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        known = backend.get_vocab(with_added_tokens=True).values()
        self._textual = frozenset(known) - self._special

    @classmethod
    def load(cls, source: str) -> "Tokenizer":
        """From a checkpoint's directory, or a Hugging Face hub id. Reads files, or the network. Raises `ModelLoadError` naming what is
        unusable.
        """
        directory = _checkpoint_directory(source)
        path = directory / _TOKENIZER_FILE
        if not path.is_file():
            raise ModelLoadError(str(path), "no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelLoadError(str(path), f"not a tokenizer: {error}") from error
        return cls(backend, load_chat_template(directory))

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Token ids are the bytes of UTF-8: for engines whose vocabulary is 256 tokens without a meaning."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=byte_symbols(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones too. A model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """A prompt's tokens, with the special tokens that the tokenizer puts around a text; without them where the text goes on after
        another. A raw prompt is all one speaker's: strings of special tokens in it are those tokens, as everywhere with Hugging Face's
        tokenizers.
        """
        return self._encode(text, "prompt.text", add_special_tokens=begins)

    def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """The tokens of a conversation; its template alone writes special tokens, whatever the messages contain."""
        control = self._control
        if control is None or not self.must_quote(turns):
            return self.encode_rendered(self.render_chat(turns))
        mark = control.new_mark()
        quoted = [ChatTurn(turn.role, control.quote(turn.content, mark)) for turn in turns]
        return control.encode(self.render_chat(quoted), mark)

    def must_quote(self, turns: Sequence[ChatTurn]) -> bool:
        """Whether messages contain the text of special tokens, so that only `encode_chat` knows theirs from the template's."""
        control = self._control
        return control is not None and any(control.occur_in(turn.content) for turn in turns)

    def render_chat(self, turns: Sequence[ChatTurn]) -> str:
        """A conversation as its template writes it, every special token included."""
        if self._template is None:
            violation = FieldViolation("prompt.chat", "the model has no chat template")
            raise InvalidRequestError(violation)
        return self._template.render(turns)

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens of a rendered conversation, or of its end. Precondition: it need not be quoted."""
        return self._encode(text, "prompt.chat", add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones and unknown ones left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def special_text(self, token_id: int) -> str:
        """How a template writes a special token; empty for any other."""
        return (self._backend.id_to_token(token_id) or "") if token_id in self._special else ""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, also where that is no whole character; of a special one, how it is written."""
        return bytes_of(self._backend, token_id)

    def has_text(self, token_id: int) -> bool:
        """Whether a token can be part of a text: it is in the tokenizer's vocabulary and not special."""
        return token_id in self._textual

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises nothing narrower
            problem = f"the model's tokenizer cannot encode it: {error}"
            raise InvalidRequestError(FieldViolation(field, problem)) from error


def _checkpoint_directory(source: str) -> Path:
    directory = Path(source)
    if directory.is_dir():
        return directory
    files = [_TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE]
    try:
        return Path(snapshot_download(source, allow_patterns=files))
    except (OSError, HFValidationError) as error:
        problem = f"neither a directory nor a model that the hub gives: {error}"
        raise ModelLoadError(source, problem) from error


class Detokenizer:
    """Turns tokens into text one by one, and never gives out a character before all its bytes are there.

    Where a token's text depends on the tokens before it (a leading space, a character's bytes), so does what is given out: the joined
    texts are what the decoded output adds to the decoded prompt.

        context    tokens whose text is all given out; they decide how the pending ones read
        pending    tokens with text to come; their first `_sent` characters are given out already
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context_text: str | None
        """Of the context, once it was needed."""
        self._context, self._context_text = _context_of(tokenizer, prompt)
        self._pending: list[int] = []
        self._sent = 0

    def push(self, *token_ids: int) -> str:
        """The text that is complete with these tokens and was not before."""
        textual = [token_id for token_id in token_ids if self._tokenizer.has_text(token_id)]
        steps = range(0, len(textual), _STEP_TOKENS)
        return "".join(self._push(textual[at : at + _STEP_TOKENS]) for at in steps)

    def _push(self, token_ids: Sequence[int]) -> str:
        self._pending.extend(token_ids)
        text = self._pending_text()
        ready, settled = len(text.rstrip(_REPLACEMENT)), 0
        if text and ready == len(text):
            settled = self._settle(text, len(self._pending))
        elif len(self._pending) > _MAX_PENDING_TOKENS:
            # Held for so long, all but the last character are broken bytes.
            settled = self._settle(text, len(self._pending) - _MAX_INCOMPLETE - 1)
        ready = max(ready, settled)
        fresh = text[self._sent : ready]
        self._sent = max(self._sent, ready) - settled
        return fresh

    def flush(self) -> str:
        """What is still held, when the output has ended: replacement characters for a character that never came."""
        fresh = self._pending_text()[self._sent :] if self._pending else ""
        self._context, self._context_text, self._pending, self._sent = [], None, [], 0
        return fresh

    def _settle(self, text: str, count: int) -> int:
        """Makes the first `count` pending tokens the context; returns how much of `text`, the pending tokens' text, is theirs."""
        self._context, self._pending = self._pending[:count], self._pending[count:]
        self._context_text = None
        return len(text) - (len(self._pending_text()) if self._pending else 0)

    def _pending_text(self) -> str:
        text = self._tokenizer.decode(self._context + self._pending)
        known = self._context_text
        if known is None:
            known = self._context_text = self._tokenizer.decode(self._context)
        # A character that breaks off at the context's end, as a prompt may, becomes the output's.
        if text.startswith(known):
            return text[len(known) :]
        whole = known[:-_MAX_INCOMPLETE] + known[-_MAX_INCOMPLETE:].rstrip(_REPLACEMENT)
        if text.startswith(whole):
            return text[len(whole) :]
        # Bytes that are no UTF-8 make byte-fallback decoders doubt the bytes before them too; those stay given out.
        return self._tokenizer.decode(self._pending)


def _context_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], str]:
    """The prompt's end, and its text: a few tokens, from where a character begins."""
    textual = [token_id for token_id in prompt[-64:] if tokenizer.has_text(token_id)]
    counts = range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _MAX_INCOMPLETE + 1)
    best, fewest = (textual[-_CONTEXT_TOKENS:], ""), math.inf
    for count in counts:
        text = tokenizer.decode(textual[-count:])
        broken = text.count(_REPLACEMENT)
        if broken < fewest:
            best, fewest = (textual[-count:], text), broken
        if not broken:
            break
    return best


class StopMatcher:
    """Finds the first of several strings to be completed in a text that arrives in pieces; of those completed by the same character,
    the longest. What is found depends on the text alone, not on the pieces.

    `_progress[i]` is the length of the longest beginning of stop i that the text ends with (Knuth, Morris and Pratt); the longest of
    them is what must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """None is empty."""
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._borders = [_borders(stop) for stop in self._stops]
        self._progress = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be given out, and the stop that ends it. After a stop, nothing is held."""
        before, self._held = len(self._held), self._held + text
        for offset, character in enumerate(text, start=before + 1):
            for index, stop in enumerate(self._stops):
                self._progress[index] = self._advance(index, character)
                if self._progress[index] == len(stop):
                    fresh, self._held = self._held[: offset - len(stop)], ""
                    return fresh, stop
        free = len(self._held) - max(self._progress, default=0)
        fresh, self._held = self._held[:free], self._held[free:]
        return fresh, None

    def flush(self) -> str:
        """What is held back, when no more text can come."""
        fresh, self._held = self._held, ""
        return fresh

    def _advance(self, index: int, character: str) -> int:
        stop, borders, length = self._stops[index], self._borders[index], self._progress[index]
        while length and stop[length] != character:
            length = borders[length - 1]
        return length + (stop[length] == character)


def _borders(stop: str) -> list[int]:
    """For each beginning of a string, the length of its longest proper beginning that is also its end."""
    borders = [0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length - 1]
        borders.append(length + (stop[length] == character))
    return borders


@dataclass(frozen=True, slots=True, kw_only=True)
class TextUpdate:
    """What some tokens added to an output."""

    text: str
    """Complete characters that belong to no stop string."""
    consumed_tokens: int
    """Tokens of the push that belong to the output: all, or those up to the one that ended it, itself included."""
    stop: str | None = None
    """The stop string that ended the output."""
    stop_token_id: int | None = None
    """The stop token or end-of-sequence token that ended the output; its text is no part of the output's."""

    @property
    def ended(self) -> bool:
        """Whether a stop was met. Tokens that follow do not belong to the output."""
        return self.stop is not None or self.stop_token_id is not None


class OutputText:
    """One request's output text, across its attempts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        *,
        prompt: Sequence[int],
        eos_token_ids: Sequence[int],
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._has_stops = bool(sampling.stop)
        self._matcher = StopMatcher(sampling.stop)
        self._min_tokens = sampling.min_tokens
        ends = () if sampling.ignore_eos else eos_token_ids
        self._ends = frozenset((*sampling.stop_token_ids, *ends))
        self._num_tokens = 0
        self._ending: TextUpdate | None = None

    def push(self, token_ids: Sequence[int]) -> TextUpdate:
        """The output's next tokens. Once a stop was met, further ones are left out: none is consumed."""
        if self._ending is not None:
            return TextUpdate(text="", consumed_tokens=0)
        parts: list[str] = []
        for consumed, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            end = token_id if token_id in self._ends else None
            text, stop = ("", None) if end is not None else self._match(token_id)
            parts.append(text)
            if end is not None or stop is not None:
                self._ending = TextUpdate(
                    text="".join(parts), consumed_tokens=consumed, stop=stop, stop_token_id=end
                )
                return self._ending
        return TextUpdate(text="".join(parts), consumed_tokens=len(token_ids))

    @property
    def needs_every_token(self) -> bool:
        """Whether each token's text can end the output: then `push` takes them as they come. Else they may be counted by `scan` first, and
        many of them turned into text at once.
        """
        return self._has_stops

    def scan(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens `push` would consume; their text is made by `text_of` later. Precondition: not `needs_every_token`."""
        if self._ending is not None:
            return 0
        if self._ends.isdisjoint(token_ids):
            return len(token_ids)
        consumed = next(at for at, token_id in enumerate(token_ids, 1) if token_id in self._ends)
        end = token_ids[consumed - 1]
        self._ending = TextUpdate(text="", consumed_tokens=consumed, stop_token_id=end)
        return consumed

    @property
    def stop_token_id(self) -> int | None:
        """The token that ended the output."""
        return None if self._ending is None else self._ending.stop_token_id

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that is complete with these tokens, which were scanned and are the next ones."""
        if self._ending is not None and token_ids[-1] == self._ending.stop_token_id:
            token_ids = token_ids[:-1]
        return self._detokenizer.push(*token_ids)

    def finish(self) -> str:
        """The rest of the text, when the output has ended: what was held because it might have become a character or a stop."""
        if self._ending is not None and self._ending.stop is not None:
            return ""
        return self._matcher.flush() + self._detokenizer.flush()

    def _match(self, token_id: int) -> tuple[str, str | None]:
        text = self._detokenizer.push(token_id)
        if self._num_tokens <= self._min_tokens:
            return text, None
        return self._matcher.push(text)
