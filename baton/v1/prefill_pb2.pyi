from baton.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("key", "sequence", "skip_tokens", "kv_digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SKIP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    sequence: _common_pb2.Sequence
    skip_tokens: int
    kv_digest: str
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ..., sequence: _Optional[_Union[_common_pb2.Sequence, _Mapping]] = ..., skip_tokens: _Optional[int] = ..., kv_digest: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("started", "progress", "first_token", "handed")
    class Started(_message.Message):
        __slots__ = ("queue_seconds", "cached_tokens")
        QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        queue_seconds: float
        cached_tokens: int
        def __init__(self, queue_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
    class Progress(_message.Message):
        __slots__ = ("computed_tokens",)
        COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        computed_tokens: int
        def __init__(self, computed_tokens: _Optional[int] = ...) -> None: ...
    class FirstToken(_message.Message):
        __slots__ = ("token", "finish_reason", "prefill_seconds")
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
        PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
        token: _common_pb2.TokenChunk
        finish_reason: _common_pb2.FinishReason
        prefill_seconds: float
        def __init__(self, token: _Optional[_Union[_common_pb2.TokenChunk, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., prefill_seconds: _Optional[float] = ...) -> None: ...
    class Handed(_message.Message):
        __slots__ = ("kv_bytes",)
        KV_BYTES_FIELD_NUMBER: _ClassVar[int]
        kv_bytes: int
        def __init__(self, kv_bytes: _Optional[int] = ...) -> None: ...
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_FIELD_NUMBER: _ClassVar[int]
    started: PrefillResponse.Started
    progress: PrefillResponse.Progress
    first_token: PrefillResponse.FirstToken
    handed: PrefillResponse.Handed
    def __init__(self, started: _Optional[_Union[PrefillResponse.Started, _Mapping]] = ..., progress: _Optional[_Union[PrefillResponse.Progress, _Mapping]] = ..., first_token: _Optional[_Union[PrefillResponse.FirstToken, _Mapping]] = ..., handed: _Optional[_Union[PrefillResponse.Handed, _Mapping]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.AttemptKey
    def __init__(self, key: _Optional[_Union[_common_pb2.AttemptKey, _Mapping]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: _Optional[bool] = ...) -> None: ...

class PrefillServiceGetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillServiceGetInfoResponse(_message.Message):
    __slots__ = ("info", "load")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    load: _common_pb2.WorkerLoad
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_common_pb2.WorkerLoad, _Mapping]] = ...) -> None: ...
