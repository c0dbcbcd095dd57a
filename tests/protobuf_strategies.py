"""Hypothesis strategies for any protobuf message: every field set or not, numbers at their ends, text of every kind."""

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

MAX_DEPTH = 4

_TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "\x00", "\U0010ffff", "a/../b", "%s{}", "x" * 200, "<|assistant|>", "user", "127.0.0.1:1"]
)
_FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, 3.4e38])


def _integers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    ends = st.sampled_from([low, low + 1, 0, 1, 2, 255, 256, high - 1, high])
    return ends | st.integers(max(low, -3), 300) | st.integers(low, high)


_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: _TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_DOUBLE: st.floats() | _FLOATS,
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 9),
    FieldDescriptor.TYPE_INT32: _integers(32, signed=True),
    FieldDescriptor.TYPE_INT64: _integers(64, signed=True),
    FieldDescriptor.TYPE_UINT32: _integers(32, signed=False),
    FieldDescriptor.TYPE_UINT64: _integers(64, signed=False),
    FieldDescriptor.TYPE_FIXED32: _integers(32, signed=False),
    FieldDescriptor.TYPE_FIXED64: _integers(64, signed=False),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Message:
    """Messages of this type; nested ones down to `MAX_DEPTH`."""
    fields = [each for each in descriptor.fields if each.message_type is None or depth < MAX_DEPTH]
    values = {each.name: draw(_field(each, depth)) for each in fields if draw(st.booleans())}
    return GetMessageClass(descriptor)(**values)


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is None:
        one = _SCALARS[field.type]
        return st.lists(one, max_size=4) if field.is_repeated else one
    if kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        return st.dictionaries(_field(key, depth), _field(value, depth), max_size=4)
    one = messages(kind, depth + 1)
    return st.lists(one, max_size=3) if field.is_repeated else one


@st.composite
def altered(draw: st.DrawFn, right: Callable[[str], Message], name: str) -> Message:
    """A message that is right but for a field or two, on any level; or altogether. `right` makes one, by the name of its type."""
    message = right(name)
    for _ in range(draw(st.integers(0, 2))):
        target = message
        field = draw(st.sampled_from([*target.DESCRIPTOR.fields]))
        while field.message_type is not None and not field.is_repeated and draw(st.booleans()):
            target = getattr(target, field.name)
            if not target.DESCRIPTOR.fields:
                break
            field = draw(st.sampled_from([*target.DESCRIPTOR.fields]))
        else:
            value = draw(_field(field, 0))
            target.ClearField(field.name)
            target.MergeFrom(type(target)(**{field.name: value}))
    return message


@st.composite
def mutilated(draw: st.DrawFn, source: st.SearchStrategy[Message]) -> bytes:
    """The bytes of a message, some of them changed, cut out or put in; or random ones."""
    data = bytearray(draw(source).SerializeToString() if draw(st.booleans()) else draw(st.binary()))
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        where = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "cut", "put"])):
            case "change":
                data[where] = draw(st.integers(0, 255))
            case "cut":
                del data[where : where + draw(st.integers(1, 8))]
            case "put":
                data[where:where] = draw(st.binary(max_size=8))
    return bytes(data)
