"""Parses a client's `GenerateRequest` into a `ValidRequest`, the only form in which the router's other parts take one.

Every problem of a request is reported at once, by the path of its field; fields of the prompt are written below `prompt`, the oneof
that holds them. Pure but for the drawing of seeds and ids. Tokenizing takes time in proportion to the prompt: callers that serve
others meanwhile run `parse_generate` in a thread.
"""

import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.errors import FieldViolation, InvalidRequestError, NotFoundError
from baton.service.access import LOCAL, Caller
from baton.types import RequestId, SamplingParams, TurnRecord
from baton.v1 import common_pb2, inference_pb2
from router.chat import ChatTurn
from router.placement import Resident
from router.sessions.prompt import chat_prompt
from router.sessions.record import History
from router.text import Tokenizer

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_COMPLETIONS = 16
MAX_SALT_CHARACTERS = 128
MAX_PRIORITY = 100
MAX_MESSAGES = 8192
"""Of a conversation; more of them, in the size that a request may have, would keep the router from its other work."""
MAX_TOLD = 8
"""Of what is wrong with a conversation's messages: there may be millions."""

NO_HISTORY = History()

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What validation must know of the served model."""

    model: str
    vocab_size: int
    max_context_tokens: int
    """Longest sequence, prompt and output together."""
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that can succeed as it stands."""

    request_id: RequestId
    """The client's, or a new one."""
    prompt: tuple[int, ...]
    """At least one token; at least one more fits the context. Of a session's turn, with the session's history."""
    sampling: SamplingParams
    """Resolved. max_tokens never passes the end of the context: a larger one is cut to it, and the output then ends with LENGTH."""
    tenant: str = ""
    """Whose request it is; empty where callers are not told apart."""
    cache_salt: str = ""
    """Whose KV the prompt may share, and who may share its own."""
    resident: Resident | None = None
    """Of a session's turn that follows closely on another."""
    turn: TurnRecord | None = None
    """Set where it is a session's turn."""
    priority: int = 0
    """Higher goes first."""
    ttft_slo_s: float | None = None
    """How soon the first token is wanted."""


def parse_generate(
    request: inference_pb2.GenerateRequest,
    model: ModelFacts,
    tokenizer: Tokenizer,
    *,
    caller: Caller = LOCAL,
    history: History = NO_HISTORY,
) -> ValidRequest:
    """`history` is what the prompt follows, where the request is a session's turn.

    Raises `NotFoundError` for another model, else `InvalidRequestError` with everything that is wrong.
    """
    if request.model and request.model != model.model:
        raise NotFoundError("model", request.model)
    prompt: tuple[int, ...] = ()
    try:
        prompt = _parse_prompt(request, model, tokenizer, history)
        violations = []
    except InvalidRequestError as error:
        violations = [*error.violations]
    violations += _id_violations(request.request_id)
    violations += _salt_violations(request.cache_salt)
    violations += _urgency_violations(request)
    sampling = _with_defaults(request.sampling)
    violations += _number_violations(sampling)
    violations += _bias_violations(request.sampling, model)
    violations += _stop_violations(request.sampling, model)
    if violations:
        raise InvalidRequestError(*violations)
    highest = caller.limits.max_priority
    return ValidRequest(
        request_id=RequestId(request.request_id or secrets.token_hex(16)),
        prompt=prompt,
        sampling=_resolve(sampling, model.max_context_tokens - len(prompt)),
        tenant=caller.tenant,
        cache_salt=caller.salted(request.cache_salt),
        priority=request.priority if highest is None else min(request.priority, highest),
        ttft_slo_s=request.ttft_slo_seconds if request.HasField("ttft_slo_seconds") else None,
    )


def _parse_prompt(
    request: inference_pb2.GenerateRequest,
    model: ModelFacts,
    tokenizer: Tokenizer,
    history: History,
) -> tuple[int, ...]:
    new: Sequence[int]
    kind = request.WhichOneof("prompt")
    if history.tokens and kind is not None and (kind == "chat") != bool(history.messages):
        takes = "chats" if history.messages else "text and tokens"
        raise _invalid(f"prompt.{kind}", f"the session takes {takes}")
    before: Sequence[int] = history.tokens
    match kind:
        case "text":
            field = "prompt.text"
            new = tokenizer.encode(request.text, begins=not before) if request.text else ()
        case "tokens":
            field, new = "prompt.tokens.ids", request.tokens.ids
        case "chat":
            field, before = "prompt.chat", ()
            new = chat_prompt(history, _parse_chat(request.chat), tokenizer)
        case _:
            raise _invalid("prompt", "one of text, tokens and chat is required")
    if not new:
        raise _invalid(field, "is empty")
    prompt = (*before, *new)
    if len(prompt) >= model.max_context_tokens:
        room = f"leaves no room for output in the model's context of {model.max_context_tokens}"
        raise _invalid(field, f"of {len(prompt)} tokens {room}")
    for index, token_id in enumerate(new):
        if token_id >= model.vocab_size:
            raise _invalid(field, f"at {index}: {_not_in_vocabulary(token_id, model)}")
    return prompt


def _parse_chat(chat: inference_pb2.Chat) -> list[ChatTurn]:
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise _invalid("prompt.chat.messages", f"must be 1 to {MAX_MESSAGES}")
    violations: list[FieldViolation] = []
    for index, message in enumerate(chat.messages):
        if len(violations) >= MAX_TOLD:
            break
        path = f"prompt.chat.messages[{index}]"
        if message.role not in _ROLES:
            violations.append(FieldViolation(f"{path}.role", f"must be one of {', '.join(_ROLES)}"))
        if not message.content:
            violations.append(FieldViolation(f"{path}.content", "is empty"))
    if violations:
        raise InvalidRequestError(*violations)
    return chat_turns(chat)


def chat_turns(chat: inference_pb2.Chat) -> list[ChatTurn]:
    """The messages, as they are."""
    return [ChatTurn(message.role, message.content) for message in chat.messages]


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))


def is_request_id(text: str) -> bool:
    """Whether a request may have that id."""
    return _REQUEST_ID.fullmatch(text) is not None


def _id_violations(request_id: str) -> Iterator[FieldViolation]:
    if request_id and not is_request_id(request_id):
        allowed = "must be 1 to 128 characters of letters, digits, '.', '_', ':' and '-'"
        yield FieldViolation("request_id", allowed)


def _salt_violations(salt: str) -> Iterator[FieldViolation]:
    if len(salt) > MAX_SALT_CHARACTERS:
        limits = f"must have at most {MAX_SALT_CHARACTERS} characters"
        yield FieldViolation("cache_salt", limits)


def _urgency_violations(request: inference_pb2.GenerateRequest) -> Iterator[FieldViolation]:
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        yield FieldViolation("priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    if request.HasField("ttft_slo_seconds") and not 0 < request.ttft_slo_seconds < math.inf:
        yield FieldViolation("ttft_slo_seconds", "must be finite and > 0")


def _number_violations(sampling: common_pb2.SamplingParams) -> Iterator[FieldViolation]:
    """A NaN fails every comparison, so each rule states what must hold. Precondition: the defaults are filled in."""
    longest = sampling.max_tokens if sampling.HasField("max_tokens") else math.inf
    rules = (
        ("max_tokens", longest >= 1, "must be at least 1"),
        ("min_tokens", sampling.min_tokens >= 0, "must not be negative"),
        ("min_tokens", sampling.min_tokens <= max(longest, 0), "must not be more than max_tokens"),
        ("temperature", 0 <= sampling.temperature < math.inf, "must be finite and not negative"),
        ("top_k", sampling.top_k >= 0, "must not be negative"),
        ("top_p", 0 < sampling.top_p <= 1, "must be in (0, 1]"),
        ("min_p", 0 <= sampling.min_p <= 1, "must be in [0, 1]"),
        (
            "repetition_penalty",
            0 < sampling.repetition_penalty < math.inf,
            "must be finite and > 0",
        ),
        ("presence_penalty", -2 <= sampling.presence_penalty <= 2, "must be in [-2, 2]"),
        ("frequency_penalty", -2 <= sampling.frequency_penalty <= 2, "must be in [-2, 2]"),
        ("n", sampling.n <= MAX_COMPLETIONS, f"must be in [1, {MAX_COMPLETIONS}]"),
        ("logprobs", 0 <= sampling.logprobs <= MAX_LOGPROBS, f"must be in [0, {MAX_LOGPROBS}]"),
    )
    for name, holds, description in rules:
        if not holds:
            yield FieldViolation(f"sampling.{name}", description)


def _with_defaults(sampling: common_pb2.SamplingParams) -> common_pb2.SamplingParams:
    """A copy in which the optional numbers whose default is not 0 are set."""
    filled = common_pb2.SamplingParams(temperature=1, top_p=1, repetition_penalty=1)
    filled.MergeFrom(sampling)
    return filled


def _bias_violations(
    sampling: common_pb2.SamplingParams, model: ModelFacts
) -> Iterator[FieldViolation]:
    field = "sampling.logit_bias"
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        yield FieldViolation(field, f"must have at most {MAX_LOGIT_BIASES} entries")
        return
    for token_id, bias in sorted(sampling.logit_bias.items()):
        if token_id >= model.vocab_size:
            yield FieldViolation(f"{field}[{token_id}]", _not_in_vocabulary(token_id, model))
        if not -100 <= bias <= 100:
            yield FieldViolation(f"{field}[{token_id}]", "must be in [-100, 100]")


def _stop_violations(
    sampling: common_pb2.SamplingParams, model: ModelFacts
) -> Iterator[FieldViolation]:
    if len(sampling.stop) > MAX_STOPS:
        yield FieldViolation("sampling.stop", f"must have at most {MAX_STOPS} strings")
    for index, stop in enumerate(sampling.stop[:MAX_STOPS]):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            limits = f"must have 1 to {MAX_STOP_CHARACTERS} characters"
            yield FieldViolation(f"sampling.stop[{index}]", limits)
    field, ids = "sampling.stop_token_ids", sampling.stop_token_ids
    if len(ids) > MAX_STOP_TOKENS:
        yield FieldViolation(field, f"must have at most {MAX_STOP_TOKENS} entries")
        return
    for index, token_id in enumerate(ids):
        if token_id >= model.vocab_size:
            yield FieldViolation(f"{field}[{index}]", _not_in_vocabulary(token_id, model))
    ends = {*ids, *(() if sampling.ignore_eos else model.eos_token_ids)}
    if sampling.min_tokens > 0 and ends.issuperset(range(model.vocab_size)):
        yield FieldViolation(field, "leaves no token to generate before min_tokens")


def _not_in_vocabulary(token_id: int, model: ModelFacts) -> str:
    return f"token {token_id} is not in the model's vocabulary of {model.vocab_size} tokens"


def _resolve(sampling: common_pb2.SamplingParams, room_tokens: int) -> SamplingParams:
    """Precondition: no violations, and the defaults are filled in."""
    max_tokens = (
        min(sampling.max_tokens, room_tokens) if sampling.HasField("max_tokens") else room_tokens
    )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        stop=tuple(dict.fromkeys(sampling.stop)),
        stop_token_ids=tuple(dict.fromkeys(sampling.stop_token_ids)),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        n=max(1, sampling.n),
    )
