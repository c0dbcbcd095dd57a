"""What the answers look like: for the served OpenAPI document alone. Answers are written by `router.http.openai.forms`, without these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """An object with no other fields than these."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Document):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Document):
    """The body of every answer that is no success, and the last event of a stream that failed."""

    error: ErrorDetail


class PromptTokensDetails(Document):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(Document):
    """Tokens of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(Document):
    """One token at one position."""

    token: str
    logprob: float
    bytes: list[int] | None


class PositionLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Document):
    """Of a message."""

    content: list[PositionLogprob]
    refusal: None


class ChatMessage(Document):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


FinishReason = Literal["stop", "length"]


class ChatChoice(Document):
    """One of the n."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Document):
    """The answer to `POST /v1/chat/completions` that is no stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Document):
    """Of a text; all lists are of one length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Document):
    """One of the n, for one of the prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class Completion(Document):
    """The answer to `POST /v1/completions` that is no stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Model(Document):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Longest sequence, prompt and output together."""


class Models(Document):
    """One, or none while no worker has told its name."""

    object: Literal["list"]
    data: list[Model]


_ERRORS = {"model": Error, "description": "What went wrong."}
Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {"4XX": _ERRORS, "5XX": _ERRORS}


def answers(document: type[Document], *, streams: bool = False) -> Responses:
    """Of a path, for its OpenAPI document."""
    content: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": document, "content": content if streams else {}}, **ERRORS}
