from baton.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvSource(_message.Message):
    __slots__ = ("worker_id", "transfer_address", "key")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transfer_address: str
    key: _common_pb2.AttemptKey
    def __init__(self, worker_id: _Optional[str] = ..., transfer_address: _Optional[str] = ..., key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("key", "sequence", "kv_digest", "source", "record", "grace_seconds", "holder")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KV_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    sequence: _common_pb2.Sequence
    kv_digest: str
    source: KvSource
    record: _common_pb2.RequestRecord
    grace_seconds: float
    holder: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., sequence: _Optional[_Union[_common_pb2.Sequence, _Mapping]] = ..., kv_digest: _Optional[str] = ..., source: _Optional[_Union[KvSource, _Mapping]] = ..., record: _Optional[_Union[_common_pb2.RequestRecord, _Mapping]] = ..., grace_seconds: _Optional[float] = ..., holder: _Optional[str] = ...) -> None: ...

class DecodeServiceAttachRequest(_message.Message):
    __slots__ = ("key", "next_index", "holder")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    next_index: int
    holder: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., next_index: _Optional[int] = ..., holder: _Optional[str] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class FindResponse(_message.Message):
    __slots__ = ("attempts",)
    class HeldAttempt(_message.Message):
        __slots__ = ("key", "sequence", "record", "end_index", "failed")
        KEY_FIELD_NUMBER: _ClassVar[int]
        SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        RECORD_FIELD_NUMBER: _ClassVar[int]
        END_INDEX_FIELD_NUMBER: _ClassVar[int]
        FAILED_FIELD_NUMBER: _ClassVar[int]
        key: _common_pb2.AttemptKey
        sequence: _common_pb2.Sequence
        record: _common_pb2.RequestRecord
        end_index: int
        failed: bool
        def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., sequence: _Optional[_Union[_common_pb2.Sequence, _Mapping]] = ..., record: _Optional[_Union[_common_pb2.RequestRecord, _Mapping]] = ..., end_index: _Optional[int] = ..., failed: _Optional[bool] = ...) -> None: ...
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedCompositeFieldContainer[FindResponse.HeldAttempt]
    def __init__(self, attempts: _Optional[_Iterable[_Union[FindResponse.HeldAttempt, _Mapping]]] = ...) -> None: ...

class HandOverRequest(_message.Message):
    __slots__ = ("key", "holder")
    KEY_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    holder: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., holder: _Optional[str] = ...) -> None: ...

class HandOverResponse(_message.Message):
    __slots__ = ("end_index",)
    END_INDEX_FIELD_NUMBER: _ClassVar[int]
    end_index: int
    def __init__(self, end_index: _Optional[int] = ...) -> None: ...

class DecodeServiceReleaseRequest(_message.Message):
    __slots__ = ("key", "holder")
    KEY_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    holder: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., holder: _Optional[str] = ...) -> None: ...

class DecodeServiceReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: _Optional[bool] = ...) -> None: ...

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
