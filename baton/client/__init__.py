"""The public Python client: typed, streaming, sync and async. It needs neither torch nor Ray, and shows no protobuf type.

    python -c '
    from baton.client import Client
    with Client("127.0.0.1:50051") as client:
        with client.generate("Once upon a time") as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print(stream.result.usage)'

Failures are the exceptions of `baton.errors`.
"""

from baton.client.aio import AsyncClient, AsyncStream
from baton.client.sessions import AsyncSessions, Sessions
from baton.client.sync import Client, Stream
from baton.client.types import (
    Attempt,
    ChatMessage,
    Chunk,
    ConnectionOptions,
    ModelInfo,
    Prompt,
    Result,
    SamplingOptions,
    Session,
    SessionState,
    SessionTurn,
    Timings,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncSessions",
    "AsyncStream",
    "Attempt",
    "ChatMessage",
    "Chunk",
    "Client",
    "ConnectionOptions",
    "ModelInfo",
    "Prompt",
    "Result",
    "SamplingOptions",
    "Session",
    "SessionState",
    "SessionTurn",
    "Sessions",
    "Stream",
    "Timings",
    "Usage",
]
