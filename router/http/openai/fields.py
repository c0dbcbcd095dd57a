"""What a client may write in a body: OpenAI's fields, the usual ones of servers of open models, and Baton's own.

Pydantic's models check types and refuse what is not known; they are the served OpenAPI document too. What values may be is for
`router.validation` to say, but for numbers that no message holds. A feature that Baton lacks is refused by its name, unless the value
is the one that says to do without it. Lists end at their first problem, and objects say few unknown names: a body may be megabytes long.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from router.validation import MAX_MESSAGES

MAX_NAMED = 8
MAX_NAME_CHARACTERS = 64
MAX_ENTRIES = 1024
MAX_PARTS = 1024
"""Of one message's content."""


class Fields(BaseModel):
    """An object whose every field is known, and of its type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            if unknown:
                names = {"names": [name[:MAX_NAME_CHARACTERS] for name in unknown[:MAX_NAMED]]}
                raise PydanticCustomError("unknown_fields", "unknown fields", names)
        return data


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_many", f"must have at most {MAX_ENTRIES} entries")
    return value


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_unicode", "has half of a surrogate pair") from None
    return value


Text: TypeAlias = Annotated[str, AfterValidator(_encodable)]
Int32: TypeAlias = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Uint32: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Texts: TypeAlias = Annotated[list[Text], Field(fail_fast=True)]
Tokens: TypeAlias = Annotated[list[Uint32], Field(fail_fast=True)]


def _or_not_supported(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError("not_supported", "this is not supported") from None


Refused = WrapValidator(_or_not_supported)
"""Whatever else than the values of the field's type asks for what is not there."""
Nothing: TypeAlias = Annotated[None, Refused]
Empty: TypeAlias = Annotated[Annotated[list[Any], Field(max_length=0)] | None, Refused]
Unforced: TypeAlias = Annotated[Literal["none", "auto"] | None, Refused]


class StreamOptions(Fields):
    """How a stream is written."""

    include_usage: bool | None = None
    """One more chunk at the end, with the usage of the whole request."""
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added.")


class Common(Fields):
    """What both kinds of completion take."""

    model: Text | None = Field(None, description="The served one where it is left out.")
    max_tokens: Int32 | None = None
    min_tokens: Int32 | None = Field(None, description="No stop ends the output before.")
    n: Uint32 | None = None
    stop: Text | Texts | None = None
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    seed: Seed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = Field(None, description="0 and -1 are off.")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = Field(
        None, description="By token id."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    priority: Int32 | None = Field(
        None, description="Baton's: higher goes first among the tenant's requests."
    )
    ttft_slo_seconds: float | None = Field(
        None, description="Baton's: the first token is of use only so soon."
    )
    cache_salt: Text | None = Field(
        None, description="Baton's: KV is shared only with requests of the same salt."
    )
    session_id: Text | None = Field(
        None, description="Baton's: the request is a turn of this session."
    )

    user: str | None = Field(None, description="Accepted and not used, as those that follow.")
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Text | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)] = Field(
        description="Text, token ids, or a list of either."
    )
    logprobs: Int32 | None = Field(None, description="How many of the likeliest tokens to tell.")

    best_of: Uint32 | None = Field(None, description="No other than n.")
    echo: Annotated[Literal[False] | None, Refused] = None
    suffix: Nothing = None


class TextPart(Fields):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


Content: TypeAlias = Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class SystemMessage(Fields):
    """What the model is told to be."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Fields):
    """What the user said."""

    role: Literal["user"]
    content: Content


class AssistantMessage(Fields):
    """What the model said, as a completion's message is."""

    role: Literal["assistant"]
    content: Content
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Empty = None
    annotations: Empty = None


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")
]


class TextFormat(Fields):
    """The only response format."""

    type: Literal["text"]


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    max_completion_tokens: Int32 | None = Field(None, description="What max_tokens is now called.")
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None

    tools: Empty = None
    tool_choice: Unforced = None
    parallel_tool_calls: bool | None = None
    functions: Empty = None
    function_call: Unforced = None
    response_format: Annotated[TextFormat | None, Refused] = None
    modalities: Annotated[list[Literal["text"]] | None, Refused] = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None
