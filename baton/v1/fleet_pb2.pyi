from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("announce", "heartbeat")
    class Announce(_message.Message):
        __slots__ = ("info",)
        INFO_FIELD_NUMBER: _ClassVar[int]
        info: _common_pb2.WorkerInfo
        def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ...) -> None: ...
    class Heartbeat(_message.Message):
        __slots__ = ("load", "prefix", "draining", "stalled")
        LOAD_FIELD_NUMBER: _ClassVar[int]
        PREFIX_FIELD_NUMBER: _ClassVar[int]
        DRAINING_FIELD_NUMBER: _ClassVar[int]
        STALLED_FIELD_NUMBER: _ClassVar[int]
        load: _common_pb2.WorkerLoad
        prefix: PrefixDelta
        draining: bool
        stalled: bool
        def __init__(self, load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ..., prefix: _Optional[_Union[PrefixDelta, _Mapping]] = ..., draining: _Optional[bool] = ..., stalled: _Optional[bool] = ...) -> None: ...
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    announce: JoinRequest.Announce
    heartbeat: JoinRequest.Heartbeat
    def __init__(self, announce: _Optional[_Union[JoinRequest.Announce, _Mapping]] = ..., heartbeat: _Optional[_Union[JoinRequest.Heartbeat, _Mapping]] = ...) -> None: ...

class PrefixDelta(_message.Message):
    __slots__ = ("stored", "evicted")
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    stored: _containers.RepeatedScalarFieldContainer[int]
    evicted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stored: _Optional[_Iterable[int]] = ..., evicted: _Optional[_Iterable[int]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("joined",)
    class Joined(_message.Message):
        __slots__ = ("heartbeat_seconds", "lease_seconds")
        HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
        LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        heartbeat_seconds: float
        lease_seconds: float
        def __init__(self, heartbeat_seconds: _Optional[float] = ..., lease_seconds: _Optional[float] = ...) -> None: ...
    JOINED_FIELD_NUMBER: _ClassVar[int]
    joined: JoinResponse.Joined
    def __init__(self, joined: _Optional[_Union[JoinResponse.Joined, _Mapping]] = ...) -> None: ...
