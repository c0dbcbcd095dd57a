"""What a request can ask for, by name, and the three ways in which clients say it:

    sampling_parameters   one BYTES input of a JSON object, whose values may be strings: Triton's vLLM backend
    an input each         max_tokens INT32 [1], temperature FP32 [1], ...: Triton's TensorRT-LLM backend
    request parameters    the protocol's own map

They may be mixed; a name that is said twice must be said the same. Pure.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import FieldViolation
from router.kserve.tensors import BYTES, Tensor

SAMPLING_PARAMETERS = "sampling_parameters"
MAX_SHOWN_CHARACTERS = 64
"""Of a name that nobody knows."""
MAX_ENTRIES = 64
"""Of any of a request's lists of names; fewer are known. What is wrong with each takes far more room than the name."""

Meaning = bool | int | float | str | tuple[str, ...] | tuple[int, ...] | dict[int, float]


@dataclass(frozen=True, slots=True)
class Kind:
    """What the values of an option are."""

    datatype: str
    """As the model's metadata tells it."""
    says: str
    """For whoever got it wrong."""
    takes: tuple[type, ...]
    """Types of JSON values, and of tensors' elements, that stand for themselves."""
    read: Callable[[Any], Meaning]
    """Of one of those, or of a string that spells one. Raises `ValueError`, and whatever else the conversions that it is made of do."""
    dims: int = 1
    """-1 for any number of elements."""


def _flag(value: Any) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[str(value).strip().lower()]


def _integer(value: Any) -> int:
    # A boolean is an integer to Python, and to nobody else.
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    # TensorRT-LLM's clients send one empty string where they mean none.
    return tuple(_text(each) for each in values if each != "")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _integers(value: Any) -> tuple[int, ...]:
    values = json.loads(value) if isinstance(value, str) else value
    if not isinstance(values, list):
        raise TypeError
    return tuple(_integer(each) for each in values)


def _biases(value: Any) -> dict[int, float]:
    values = json.loads(value) if isinstance(value, str) else value
    return {int(token_id): _number(bias) for token_id, bias in values.items()}


FLAG = Kind("BOOL", "a boolean", (bool,), _flag)
INTEGER = Kind("INT32", "an integer", (int, float), _integer)
SEED = Kind("UINT64", "an integer", (int,), _integer)
NUMBER = Kind("FP32", "a number", (int, float), _number)
TEXT = Kind(BYTES, "one UTF-8 string", (str,), _text)
TEXTS = Kind(BYTES, "UTF-8 strings", (str, list), _texts, dims=-1)
INTEGERS = Kind("INT32", "a list of integers", (list,), _integers, dims=-1)
BIASES = Kind(BYTES, "a JSON object of numbers by token id", (dict,), _biases)

SAMPLING = {
    "max_tokens": INTEGER,
    "min_tokens": INTEGER,
    "temperature": NUMBER,
    "top_k": INTEGER,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": BIASES,
    "seed": SEED,
    "stop": TEXTS,
    "stop_token_ids": INTEGERS,
    "ignore_eos": FLAG,
    "logprobs": INTEGER,
    "n": INTEGER,
}
FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
PROMPTS = {"text_input": TEXT, "input_ids": INTEGERS}
ALIASES = {
    "streaming": "stream",
    "stop_words": "stop",
    "random_seed": "seed",
    "min_length": "min_tokens",
    "num_return_sequences": "n",
}
"""TensorRT-LLM's names, and Dynamo's."""
FIXED: Mapping[str, tuple[Kind, Meaning]] = {
    "beam_width": (INTEGER, 1),
    "use_beam_search": (FLAG, False),
    "bad_words": (TEXTS, ()),
    "return_log_probs": (FLAG, False),
    "return_context_logits": (FLAG, False),
    "return_generation_logits": (FLAG, False),
}
"""What clients send though they do not use it, and the one value that can be had."""
OF_REQUESTS = {"timeout": SEED, "triton_enable_empty_final_response": FLAG}
"""Parameters only: Triton's own."""

_JSON = SAMPLING
_PARAMETERS = SAMPLING | dict.fromkeys(FLAGS, FLAG) | OF_REQUESTS
INPUTS = PROMPTS | {SAMPLING_PARAMETERS: TEXT} | dict.fromkeys(FLAGS, FLAG) | SAMPLING
"""Tensors, in the order in which the model's metadata lists them."""


class Options:
    """What a request says, gathered from wherever it says it."""

    def __init__(self) -> None:
        self.said: dict[str, Meaning] = {}
        """By name; aliases by what they stand for."""
        self.violations: list[FieldViolation] = []
        self._where: dict[str, str] = {}

    def add_inputs(self, tensors: Iterable[Tensor]) -> None:
        """Of a request's tensors, every one."""
        names = set()
        for tensor in tensors:
            if tensor.name in names:
                self._wrong(tensor.field, f"{_shown(tensor.name)} is given twice")
            names.add(tensor.name)
            kind = self._kind(tensor.field, tensor.name, INPUTS, "inputs")
            if kind is None:
                continue
            try:
                value = _element(tensor, kind)
            except (ValueError, TypeError):
                self._wrong(tensor.field, f"{tensor.name} must be {kind.says}")
                continue
            if tensor.name == SAMPLING_PARAMETERS:
                self._add_json(tensor.field, value)
            else:
                self._add(tensor.field, tensor.name, kind, value)

    def add_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Of a request's map of `InferParameter`."""
        for name, parameter in sorted(parameters.items()):
            choice = parameter.WhichOneof("parameter_choice")
            field = f"parameters[{_shown(name)}]"
            kind = self._kind(field, name, _PARAMETERS, "parameters")
            if choice is None:
                self._wrong(field, "has no value")
            elif kind is not None:
                self._add(field, name, kind, getattr(parameter, choice))

    def _add_json(self, field: str, text: str) -> None:
        field = f"{field} ({SAMPLING_PARAMETERS})"
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            self._wrong(field, "must be a JSON object")
            return
        if len(values) > MAX_ENTRIES:
            self._wrong(field, f"must have at most {MAX_ENTRIES} names")
            return
        for name, value in values.items():
            kind = self._kind(field, name, _JSON, "names")
            # null stands for the default, as in vLLM's own defaults.
            if kind is not None and value is not None:
                self._add(field, name, kind, value)

    def _kind(self, field: str, name: str, accepted: Mapping[str, Kind], what: str) -> Kind | None:
        kind = FIXED[name][0] if name in FIXED else accepted.get(ALIASES.get(name, name))
        if kind is None:
            known = ", ".join(accepted)
            self._wrong(field, f"{_shown(name)} is not known; accepted {what}: {known}")
        return kind

    def _add(self, field: str, name: str, kind: Kind, value: Any) -> None:
        try:
            if not isinstance(value, (*kind.takes, str)):
                raise TypeError  # noqa: TRY301 - the same answer as to what cannot be read
            meaning = kind.read(value)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self._wrong(field, f"{name} must be {kind.says}")
            return
        if name in FIXED:
            if meaning != FIXED[name][1]:
                self._wrong(field, f"{name} can only be {json.dumps(FIXED[name][1])}")
            return
        name = ALIASES.get(name, name)
        if name in self.said and self.said[name] != meaning:
            self._wrong(field, f"{name} contradicts what {self._where[name]} says")
            return
        self.said[name] = meaning
        self._where[name] = field

    def _wrong(self, field: str, description: str) -> None:
        self.violations.append(FieldViolation(field, description))


def _element(tensor: Tensor, kind: Kind) -> Any:
    """A tensor's value as JSON would have it. Raises `ValueError` where it has another number of elements, or another datatype."""
    if (tensor.datatype == BYTES) != (kind.datatype == BYTES):
        raise TypeError
    if (tensor.datatype == "BOOL") != (kind is FLAG):
        raise TypeError
    if kind.dims == 1:
        single = tensor.single
        return single.decode() if isinstance(single, bytes) else single
    return [each.decode() if isinstance(each, bytes) else each for each in tensor.values]


def _shown(name: str) -> str:
    return repr(name[:MAX_SHOWN_CHARACTERS])
