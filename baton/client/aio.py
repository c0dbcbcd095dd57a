"""The asyncio client. Everything belongs to the event loop in which the `AsyncClient` was made."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from baton.client.recovery import Recovery, Routers, Services, call_error, split_targets
from baton.client.sessions import AsyncSessions
from baton.client.tracing import active_trace
from baton.client.types import (
    Chunk,
    ConnectionOptions,
    ModelInfo,
    Prompt,
    Result,
    SamplingOptions,
    Session,
)
from baton.client.unary import ask_async, closing_told
from baton.client.wire import (
    Collector,
    call_metadata,
    channel_options,
    credentials,
    generate_request,
    model_info,
    new_request_id,
)
from baton.v1 import inference_pb2 as pb


class AsyncStream:
    """One running request: iterate it for chunks, then ask for `result`. Leaving its context before the end, or cancelling the
    task that iterates it, cancels the request on every worker.
    """

    def __init__(
        self,
        routers: Routers,
        request: pb.GenerateRequest | pb.AttachRequest,
        *,
        reconnect_s: float,
        timeout_s: float | None,
    ) -> None:
        self.request_id = request.request_id
        self._routers = routers
        self._metadata = routers.metadata + active_trace()
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._collector = Collector()
        self._recovery = Recovery(request, self._collector, reconnect_s)
        self._closed = False
        self._call = self._start(request)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            try:
                while (response := await self._read()) is not None:
                    chunk = self._collector.add(response)
                    self._recovery.progress(fresh=chunk is not None)
                    if chunk is not None:
                        yield chunk
            except grpc.RpcError as error:
                retry = self._recovery.after(error, time.monotonic())
                if retry is not None:
                    await asyncio.sleep(retry.pause_s)
                closed = self._closed or self._routers.closed
                if retry is None or closed:
                    raise call_error(error, closed=closed) from error
                retry.tell(self.request_id)
                if retry.elsewhere:
                    self._routers.move_on(self._router)
                self._call = self._start(retry.message)
            else:
                self._collector.check_ended()
                return

    async def _read(self) -> pb.GenerateResponse | None:
        """None at the end."""
        with closing_told():
            response = await self._call.read()
        return response if isinstance(response, pb.GenerateResponse) else None

    def _start(
        self, message: pb.GenerateRequest | pb.AttachRequest
    ) -> "grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse]":
        router = self._router = self._routers.current
        timeout_s = None if self._end_s is None else max(0.0, self._end_s - time.monotonic())
        metadata = self._metadata
        if isinstance(message, pb.AttachRequest):
            return router.inference.Attach(message, timeout=timeout_s, metadata=metadata)  # type: ignore[no-any-return]  # untyped stubs
        return router.inference.Generate(message, timeout=timeout_s, metadata=metadata)  # type: ignore[no-any-return]

    async def read(self) -> Result:
        """Waits for the end."""
        async for _ in self:
            pass
        return self.result

    @property
    def result(self) -> Result:
        """Set once iteration has ended."""
        if self._collector.result is None:
            raise RuntimeError("the result is known once the stream has been read to its end")
        return self._collector.result

    @property
    def seed(self) -> int | None:
        """The seed in use; None until the router has accepted the request."""
        return self._collector.seed

    def close(self) -> None:
        """Cancels the request if it runs; whoever reads it gets `CancelledError`. Idempotent."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """A connection to a router.

    python -c '
    import asyncio
    from baton.client import AsyncClient
    async def main():
        async with AsyncClient("127.0.0.1:50051") as client:
            prompts = ["Once upon a time", "The cat"]
            for answer in await asyncio.gather(*map(client.complete, prompts)):
                print(answer.text)
    asyncio.run(main())'
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str = "",
        connection: ConnectionOptions | None = None,
    ) -> None:
        """Connects on first use. `address` is host:port, or any target that gRPC resolves; several, separated by commas, are routers of
        one fleet, and a request whose router is lost goes on at the next, where any other call is made too. Raises
        `InvalidRequestError` for unusable certificate files.
        """
        connection = connection or ConnectionOptions()
        options, tls = channel_options(connection), credentials(connection)
        self._reconnect_s = connection.reconnect_s
        self._channels = [
            grpc.aio.insecure_channel(target, options=options)
            if tls is None
            else grpc.aio.secure_channel(target, tls, options=options)
            for target in split_targets(address)
        ]
        stubs = [Services.of(channel) for channel in self._channels]
        self._routers = Routers(stubs, call_metadata(api_key))
        self.sessions = AsyncSessions(self._routers)
        """Conversations that the router remembers."""

    def generate(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingOptions | None = None,
        request_id: str | None = None,
        model: str = "",
        cache_salt: str = "",
        session: Session | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> AsyncStream:
        """Starts a request. `timeout_s` bounds all of it, from queue to last token; it then raises `DeadlineError`. Only
        requests of the same `cache_salt` share the prompt's KV. With a session, the prompt is what is new, and follows everything
        said before; `SessionBusyError` while another of its turns runs. Where requests wait, those of higher `priority`, in
        [-100, 100], go first. A first token is wanted within `ttft_slo_s`: where that cannot be, the request is refused before any
        work, with a `CapacityError` that says when to try again.
        """
        name = request_id if request_id is not None else new_request_id()
        request = generate_request(
            prompt,
            request_id=name,
            model=model,
            sampling=sampling,
            cache_salt=cache_salt,
            session=session,
            priority=priority,
            ttft_slo_s=ttft_slo_s,
        )
        return AsyncStream(
            self._routers, request, reconnect_s=self._reconnect_s, timeout_s=timeout_s
        )

    def attach(self, request_id: str, *, timeout_s: float | None = None) -> AsyncStream:
        """Reads a running request's answer from its beginning, whoever began it; whoever read it before gets `AbortedError`.
        `NotFoundError` where no worker holds it.
        """
        request = pb.AttachRequest(request_id=request_id)
        return AsyncStream(
            self._routers, request, reconnect_s=self._reconnect_s, timeout_s=timeout_s
        )

    async def complete(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingOptions | None = None,
        request_id: str | None = None,
        model: str = "",
        cache_salt: str = "",
        session: Session | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        ttft_slo_s: float | None = None,
    ) -> Result:
        """The whole answer at once."""
        async with self.generate(
            prompt,
            sampling=sampling,
            request_id=request_id,
            model=model,
            cache_salt=cache_salt,
            session=session,
            timeout_s=timeout_s,
            priority=priority,
            ttft_slo_s=ttft_slo_s,
        ) as stream:
            return await stream.read()

    async def cancel(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """Ends a request of the same tenant, whoever started it; its stream raises `CancelledError`. `NotFoundError` where none is."""
        request = pb.CancelRequest(request_id=request_id)
        await ask_async(
            self._routers, lambda to: to.inference.Cancel, request, timeout_s, anywhere=True
        )

    async def model(self, name: str = "", *, timeout_s: float | None = 10.0) -> ModelInfo:
        """Describes the served model and the workers that serve it now."""
        request = pb.GetModelRequest(model=name)
        response = await ask_async(
            self._routers, lambda to: to.inference.GetModel, request, timeout_s
        )
        return model_info(response)

    async def close(self) -> None:
        """Cancels what runs. Idempotent."""
        self._routers.closed = True
        for channel in self._channels:
            await channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
