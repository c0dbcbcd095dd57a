"""How answers are written: the JSON of chats and of plain completions, whole and in pieces.

A piece is written once for each message with tokens, so its JSON is put together from parts that are ready, and only the text is
encoded. Pure; a form belongs to one request.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.v1 import common_pb2, inference_pb2
from router.http.openai.logprobs import Vocabulary

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What every object of one answer begins with."""

    id: str
    created: int
    """Seconds since the epoch."""
    model: str
    fingerprint: str


@dataclass(slots=True)
class Choice:
    """One completion, as far as it has come."""

    parts: list[str] = field(default_factory=list)
    positions: list[common_pb2.PositionLogprobs] = field(default_factory=list)
    characters: int = 0
    """Of the tokens whose log-probabilities were told."""


class Form(Protocol):
    """What differs between chats and plain completions."""

    object: str
    piece_object: str
    prefix: str
    """Of the answer's id."""

    def opening(self) -> str | None:
        """What a choice of a stream begins with: its content, as JSON; None for nothing."""
        ...

    def piece(self, text: str) -> str:
        """New text, as JSON."""
        ...

    def closing(self) -> str:
        """The content of a choice's last piece, as JSON."""
        ...

    def logprobs(self, choice: Choice, positions: Iterable[common_pb2.PositionLogprobs]) -> Any:
        """Those of the positions that follow."""
        ...

    def whole(self, text: str) -> dict[str, Any]:
        """The content of a whole choice."""
        ...


class ChatForm:
    """Of `/v1/chat/completions`."""

    object = "chat.completion"
    piece_object = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def opening(self) -> str | None:
        return '"delta":{"role":"assistant","content":"","refusal":null}'

    def piece(self, text: str) -> str:
        return f'"delta":{{"content":{_encode(text)}}}'

    def closing(self) -> str:
        return '"delta":{}'

    def logprobs(self, choice: Choice, positions: Iterable[common_pb2.PositionLogprobs]) -> Any:  # noqa: ARG002
        each = self._vocabulary.entry
        content = [
            {**each(position.chosen), "top_logprobs": [each(top) for top in position.top]}
            for position in positions
        ]
        return {"content": content, "refusal": None}

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class TextForm:
    """Of `/v1/completions`."""

    object = "text_completion"
    piece_object = "text_completion"
    prefix = "cmpl-"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def opening(self) -> str | None:
        return None

    def piece(self, text: str) -> str:
        return f'"text":{_encode(text)}'

    def closing(self) -> str:
        return '"text":""'

    def logprobs(self, choice: Choice, positions: Iterable[common_pb2.PositionLogprobs]) -> Any:
        named, value = self._vocabulary.name, self._vocabulary.logprob
        tokens, chosen, tops, offsets = [], [], [], []
        for position in positions:
            name = named(position.chosen.token_id)
            tokens.append(name)
            chosen.append(value(position.chosen))
            top = {named(each.token_id): value(each) for each in position.top}
            tops.append({**top, name: value(position.chosen)})
            offsets.append(choice.characters)
            choice.characters += self._vocabulary.characters(position.chosen.token_id)
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Pieces:
    """The events of one stream."""

    def __init__(self, form: Form, heading: Heading, *, with_usage: bool) -> None:
        self._form = form
        head = {
            "id": heading.id,
            "object": form.piece_object,
            "created": heading.created,
            "model": heading.model,
            "system_fingerprint": heading.fingerprint,
        }
        self._head = "data: " + _encode(head)[:-1]
        self._usage = ',"usage":null' if with_usage else ""
        self._with_usage = with_usage

    def opening(self, index: int) -> str:
        """A choice begins; may be empty."""
        content = self._form.opening()
        return "" if content is None else self._event(index, content)

    def piece(self, index: int, choice: Choice, chunk: inference_pb2.Chunk) -> str:
        """New output; empty where nothing is to be told of it."""
        positions = chunk.tokens.logprobs
        if positions:
            logprobs = _encode(self._form.logprobs(choice, positions))
            return self._event(index, self._form.piece(chunk.text), logprobs)
        return self._event(index, self._form.piece(chunk.text)) if chunk.text else ""

    def closing(self, index: int, reason: str) -> str:
        """A choice ends."""
        return self._event(index, self._form.closing(), reason=f'"{reason}"')

    def end(self, usage: dict[str, Any]) -> str:
        """The last events."""
        done = "data: [DONE]\n\n"
        if not self._with_usage:
            return done
        return f'{self._head},"choices":[],"usage":{_encode(usage)}}}\n\n{done}'

    def _event(self, index: int, content: str, logprobs: str = "null", reason: str = "null") -> str:
        return (
            f'{self._head},"choices":[{{"index":{index},{content},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}]{self._usage}}}\n\n'
        )


def whole(
    form: Form,
    heading: Heading,
    choices: Iterable[tuple[Choice, str]],
    usage: dict[str, Any],
) -> bytes:
    """A whole answer; each choice with its reason to finish."""
    entries = []
    for index, (choice, reason) in enumerate(choices):
        positions = choice.positions
        entries.append(
            {
                "index": index,
                **form.whole("".join(choice.parts)),
                "logprobs": form.logprobs(choice, positions) if positions else None,
                "finish_reason": reason,
            }
        )
    answer = {
        "id": heading.id,
        "object": form.object,
        "created": heading.created,
        "model": heading.model,
        "system_fingerprint": heading.fingerprint,
        "choices": entries,
        "usage": usage,
    }
    return _encode(answer).encode()


def usage_of(each: Iterable[inference_pb2.Usage]) -> dict[str, Any]:
    """Over all prompts of a request."""
    prompt = completion = cached = 0
    for usage in each:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
