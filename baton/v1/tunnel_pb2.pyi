from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("starts", "cancels", "rest_seconds")
    class Start(_message.Message):
        __slots__ = ("call", "method", "request", "timeout_seconds", "traceparent", "tracestate")
        CALL_FIELD_NUMBER: _ClassVar[int]
        METHOD_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
        TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
        TRACESTATE_FIELD_NUMBER: _ClassVar[int]
        call: int
        method: str
        request: bytes
        timeout_seconds: float
        traceparent: str
        tracestate: str
        def __init__(self, call: _Optional[int] = ..., method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    REST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    starts: _containers.RepeatedCompositeFieldContainer[OpenRequest.Start]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    rest_seconds: float
    def __init__(self, starts: _Optional[_Iterable[_Union[OpenRequest.Start, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ..., rest_seconds: _Optional[float] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("messages", "ends", "last")
    class Message(_message.Message):
        __slots__ = ("call", "response")
        CALL_FIELD_NUMBER: _ClassVar[int]
        RESPONSE_FIELD_NUMBER: _ClassVar[int]
        call: int
        response: bytes
        def __init__(self, call: _Optional[int] = ..., response: _Optional[bytes] = ...) -> None: ...
    class End(_message.Message):
        __slots__ = ("call", "status")
        CALL_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        call: int
        status: bytes
        def __init__(self, call: _Optional[int] = ..., status: _Optional[bytes] = ...) -> None: ...
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[OpenResponse.Message]
    ends: _containers.RepeatedCompositeFieldContainer[OpenResponse.End]
    last: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[OpenResponse.Message, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[OpenResponse.End, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...
