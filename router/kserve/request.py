"""A `ModelInferRequest` as the router's core takes it, and how its client wants the answer.

Pure. Takes time in proportion to the request: callers that serve others meanwhile parse large ones in a thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.errors import FieldViolation, InvalidRequestError, NotFoundError
from baton.v1 import inference_pb2 as pb
from router.kserve.options import FLAGS, MAX_ENTRIES, SAMPLING, Meaning, Options
from router.kserve.tensors import tensors_of
from router.kserve.v2 import inference_pb2 as kserve

VERSION = "1"
"""Of the model: there is one."""
MAX_ID_CHARACTERS = 1024
"""Every answer carries it."""
MAX_TIMEOUT_US = 10**12
TEXT_OUTPUT = "text_output"
OUTPUTS = {
    TEXT_OUTPUT: "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""Datatypes by name. Each has an element for each completion, but num_input_tokens, which has one."""
ON_REQUEST = tuple(OUTPUTS)[1:]
LOGPROBS = {"cumulative_logprob", "logprobs"}

_FIELDS = (
    ("sampling.", ""),
    ("prompt.text", "text_input"),
    ("prompt.tokens.ids", "input_ids"),
)
"""Beginnings of the core's names for what a request holds, and this protocol's for the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a client wants."""

    generate: pb.GenerateRequest
    id: str
    streams: bool
    """As it comes; else all at once."""
    prompt: str
    """Put before the output, where that is to begin with the input; else empty."""
    outputs: frozenset[str]
    timeout_s: float | None
    """None where the request names none."""


def parse(request: kserve.ModelInferRequest) -> Asked:
    """Raises `NotFoundError` for another version of the model, else `InvalidRequestError` with everything that is wrong in the
    protocol's own terms; what its values may be is for the core to say.
    """
    check_version(request.model_name, request.model_version)
    _check_sizes(request)
    options = Options()
    options.add_inputs(tensors_of(request))
    options.add_parameters(request.parameters)
    violations, said = options.violations, options.said
    generate = pb.GenerateRequest(model=request.model_name)
    violations += _prompt(said, generate)
    violations += _sampling(said, generate)
    streams = said.get("stream") is True
    with_input = said.get("exclude_input_in_output") is False
    if with_input and streams:
        problem = "can only be true with stream"
        violations.append(FieldViolation("exclude_input_in_output", problem))
    if with_input and "text_input" not in said:
        violations.append(FieldViolation("exclude_input_in_output", "false needs text_input"))
    outputs, wrong = _outputs(said, request.outputs)
    violations += wrong
    timeout_us = said.get("timeout", 0)
    assert isinstance(timeout_us, int)
    if not 0 <= timeout_us <= MAX_TIMEOUT_US:
        problem = f"must be microseconds in [0, {MAX_TIMEOUT_US}]"
        violations.append(FieldViolation("timeout", problem))
    if violations:
        raise InvalidRequestError(*violations)
    if outputs & LOGPROBS and not generate.sampling.HasField("logprobs"):
        generate.sampling.logprobs = 0
    includes = not streams and said.get("exclude_input_in_output") is not True
    return Asked(
        generate=generate,
        id=request.id,
        streams=streams,
        prompt=generate.text if includes else "",
        outputs=outputs,
        timeout_s=timeout_us / 1e6 or None,
    )


def check_version(model: str, version: str) -> None:
    """Raises `NotFoundError` for a version that there is not."""
    if version not in ("", VERSION):
        raise NotFoundError("model", f"{model} version {version}")


def _check_sizes(request: kserve.ModelInferRequest) -> None:
    """Before anything is made of what a request lists. Raises `InvalidRequestError`."""
    sizes = {
        "inputs": len(request.inputs),
        "outputs": len(request.outputs),
        "parameters": len(request.parameters),
    }
    violations = [
        FieldViolation(name, f"must have at most {MAX_ENTRIES} entries")
        for name, size in sizes.items()
        if size > MAX_ENTRIES
    ]
    if len(request.id) > MAX_ID_CHARACTERS:
        limits = f"must have at most {MAX_ID_CHARACTERS} characters"
        violations.append(FieldViolation("id", limits))
    if violations:
        raise InvalidRequestError(*violations)


def in_this_protocol(error: InvalidRequestError) -> InvalidRequestError:
    """The core's error, by the names that the client used."""
    violations = []
    for violation in error.violations:
        field = violation.field
        for core, own in _FIELDS:
            if field.startswith(core):
                field = own + field.removeprefix(core)
        violations.append(FieldViolation(field, violation.description))
    return InvalidRequestError(*violations)


def _prompt(said: dict[str, Meaning], generate: pb.GenerateRequest) -> list[FieldViolation]:
    text, ids = said.get("text_input"), said.get("input_ids")
    if (text is None) == (ids is None):
        return [FieldViolation("inputs", "one of text_input and input_ids is required")]
    if text is not None:
        assert isinstance(text, str)
        generate.text = text
        return []
    try:
        generate.tokens.ids.extend(ids)  # type: ignore[arg-type]  # of integers, by its kind
    except ValueError:
        return [FieldViolation("input_ids", "token ids must be in [0, 2**32)")]
    return []


def _sampling(said: dict[str, Meaning], generate: pb.GenerateRequest) -> list[FieldViolation]:
    violations = []
    # Present even if nothing is said in it.
    sampling: Any = generate.sampling
    sampling.SetInParent()
    for name in SAMPLING.keys() & said.keys():
        value = said[name]
        try:
            if name == "top_k" and value == -1:
                # What vLLM calls off.
                sampling.top_k = 0
            elif isinstance(value, tuple):
                getattr(sampling, name).extend(value)
            elif isinstance(value, dict):
                sampling.logit_bias.update(value)
            else:
                setattr(sampling, name, value)
        except ValueError:
            violations.append(FieldViolation(name, "is out of range"))
    return violations


def _outputs(
    said: dict[str, Meaning],
    requested: Sequence[kserve.ModelInferRequest.InferRequestedOutputTensor],
) -> tuple[frozenset[str], list[FieldViolation]]:
    violations = []
    names = {output.name for output in requested} or {TEXT_OUTPUT}
    for index, output in enumerate(requested):
        field = f"outputs[{index}]"
        if output.name not in OUTPUTS:
            accepted = f"is not known; accepted outputs: {', '.join(OUTPUTS)}"
            violations.append(FieldViolation(f"{field}.name", accepted))
        if output.parameters:
            problem = "takes no parameters: neither shared memory nor classification is served"
            violations.append(FieldViolation(f"{field}.parameters", problem))
    for name in ON_REQUEST:
        wanted = said.get(f"return_{name}")
        if wanted is False and name in names:
            problem = f"contradicts outputs, which name {name}"
            violations.append(FieldViolation(f"return_{name}", problem))
        if wanted is True:
            names.add(name)
    return frozenset(names), violations


assert {f"return_{name}" for name in ON_REQUEST} <= set(FLAGS)
