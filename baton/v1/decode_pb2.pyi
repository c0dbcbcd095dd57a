from baton.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvSource(_message.Message):
    __slots__ = ("worker_id", "transfer_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transfer_address: str
    def __init__(self, worker_id: _Optional[str] = ..., transfer_address: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("key", "sequence", "kv_digest", "source")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KV_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    sequence: _common_pb2.Sequence
    kv_digest: str
    source: KvSource
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., sequence: _Optional[_Union[_common_pb2.Sequence, _Mapping]] = ..., kv_digest: _Optional[str] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("reserved", "kv_received", "tokens", "finished")
    class Reserved(_message.Message):
        __slots__ = ("queue_seconds", "cached_tokens")
        QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        queue_seconds: float
        cached_tokens: int
        def __init__(self, queue_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
    class KvReceived(_message.Message):
        __slots__ = ("kv_bytes", "handoff_seconds")
        KV_BYTES_FIELD_NUMBER: _ClassVar[int]
        HANDOFF_SECONDS_FIELD_NUMBER: _ClassVar[int]
        kv_bytes: int
        handoff_seconds: float
        def __init__(self, kv_bytes: _Optional[int] = ..., handoff_seconds: _Optional[float] = ...) -> None: ...
    class Finished(_message.Message):
        __slots__ = ("reason", "preemptions")
        REASON_FIELD_NUMBER: _ClassVar[int]
        PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
        reason: _common_pb2.FinishReason
        preemptions: int
        def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., preemptions: _Optional[int] = ...) -> None: ...
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    KV_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    reserved: DecodeResponse.Reserved
    kv_received: DecodeResponse.KvReceived
    tokens: _common_pb2.TokenChunk
    finished: DecodeResponse.Finished
    def __init__(self, reserved: _Optional[_Union[DecodeResponse.Reserved, _Mapping]] = ..., kv_received: _Optional[_Union[DecodeResponse.KvReceived, _Mapping]] = ..., tokens: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ..., finished: _Optional[_Union[DecodeResponse.Finished, _Mapping]] = ...) -> None: ...

class DecodeServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeServiceGetInfoResponse(_message.Message):
    __slots__ = ("info", "load")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    load: _common_pb2.WorkerLoad
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...
