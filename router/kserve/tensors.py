"""Tensors on the wire: the elements of a request's inputs, from either of their two forms, and the bytes of an answer's outputs.

    raw_input_contents   little-endian elements; of BYTES each after its length in 32 bits: what tritonclient sends
    contents             a typed list of numbers or bytes: what clients written by hand send

Pure. What a request's tensors claim of their sizes is checked against what came, before anything of that size is made.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.errors import FieldViolation, InvalidRequestError
from router.kserve.v2 import inference_pb2 as kserve

MAX_DIMENSIONS = 8
BYTES = "BYTES"

_NUMBERS = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "UINT8": ("u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
}
"""By datatype: the numpy type of its raw elements, and the field of its typed ones."""
DATATYPES = (*_NUMBERS, BYTES)

Value = bool | int | float | bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input."""

    field: str
    """Where it stands in the request, for what is wrong with it."""
    name: str
    datatype: str
    values: Sequence[Value]
    """In row-major order."""

    @property
    def single(self) -> Value:
        """Its one element, which means the same whichever way it came: 0.7 of 32 bits is 0.7, not 0.699999988079071. Precondition: one."""
        (value,) = self.values
        return float(str(np.float32(value))) if self.datatype == "FP32" else value


def tensors_of(request: kserve.ModelInferRequest) -> list[Tensor]:
    """The inputs of a request. Raises `InvalidRequestError` with everything that is wrong with their form."""
    raw: Sequence[bytes | None] = request.raw_input_contents or [None] * len(request.inputs)
    if len(raw) != len(request.inputs):
        problem = f"has {len(raw)} elements for {len(request.inputs)} inputs"
        raise InvalidRequestError(FieldViolation("raw_input_contents", problem))
    tensors: list[Tensor] = []
    violations: list[FieldViolation] = []
    for index, (given, data) in enumerate(zip(request.inputs, raw, strict=True)):
        try:
            tensors.append(_tensor(f"inputs[{index}]", given, data))
        except InvalidRequestError as error:
            violations += error.violations
    if violations:
        raise InvalidRequestError(*violations)
    return tensors


def add_bytes(response: kserve.ModelInferResponse, name: str, values: Sequence[bytes]) -> None:
    """Adds an output of BYTES, shape [number of values]."""
    raw = b"".join(struct.pack("<I", len(value)) + value for value in values)
    _add(response, name, BYTES, len(values), raw)


def add_numbers(
    response: kserve.ModelInferResponse, name: str, datatype: str, values: Sequence[float]
) -> None:
    """Adds an output of numbers, shape [number of values]."""
    raw = np.asarray(values, dtype=_NUMBERS[datatype][0]).tobytes()
    _add(response, name, datatype, len(values), raw)


def _add(
    response: kserve.ModelInferResponse, name: str, datatype: str, size: int, raw: bytes
) -> None:
    response.outputs.add(name=name, datatype=datatype, shape=[size])
    response.raw_output_contents.append(raw)


def _tensor(
    field: str, given: kserve.ModelInferRequest.InferInputTensor, raw: bytes | None
) -> Tensor:
    if given.datatype not in DATATYPES:
        accepted = f"must be one of {', '.join(DATATYPES)}"
        raise _invalid(f"{field}.datatype", accepted)
    if given.parameters:
        problem = "takes no parameters: shared memory is not served"
        raise _invalid(f"{field}.parameters", problem)
    if len(given.shape) > MAX_DIMENSIONS or any(size < 0 for size in given.shape):
        problem = f"must have at most {MAX_DIMENSIONS} dimensions, none of them negative"
        raise _invalid(f"{field}.shape", problem)
    count = math.prod(given.shape)
    if raw is None:
        values = _typed(field, given, count)
    elif given.HasField("contents"):
        raise _invalid(f"{field}.contents", "must be unset beside raw_input_contents")
    elif given.datatype == BYTES:
        values = _raw_bytes(field, raw, count)
    else:
        values = _raw_numbers(field, given.datatype, raw, count)
    return Tensor(field, given.name, given.datatype, values)


def _typed(
    field: str, given: kserve.ModelInferRequest.InferInputTensor, count: int
) -> Sequence[Value]:
    own = "bytes_contents" if given.datatype == BYTES else _NUMBERS[given.datatype][1]
    others = [each.name for each, _ in given.contents.ListFields() if each.name != own]
    if others:
        problem = f"must be unset in a tensor of {given.datatype}, whose elements are in {own}"
        raise _invalid(f"{field}.contents.{others[0]}", problem)
    values: Sequence[Value] = getattr(given.contents, own)
    if len(values) != count:
        problem = f"has {len(values)} elements where the shape has {count}"
        raise _invalid(f"{field}.contents.{own}", problem)
    return values


def _raw_numbers(field: str, datatype: str, raw: bytes, count: int) -> Sequence[Value]:
    dtype = np.dtype(_NUMBERS[datatype][0])
    if len(raw) != count * dtype.itemsize:
        problem = f"has {len(raw)} bytes where the shape has {count} elements of {dtype.itemsize}"
        raise _invalid(f"{field} in raw_input_contents", problem)
    array: npt.NDArray[np.generic] = np.frombuffer(raw, dtype)
    values: list[Value] = array.tolist()
    return values


def _raw_bytes(field: str, raw: bytes, count: int) -> Sequence[Value]:
    where = 0
    values: list[Value] = []
    while where < len(raw) and len(values) <= count:
        start = where + 4
        size = int.from_bytes(raw[where:start], "little")
        where = start + size
        if where > len(raw):
            problem = "ends within an element: each is its length in 4 bytes, and its bytes"
            raise _invalid(f"{field} in raw_input_contents", problem)
        values.append(raw[start:where])
    if len(values) != count:
        problem = f"does not have the shape's {count} elements"
        raise _invalid(f"{field} in raw_input_contents", problem)
    return values


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))
