"""Parses a `GenerateRequest` into a `ForeignRequest`. What this worker cannot do is refused by its field's name, never left out in
silence; every problem of a request is reported at once. Pure, but for the tokenizer.

0 stands for "not set" in fields of proto3 that are not optional: `top_p`, `repetition_penalty` and `n`. What only shapes text
(`skip_special_tokens` and others) is for who makes text of the tokens, and has no meaning here.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from baton.engine.base import EngineInfo
from baton.errors import FieldViolation, InvalidRequestError
from baton.types import SamplingParams
from baton.vllm.handoff import from_json
from baton.vllm.legs import ForeignRequest
from baton.vllm.text import WorkerText

MAX_ID_CHARACTERS = 256
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ENTRIES = 1024
"""Of lists of tokens: biases, stop tokens."""
_REFUSED = (
    "mm_inputs",
    "extra_mm_inputs",
    "media_refs",
    "data_parallel_rank",
    "kv_transfer_params",
)
_REFUSED_SAMPLING = ("prompt_logprobs", "truncate_prompt_tokens")
_CONSTRAINTS = "constraint"


def parse(
    request: pb.GenerateRequest, engine: EngineInfo, text: WorkerText | None
) -> ForeignRequest:
    """Raises `InvalidRequestError` with everything that is wrong. `text` is None on workers without a tokenizer."""
    sampling = request.sampling_params
    violations = [*_unsupported(request, text)]
    prompt: tuple[int, ...] = ()
    try:
        prompt = _prompt(request, engine, text)
    except InvalidRequestError as error:
        violations += error.violations
    if not 1 <= len(request.request_id) <= MAX_ID_CHARACTERS:
        limits = f"must have 1 to {MAX_ID_CHARACTERS} characters"
        violations.append(FieldViolation("request_id", limits))
    violations += _numbers(sampling)
    violations += _tokens(sampling, engine)
    violations += _stops(sampling)
    if violations:
        raise InvalidRequestError(*violations)
    handed = None
    if request.HasField("kv_transfer_params_json"):
        handed = from_json(request.kv_transfer_params_json)
    return ForeignRequest(
        request_id=request.request_id,
        prompt=prompt,
        sampling=_resolve(request, engine.max_context_tokens - len(prompt)),
        handed=handed,
    )


def _prompt(
    request: pb.GenerateRequest, engine: EngineInfo, text: WorkerText | None
) -> tuple[int, ...]:
    match request.WhichOneof("input"):
        case "tokenized":
            field, prompt = "tokenized.input_ids", tuple(request.tokenized.input_ids)
        case "text" if text is not None:
            field, prompt = "text", text.encode(request.text) if request.text else ()
        case "text":
            raise _invalid("text", "this worker has no tokenizer: send tokenized.input_ids")
        case _:
            raise _invalid("input", "one of tokenized and text is required")
    if not prompt:
        raise _invalid(field, "is empty")
    if len(prompt) >= engine.max_context_tokens:
        room = f"leaves no room for output in the model's context of {engine.max_context_tokens}"
        raise _invalid(field, f"of {len(prompt)} tokens {room}")
    largest = max(prompt)
    if largest >= engine.vocab_size:
        raise _invalid(field, _not_in_vocabulary(largest, engine))
    return prompt


def _unsupported(request: pb.GenerateRequest, text: WorkerText | None) -> Iterator[FieldViolation]:
    for descriptor, _ in request.ListFields():
        if descriptor.name in _REFUSED:
            yield FieldViolation(descriptor.name, "is not supported")
    sampling = request.sampling_params
    for name in _REFUSED_SAMPLING:
        if sampling.HasField(name):
            yield _violation(name, "is not supported")
    constraint = sampling.WhichOneof(_CONSTRAINTS)
    if constraint is not None:
        yield _violation(constraint, "is not supported: no constraint of the output is")
    if sampling.stop and text is None:
        yield _violation("stop", "this worker has no tokenizer: send stop_token_ids")


def _numbers(sampling: pb.SamplingParams) -> Iterator[FieldViolation]:
    """A NaN fails every comparison, so each rule states what must hold."""
    longest = sampling.max_tokens if sampling.HasField("max_tokens") else math.inf
    penalty = sampling.repetition_penalty
    rules = (
        ("max_tokens", longest >= 1, "must be at least 1"),
        ("min_tokens", sampling.min_tokens <= max(longest, 0), "must not be more than max_tokens"),
        ("temperature", 0 <= sampling.temperature < math.inf, "must be finite and not negative"),
        ("top_p", 0 <= sampling.top_p <= 1, "must be in (0, 1]; 0 is not set"),
        ("min_p", 0 <= sampling.min_p <= 1, "must be in [0, 1]"),
        ("repetition_penalty", 0 <= penalty < math.inf, "must be finite and > 0; 0 is not set"),
        ("presence_penalty", -2 <= sampling.presence_penalty <= 2, "must be in [-2, 2]"),
        ("frequency_penalty", -2 <= sampling.frequency_penalty <= 2, "must be in [-2, 2]"),
        ("n", sampling.n <= MAX_CHOICES, f"must be in [1, {MAX_CHOICES}]"),
        ("logprobs", 0 <= sampling.logprobs <= MAX_LOGPROBS, f"must be in [0, {MAX_LOGPROBS}]"),
    )
    for name, holds, description in rules:
        if not holds:
            yield _violation(name, description)


def _tokens(sampling: pb.SamplingParams, engine: EngineInfo) -> Iterator[FieldViolation]:
    for name in ("logit_bias", "stop_token_ids"):
        listed = getattr(sampling, name)
        if len(listed) > MAX_ENTRIES:
            yield _violation(name, f"must have at most {MAX_ENTRIES} entries")
            continue
        for token_id in listed:
            if not 0 <= token_id < engine.vocab_size:
                yield _violation(name, _not_in_vocabulary(token_id, engine))
    for token_id, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            yield _violation(f"logit_bias[{token_id}]", "must be in [-100, 100]")
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else engine.eos_token_ids)}
    if sampling.min_tokens and ends.issuperset(range(engine.vocab_size)):
        yield _violation("stop_token_ids", "leaves no token to generate before min_tokens")


def _stops(sampling: pb.SamplingParams) -> Iterator[FieldViolation]:
    if len(sampling.stop) > MAX_STOPS:
        yield _violation("stop", f"must have at most {MAX_STOPS} strings")
    for stop in sampling.stop[:MAX_STOPS]:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            yield _violation("stop", f"must have 1 to {MAX_STOP_CHARACTERS} characters each")


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(f"sampling_params.{name}", description)


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))


def _not_in_vocabulary(token_id: int, engine: EngineInfo) -> str:
    return f"token {token_id} is not in the model's vocabulary of {engine.vocab_size} tokens"


def _resolve(request: pb.GenerateRequest, room_tokens: int) -> SamplingParams:
    """Precondition: no violations. An output that would pass the end of the context is cut there."""
    given = request.sampling_params
    max_tokens = min(given.max_tokens, room_tokens) if given.HasField("max_tokens") else room_tokens
    seed = given.seed % 2**64 if given.HasField("seed") else _seed_of(request.request_id)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(given.min_tokens, max_tokens),
        temperature=_as_written(given.temperature) if given.HasField("temperature") else 1.0,
        top_k=given.top_k,
        top_p=_as_written(given.top_p) or 1.0,
        min_p=_as_written(given.min_p),
        repetition_penalty=_as_written(given.repetition_penalty) or 1.0,
        presence_penalty=_as_written(given.presence_penalty),
        frequency_penalty=_as_written(given.frequency_penalty),
        logit_bias=tuple((token, _as_written(b)) for token, b in sorted(given.logit_bias.items())),
        seed=seed,
        n=max(1, given.n),
        stop=tuple(dict.fromkeys(given.stop)),
        stop_token_ids=tuple(dict.fromkeys(given.stop_token_ids)),
        ignore_eos=given.ignore_eos,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
    )


def _as_written(number: float) -> float:
    """The shortest decimal number that single precision, in which it came, takes for the same: what a person wrote, and what Baton's own
    API has in double precision.
    """
    return float(str(np.float32(number)))


def _seed_of(request_id: str) -> int:
    """Both legs must draw alike, and all that they share is the request's id, which is another one each time."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest())
