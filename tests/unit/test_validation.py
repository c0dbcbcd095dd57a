"""A request is parsed into what the router's parts require, or refused with everything that is wrong with it."""

import math
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError, InvalidRequestError, NotFoundError
from baton.service.access import LOCAL, Caller
from baton.service.keys import TenantLimits
from baton.types import SamplingParams
from baton.v1 import common_pb2, inference_pb2
from router.chat import ChatTemplate
from router.text import Tokenizer
from router.validation import MAX_TOLD, ModelFacts, ValidRequest, parse_generate

_FACTS = ModelFacts(model="tales", vocab_size=256, max_context_tokens=32, eos_token_ids=(0,))
_BYTES = Tokenizer.of_bytes()


def _chatty() -> Tokenizer:
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
    return Tokenizer(Tokenizer.of_bytes()._backend, ChatTemplate(source, {}, path="inline"))


def _request(**fields: object) -> inference_pb2.GenerateRequest:
    """A valid request with some fields replaced; sampling fields are given by name."""
    sampling = {
        k: v for k, v in fields.items() if k in common_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    }
    own = {k: v for k, v in fields.items() if k not in sampling}
    prompt = {} if own.keys() & {"text", "tokens", "chat", "no_prompt"} else {"text": "hi"}
    own.pop("no_prompt", None)
    params = common_pb2.SamplingParams(**sampling)  # type: ignore[arg-type]  # fields by name
    return inference_pb2.GenerateRequest(sampling=params, **prompt, **own)  # type: ignore[arg-type]


def _parse(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer = _BYTES) -> ValidRequest:
    return parse_generate(request, _FACTS, tokenizer)


def _fields(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer = _BYTES) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        _parse(request, tokenizer)
    return [violation.field for violation in caught.value.violations]


def test_a_bare_prompt_gets_every_default() -> None:
    valid = _parse(inference_pb2.GenerateRequest(text="hi"))
    assert valid.prompt == tuple(b"hi")
    seed = valid.sampling.seed
    assert valid.sampling == SamplingParams(max_tokens=30, temperature=1.0, top_p=1.0, seed=seed)
    assert len(valid.request_id) == 32


def test_a_priority_is_cut_to_the_tenants_highest() -> None:
    low = Caller(limits=TenantLimits(max_priority=-3))
    for caller, asked, cut in ((LOCAL, 7, 7), (low, 7, -3), (low, 0, -3), (low, -9, -9)):
        valid = parse_generate(_request(priority=asked), _FACTS, _BYTES, caller=caller)
        assert valid.priority == cut


def test_seeds_and_request_ids_are_drawn_anew_for_each_request() -> None:
    several = [_parse(_request()) for _ in range(50)]
    assert len({valid.sampling.seed for valid in several}) == 50
    assert len({valid.request_id for valid in several}) == 50
    assert all(0 <= valid.sampling.seed < 2**64 for valid in several)


def test_every_field_arrives() -> None:
    valid = _parse(
        _request(
            request_id="a.B_c:9-",
            model="tales",
            max_tokens=9,
            min_tokens=9,
            temperature=0.0,
            top_k=3,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias={7: -100.0, 3: 100.0},
            seed=2**64 - 1,
            stop=["b", "a", "b"],
            stop_token_ids=[9, 8, 9],
            ignore_eos=True,
            logprobs=0,
        )
    )
    assert valid.request_id == "a.B_c:9-"
    assert valid.sampling == SamplingParams(
        max_tokens=9,
        min_tokens=9,
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((3, 100.0), (7, -100.0)),
        seed=2**64 - 1,
        stop=("b", "a"),
        stop_token_ids=(9, 8),
        ignore_eos=True,
        logprobs=0,
    )


def test_a_seed_of_zero_is_a_seed() -> None:
    assert _parse(_request(seed=0)).sampling.seed == 0


def test_output_that_would_pass_the_end_of_the_context_is_cut_to_it() -> None:
    valid = _parse(_request(max_tokens=1000, min_tokens=500))
    assert valid.sampling.max_tokens == 30
    assert valid.sampling.min_tokens == 30


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert _parse(_request(text="x" * 31)).sampling.max_tokens == 1
    assert _fields(_request(text="x" * 32)) == ["prompt.text"]


def test_prompts_of_tokens_and_chats_are_taken() -> None:
    tokens = common_pb2.TokenIds(ids=[1, 255])
    assert _parse(_request(tokens=tokens)).prompt == (1, 255)
    chat = _chat(("system", "be"), ("user", "é"))
    assert _parse(_request(chat=chat), _chatty()).prompt == tuple("s:be\nu:é\na:".encode())


def _chat(*messages: tuple[str, str]) -> inference_pb2.Chat:
    turns = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return inference_pb2.Chat(messages=turns)


@pytest.mark.parametrize(
    ("fields", "violated"),
    [
        ({"no_prompt": True}, "prompt"),
        ({"text": ""}, "prompt.text"),
        ({"tokens": common_pb2.TokenIds()}, "prompt.tokens.ids"),
        ({"tokens": common_pb2.TokenIds(ids=[1, 256])}, "prompt.tokens.ids"),
        ({"tokens": common_pb2.TokenIds(ids=[1] * 32)}, "prompt.tokens.ids"),
        ({"chat": _chat()}, "prompt.chat.messages"),
        ({"chat": _chat(*[("user", "x")] * 8193)}, "prompt.chat.messages"),
        ({"chat": _chat(("user", "x"), ("robot", "x"))}, "prompt.chat.messages[1].role"),
        ({"chat": _chat(("user", ""))}, "prompt.chat.messages[0].content"),
        ({"chat": _chat(("user", "x" * 40))}, "prompt.chat"),
        ({"request_id": "a" * 129}, "request_id"),
        ({"request_id": "a/b"}, "request_id"),
        ({"request_id": "a#1"}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"min_tokens": -1}, "sampling.min_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "sampling.min_tokens"),
        ({"temperature": -0.1}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.1}, "sampling.top_p"),
        ({"min_p": -0.1}, "sampling.min_p"),
        ({"min_p": 1.1}, "sampling.min_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"presence_penalty": -2.1}, "sampling.presence_penalty"),
        ({"frequency_penalty": 2.1}, "sampling.frequency_penalty"),
        ({"logprobs": -1}, "sampling.logprobs"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"logit_bias": {256: 1.0}}, "sampling.logit_bias[256]"),
        ({"logit_bias": {3: 100.5}}, "sampling.logit_bias[3]"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "sampling.logit_bias"),
        ({"stop": [str(index) for index in range(17)]}, "sampling.stop"),
        ({"stop": ["a", ""]}, "sampling.stop[1]"),
        ({"stop": ["a" * 257]}, "sampling.stop[0]"),
        ({"stop_token_ids": [1, 256]}, "sampling.stop_token_ids[1]"),
        ({"stop_token_ids": [1] * 1025}, "sampling.stop_token_ids"),
        ({"stop_token_ids": range(1, 256), "min_tokens": 1}, "sampling.stop_token_ids"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], violated: str) -> None:
    assert _fields(_request(**fields), _chatty()) == [violated]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ],
)
def test_no_number_may_be_infinite_or_no_number(name: str, value: float) -> None:
    assert _fields(_request(**{name: value})) == [f"sampling.{name}"]
    assert _fields(_request(logit_bias={5: value})) == ["sampling.logit_bias[5]"]


def test_everything_wrong_is_told_at_once() -> None:
    request = _request(request_id="?", no_prompt=True, top_p=2.0, min_p=math.nan, stop=[""])
    expected = ["prompt", "request_id", "sampling.top_p", "sampling.min_p", "sampling.stop[0]"]
    assert _fields(request) == expected


def test_what_is_told_is_bounded_however_much_is_wrong() -> None:
    """Promise: a small request cannot make the router write a book about it."""
    violated = _fields(_request(chat=_chat(*[("", "")] * 8192)), _chatty())
    assert violated[0] == "prompt.chat.messages[0].role"
    assert len(violated) == MAX_TOLD


def test_a_chat_needs_a_chat_template() -> None:
    assert _fields(_request(chat=_chat(("user", "hi")))) == ["prompt.chat"]


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFoundError) as caught:
        _parse(_request(model="other", top_p=7.0))
    assert (caught.value.resource_type, caught.value.name) == ("model", "other")


def test_stopping_at_every_token_is_fine_where_no_minimum_forbids_it() -> None:
    assert len(_parse(_request(stop_token_ids=range(256))).sampling.stop_token_ids) == 256


_DOUBLES = st.floats() | st.sampled_from([0.0, 0.5, 1.0, 2.0, -2.0])
_INTS = st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 40)
_IDS = st.integers(0, 2**32 - 1) | st.integers(0, 300)
_STRINGS = st.text(max_size=40)


def _message(
    kind: Callable[..., object], **fields: st.SearchStrategy[object]
) -> st.SearchStrategy[object]:
    return st.fixed_dictionaries({}, optional=fields).map(lambda given_fields: kind(**given_fields))


_SAMPLING = _message(
    common_pb2.SamplingParams,
    max_tokens=_INTS,
    min_tokens=_INTS,
    temperature=_DOUBLES,
    top_k=_INTS,
    top_p=_DOUBLES,
    min_p=_DOUBLES,
    repetition_penalty=_DOUBLES,
    presence_penalty=_DOUBLES,
    frequency_penalty=_DOUBLES,
    logit_bias=st.dictionaries(_IDS, _DOUBLES, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(_STRINGS, max_size=18),
    stop_token_ids=st.lists(_IDS, max_size=4),
    ignore_eos=st.booleans(),
    logprobs=_INTS,
)
_TURN = _message(
    inference_pb2.ChatMessage,
    role=_STRINGS | st.sampled_from(["system", "user", "assistant"]),
    content=_STRINGS,
)
_PROMPTS: st.SearchStrategy[dict[str, object]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"text": _STRINGS}),
    st.fixed_dictionaries({"tokens": _message(common_pb2.TokenIds, ids=st.lists(_IDS))}),
    st.fixed_dictionaries(
        {"chat": _message(inference_pb2.Chat, messages=st.lists(_TURN, max_size=4))}
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    prompt=_PROMPTS,
    sampling=_SAMPLING,
    request_id=_STRINGS | st.sampled_from(["", "ok"]),
    model=st.sampled_from(["", "tales", "other"]),
)
def test_any_request_is_valid_or_refused(
    prompt: dict[str, object], sampling: common_pb2.SamplingParams, request_id: str, model: str
) -> None:
    """Promise: no input, however odd, is answered with a crash."""
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=sampling,
        **prompt,  # type: ignore[arg-type]
    )
    _check_outcome(request)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_that_are_a_request_are_valid_or_refused(data: bytes) -> None:
    """Promise: the same of whatever the wire may carry."""
    try:
        request = inference_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        return
    _check_outcome(request)


def _check_outcome(request: inference_pb2.GenerateRequest) -> None:
    try:
        valid = _parse(request, _chatty())
    except BatonError:
        return
    sampling = valid.sampling
    assert valid.request_id
    assert 1 <= len(valid.prompt) < 32
    assert 1 <= sampling.max_tokens <= 32 - len(valid.prompt)
    assert 0 <= sampling.min_tokens <= sampling.max_tokens
    assert all(token_id < 256 for token_id in valid.prompt + sampling.stop_token_ids)
    assert math.isfinite(sampling.temperature)
