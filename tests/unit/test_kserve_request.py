"""A request of the Open Inference Protocol becomes one of the core's, or is refused with everything that is wrong in its own terms."""

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequestError, NotFoundError
from baton.v1 import common_pb2
from router.kserve.options import ALIASES, FIXED, FLAGS, INPUTS, SAMPLING
from router.kserve.request import Asked, parse
from router.kserve.tensors import DATATYPES
from router.kserve.v2 import inference_pb2 as kserve
from tests.protobuf_strategies import messages

ANY_REQUEST: st.SearchStrategy[Any] = messages(
    kserve.DESCRIPTOR.message_types_by_name["ModelInferRequest"]
)
ANY_CONTENTS: st.SearchStrategy[Any] = messages(
    kserve.DESCRIPTOR.message_types_by_name["InferTensorContents"]
)
NUMPY = {
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP32": "<f4",
    "FP64": "<f8",
    "BOOL": "?",
}
PARAMETERS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


def raw(datatype: str, *values: Any) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return np.array(values, NUMPY[datatype]).tobytes()


def asking(
    *tensors: tuple[str, str, list[Any]], parameters: Mapping[str, Any] | None = None
) -> kserve.ModelInferRequest:
    """A request with these inputs, and a prompt unless one of them is."""
    request = kserve.ModelInferRequest()
    prompt = [("text_input", "BYTES", [b"hi"])]
    has_prompt = any(name in ("text_input", "input_ids") for name, _, _ in tensors)
    for name, datatype, values in (*([] if has_prompt else prompt), *tensors):
        request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        request.raw_input_contents.append(raw(datatype, *values))
    for name, value in (parameters or {}).items():
        setattr(request.parameters[name], PARAMETERS[type(value)], value)
    return request


def by_json(**values: Any) -> kserve.ModelInferRequest:
    return asking(("sampling_parameters", "BYTES", [json.dumps(values).encode()]))


def wrong(request: kserve.ModelInferRequest) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        parse(request)
    return refused.value.message


def sampling(asked: Asked) -> common_pb2.SamplingParams:
    return asked.generate.sampling


def test_a_prompt_alone_is_enough() -> None:
    asked = parse(asking())
    assert asked.generate.text == "hi"
    assert sampling(asked) == common_pb2.SamplingParams()
    assert asked.outputs == {"text_output"}
    assert not asked.streams
    assert asked.timeout_s is None


def test_every_sampling_parameter_means_the_same_in_every_way() -> None:
    """Promise: in JSON, in JSON as strings, as a tensor, as a parameter; FP32 says what its digits say."""
    values: dict[str, tuple[str, Any]] = {
        "max_tokens": ("INT32", 5),
        "min_tokens": ("UINT32", 2),
        "temperature": ("FP32", 0.7),
        "top_k": ("INT64", 40),
        "top_p": ("FP64", 0.95),
        "min_p": ("FP32", 0.05),
        "repetition_penalty": ("FP32", 1.1),
        "presence_penalty": ("FP32", -0.3),
        "frequency_penalty": ("FP32", 0.2),
        "seed": ("UINT64", 2**63 - 1),
        "ignore_eos": ("BOOL", True),
        "logprobs": ("INT32", 3),
        "n": ("INT32", 2),
    }
    plain = {name: value for name, (_, value) in values.items()}
    lists = {"stop": ["x", "yz"], "stop_token_ids": [1, 2], "logit_bias": {"7": -1.5}}
    tensors = [(name, datatype, [value]) for name, (datatype, value) in values.items()]
    as_tensors = asking(
        *tensors,
        ("stop", "BYTES", [b"x", b"yz"]),
        ("stop_token_ids", "INT32", [1, 2]),
        ("logit_bias", "BYTES", [b'{"7": -1.5}']),
    )
    expected = sampling(parse(by_json(**plain, **lists)))
    assert {field.name for field, _ in expected.ListFields()} == SAMPLING.keys()
    assert sampling(parse(as_tensors)) == expected
    strings = {name: str(value) for name, value in plain.items()}
    assert sampling(parse(by_json(**strings, **lists))) == expected
    del lists["stop"]
    expected.ClearField("stop")
    spelled = {name: json.dumps(value) for name, value in lists.items()}
    assert sampling(parse(asking(parameters=plain | spelled))) == expected
    assert sampling(parse(asking(parameters={"stop": "x"}))).stop == ["x"]


def test_foreign_names_and_idle_values_are_understood() -> None:
    """What TensorRT-LLM's clients always send: beam_width 1, and empty lists of one empty string."""
    asked = parse(
        asking(
            ("stop_words", "BYTES", [b""]),
            ("bad_words", "BYTES", [b""]),
            ("beam_width", "UINT32", [1]),
            ("random_seed", "UINT64", [9]),
            ("min_length", "INT32", [2]),
            ("return_log_probs", "BOOL", [False]),
            ("streaming", "BOOL", [True]),
        )
    )
    assert sampling(asked) == common_pb2.SamplingParams(seed=9, min_tokens=2)
    assert asked.streams
    assert "beam_width can only be 1" in wrong(asking(("beam_width", "INT32", [4])))
    assert sampling(parse(by_json(top_k=-1, stop=None))) == common_pb2.SamplingParams()


def test_what_is_said_twice_must_be_said_the_same() -> None:
    temperature = ("temperature", "FP32", [0.7])
    parse(asking(temperature, parameters={"temperature": 0.7}))
    parse(asking(("seed", "INT64", [4]), parameters={"random_seed": 4}))
    assert "temperature contradicts what inputs[1]" in wrong(
        asking(temperature, parameters={"temperature": 0.8})
    )
    twice = asking(("max_tokens", "INT32", [4]), ("max_tokens", "INT32", [4]))
    assert "is given twice" in wrong(twice)


def test_what_is_not_known_is_refused_with_the_names_that_are() -> None:
    assert ", ".join(INPUTS) in wrong(asking(("beams", "INT32", [4])))
    assert "'beams' is not known; accepted parameters: max_tokens" in wrong(
        asking(parameters={"beams": 4})
    )
    assert "accepted names: max_tokens" in wrong(by_json(best_of=2))
    request = asking()
    request.outputs.add(name="logits")
    assert "accepted outputs: text_output, finish_reason" in wrong(request)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (("max_tokens", "FP32", [1.5]), "max_tokens must be an integer"),
        (("max_tokens", "INT32", [1, 2]), "max_tokens must be an integer"),
        (("max_tokens", "BOOL", [True]), "max_tokens must be an integer"),
        (("max_tokens", "BYTES", [b"4"]), "max_tokens must be an integer"),
        (("max_tokens", "INT64", [2**40]), "max_tokens: is out of range"),
        (("temperature", "BYTES", [b"hot"]), "temperature must be a number"),
        (("stream", "INT32", [1]), "stream must be a boolean"),
        (("stop", "INT32", [1]), "stop must be UTF-8 strings"),
        (("stop", "BYTES", [b"\xff"]), "stop must be UTF-8 strings"),
        (("text_input", "BYTES", [b"\xff"]), "text_input must be one UTF-8 string"),
        (("text_input", "BYTES", [b"a", b"b"]), "text_input must be one UTF-8 string"),
        (("input_ids", "INT32", [-1]), "input_ids: token ids must be in"),
        (("stop_token_ids", "INT32", [-1]), "stop_token_ids: is out of range"),
        (("sampling_parameters", "BYTES", [b"{"]), "must be a JSON object"),
        (("sampling_parameters", "BYTES", [b"[]"]), "must be a JSON object"),
        (("sampling_parameters", "BYTES", [b"[" * 100_000]), "must be a JSON object"),
        (("sampling_parameters", "BYTES", [b'{"n": true}']), "n must be an integer"),
        (("sampling_parameters", "BYTES", [b'{"n": [1]}']), "n must be an integer"),
        (("sampling_parameters", "BYTES", [b'{"stop": [1]}']), "stop must be UTF-8 strings"),
        (("sampling_parameters", "BYTES", [b'{"logit_bias": [1]}']), "logit_bias must be"),
    ],
)
def test_what_a_value_may_be_is_told(tensor: tuple[str, str, list[Any]], words: str) -> None:
    assert words in wrong(asking(tensor))


def test_a_prompt_is_text_or_tokens_and_not_both() -> None:
    ids = ("input_ids", "INT64", [3, 4])
    assert list(parse(asking(ids)).generate.tokens.ids) == [3, 4]
    both = asking(ids, ("text_input", "BYTES", [b"hi"]))
    assert "one of text_input and input_ids" in wrong(both)
    assert "one of text_input and input_ids" in wrong(kserve.ModelInferRequest())


def test_the_input_is_part_of_the_output_unless_it_streams_or_is_left_out() -> None:
    assert parse(asking()).prompt == "hi"
    stream, keep = ("stream", "BOOL", [True]), ("exclude_input_in_output", "BOOL", [False])
    assert not parse(asking(stream)).prompt
    assert not parse(asking(("exclude_input_in_output", "BOOL", [True]))).prompt
    assert "exclude_input_in_output" in wrong(asking(stream, keep))
    assert "needs text_input" in wrong(asking(("input_ids", "INT32", [1]), keep))


def test_outputs_are_those_named_and_those_that_inputs_ask_for() -> None:
    request = asking(("return_num_input_tokens", "BOOL", [True]))
    assert parse(request).outputs == {"text_output", "num_input_tokens"}
    request.outputs.add(name="logprobs")
    asked = parse(request)
    assert asked.outputs == {"logprobs", "num_input_tokens"}
    assert sampling(asked).HasField("logprobs")
    denied = asking(("return_logprobs", "BOOL", [False]))
    denied.outputs.add(name="logprobs")
    assert "return_logprobs: contradicts outputs" in wrong(denied)


def test_timeouts_are_microseconds_and_only_this_version_is_there() -> None:
    assert parse(asking(parameters={"timeout": 1_500_000})).timeout_s == 1.5
    assert parse(asking(parameters={"timeout": 0})).timeout_s is None
    assert "timeout" in wrong(asking(parameters={"timeout": -1}))
    request = asking()
    request.model_version = "1"
    parse(request)
    request.model_version = "2"
    with pytest.raises(NotFoundError):
        parse(request)


def test_tensors_that_are_not_what_they_claim_are_refused_before_anything_of_that_size_is_made() -> (
    None
):
    def broken(**changes: Any) -> kserve.ModelInferRequest:
        request = asking(("max_tokens", "INT32", [4]))
        tensor = request.inputs[1]
        for name, value in changes.items():
            if name == "raw":
                request.raw_input_contents[1] = value
            elif name == "shape":
                tensor.shape[:] = value
            else:
                setattr(tensor, name, value)
        return request

    assert "has 4 bytes where the shape has" in wrong(broken(shape=[2**62, 2**62]))
    assert "none of them negative" in wrong(broken(shape=[-1]))
    assert "at most 8 dimensions" in wrong(broken(shape=[1] * 9))
    assert "must be one of BOOL" in wrong(broken(datatype="BF16"))
    assert "has 3 bytes" in wrong(broken(raw=b"abc"))
    endless = broken(name="stop", datatype="BYTES", raw=b"\xff\xff\xff\xffabc")
    assert "ends within an element" in wrong(endless)
    assert "does not have the shape's 1" in wrong(
        broken(name="stop", datatype="BYTES", raw=bytes(4 * 1000))
    )
    mixed = asking()
    mixed.inputs[0].contents.bytes_contents.append(b"hi")
    assert "must be unset beside raw_input_contents" in wrong(mixed)
    mixed.raw_input_contents.append(b"")
    assert "has 2 elements for 1 inputs" in wrong(mixed)
    typed = kserve.ModelInferRequest()
    typed.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.int_contents.append(1)
    assert "whose elements are in bytes_contents" in wrong(typed)
    shared = asking()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    assert "shared memory is not served" in wrong(shared)


def test_what_a_request_lists_is_bounded_before_it_is_read() -> None:
    """Promise: a small request cannot make the router write a book about it, nor a long id be repeated with every token."""
    many = kserve.ModelInferRequest(id="x" * 10_000)
    for number in range(1000):
        many.inputs.add(name=f"i{number}", datatype="BOOL", shape=[1])
        many.outputs.add(name=f"o{number}")
        many.parameters[f"p{number}"].bool_param = True
    entries = "must have at most 64 entries"
    assert wrong(many) == (
        f"inputs: {entries}; outputs: {entries}; parameters: {entries}; id: must have at most 1024 characters"
    )
    names = json.dumps({f"n{number}": 1 for number in range(1000)}).encode()
    assert "must have at most 64 names" in wrong(asking(("sampling_parameters", "BYTES", [names])))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    message = wrong(
        asking(("beams", "INT32", [4]), ("stop", "INT32", [1]), parameters={"timeout": "x"})
    )
    assert all(word in message for word in ("beams", "stop", "timeout", "text_input"))


NAMES = st.sampled_from([*INPUTS, *ALIASES, *FIXED, *SAMPLING, *FLAGS, "timeout"]) | st.text(
    max_size=8
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "-1", "true", "nan", "1e400", "[1, 2]", '{"1": 2}', "\ud800"])
)
JSON = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each)
)


@st.composite
def nearly_right(draw: st.DrawFn) -> kserve.ModelInferRequest:
    """Requests whose names, datatypes and shapes are mostly known ones; their bytes fit, or do not."""
    request: kserve.ModelInferRequest = draw(ANY_REQUEST)
    request.model_version = draw(st.sampled_from(["", "1", "2"]))
    for name, parameter in list(request.parameters.items()):
        request.parameters[draw(NAMES)].CopyFrom(parameter)
        if draw(st.booleans()):
            del request.parameters[name]
    del request.inputs[:]
    del request.raw_input_contents[:]
    is_raw = draw(st.booleans())
    for _ in range(draw(st.integers(0, 4))):
        tensor = request.inputs.add(name=draw(NAMES), datatype=draw(st.sampled_from(DATATYPES)))
        tensor.shape.extend(
            draw(st.sampled_from([[1], [1, 1], [2], [], [0], [-1], [2**63 - 1] * 2]))
        )
        text = json.dumps(draw(st.dictionaries(NAMES, JSON, max_size=3))).encode()
        data = draw(st.sampled_from([b"hi", text, b"\xff", b"", bytes(4), bytes(8)]))
        if is_raw:
            sized = struct.pack("<I", len(data)) + data
            request.raw_input_contents.append(draw(st.sampled_from([sized, data])))
        else:
            tensor.contents.CopyFrom(draw(ANY_CONTENTS))
            tensor.contents.bytes_contents[:] = [data]
    return request


@given(nearly_right())
def test_no_request_makes_the_parser_fail_as_if_it_had_a_bug(
    request: kserve.ModelInferRequest,
) -> None:
    with suppress(InvalidRequestError, NotFoundError):
        assert parse(request).generate.WhichOneof("prompt")
