"""The blocking client. A `Client` may be shared by threads; a `Stream` belongs to the thread that iterates it, but any thread
may `close` it.
"""

import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import grpc

from baton.client.recovery import Recovery, Routers, Services, call_error, split_targets
from baton.client.sessions import Sessions
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
from baton.client.unary import ask
from baton.client.wire import (
    Collector,
    call_metadata,
    channel_options,
    credentials,
    generate_request,
    model_info,
    new_request_id,
)
from baton.errors import CancelledError
from baton.v1 import inference_pb2 as pb


class Stream:
    """One running request: iterate it for chunks, then ask for `result`. Leaving its context before the end cancels the request
    on every worker.
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
        self._closed = threading.Event()
        self._call = self._start(request)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            try:
                for response in self._call:
                    chunk = self._collector.add(response)
                    self._recovery.progress(fresh=chunk is not None)
                    if chunk is not None:
                        yield chunk
            except grpc.RpcError as error:
                retry = self._recovery.after(error, time.monotonic())
                if retry is None or self._closed.wait(retry.pause_s) or self._routers.closed:
                    closed = self._closed.is_set() or self._routers.closed
                    raise call_error(error, closed=closed) from error
                retry.tell(self.request_id)
                if retry.elsewhere:
                    self._routers.move_on(self._router)
                self._call = self._start(retry.message)
                if self._closed.is_set():
                    # By another thread, which knew the call before.
                    self._call.cancel()
            else:
                self._collector.check_ended()
                return

    def _start(
        self, message: pb.GenerateRequest | pb.AttachRequest
    ) -> "grpc.CallIterator[pb.GenerateResponse]":
        router = self._router = self._routers.current
        timeout_s = None if self._end_s is None else max(0.0, self._end_s - time.monotonic())
        is_attach = isinstance(message, pb.AttachRequest)
        method = router.inference.Attach if is_attach else router.inference.Generate
        try:
            return method(message, timeout=timeout_s, metadata=self._metadata)  # type: ignore[no-any-return]  # untyped stubs
        except ValueError:
            if not self._routers.closed:
                raise
            raise CancelledError("the client is closed") from None

    def read(self) -> Result:
        """Waits for the end."""
        for _ in self:
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
        """Cancels the request if it runs. Idempotent."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Client:
    """A connection to a router.

    python -c '
    from baton.client import Client, SamplingOptions
    with Client("127.0.0.1:50051") as client:
        answer = client.complete("Once upon a time", sampling=SamplingOptions(max_tokens=32))
        print(answer.text, answer.finish_reason, answer.timings.first_token_at_s)'
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
            grpc.insecure_channel(target, options=options)
            if tls is None
            else grpc.secure_channel(target, tls, options=options)
            for target in split_targets(address)
        ]
        stubs = [Services.of(channel) for channel in self._channels]
        self._routers = Routers(stubs, call_metadata(api_key))
        self.sessions = Sessions(self._routers)
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
    ) -> Stream:
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
        return Stream(self._routers, request, reconnect_s=self._reconnect_s, timeout_s=timeout_s)

    def attach(self, request_id: str, *, timeout_s: float | None = None) -> Stream:
        """Reads a running request's answer from its beginning, whoever began it; whoever read it before gets `AbortedError`.
        `NotFoundError` where no worker holds it.
        """
        request = pb.AttachRequest(request_id=request_id)
        return Stream(self._routers, request, reconnect_s=self._reconnect_s, timeout_s=timeout_s)

    def complete(
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
        with self.generate(
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
            return stream.read()

    def cancel(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """Ends a request of the same tenant, whoever started it; its stream raises `CancelledError`. `NotFoundError` where none is."""
        request = pb.CancelRequest(request_id=request_id)
        ask(self._routers, lambda to: to.inference.Cancel, request, timeout_s, anywhere=True)

    def model(self, name: str = "", *, timeout_s: float | None = 10.0) -> ModelInfo:
        """Describes the served model and the workers that serve it now."""
        request = pb.GetModelRequest(model=name)
        response = ask(self._routers, lambda to: to.inference.GetModel, request, timeout_s)
        return model_info(response)

    def close(self) -> None:
        """Cancels what runs. Idempotent."""
        self._routers.closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
