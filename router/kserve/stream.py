"""One ModelStreamInfer call: many requests at once on one stream of answers.

Each request runs in a task of its own, so that it ends alone; one task writes, because a write to a call must not be cut off while the
call goes on. Requests beyond the limit are left unread, and answers wait for a client that does not read them: in the core, which
bounds each request's, and in a few messages here. A client that reads nothing for too long loses its call. Cancelled, all of it goes.

Runs in the call's task on the router's event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from baton.errors import BatonError
from baton.service.interceptors import typed_error
from baton.service.status import code_of
from router.client_stream import ClientStream
from router.kserve.answer import FINAL, Send
from router.kserve.request import MAX_ID_CHARACTERS
from router.kserve.v2 import inference_pb2 as kserve

UNREAD_MESSAGES = 16
"""Of a whole stream; beyond, its requests wait."""
METHOD = "ModelStreamInfer"

Serve = Callable[[kserve.ModelInferRequest, Send], Awaitable[None]]


class InferStream:
    """See the module docstring."""

    def __init__(self, client: ClientStream, serve: Serve, max_requests: int) -> None:
        """`serve` answers one request; what it raises is told to the client."""
        self._client = client
        self._serve = serve
        self._room = asyncio.Semaphore(max_requests)
        self._unread = asyncio.Queue[kserve.ModelStreamInferResponse | None](UNREAD_MESSAGES)
        """None ends it."""

    async def run(self, requests: AsyncIterator[kserve.ModelInferRequest]) -> None:
        """Returns once the client has sent its last request and has every answer. Raises `CapacityError` where it does not read."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(), name="answers")
            async with asyncio.TaskGroup() as running:
                async for request in requests:
                    await self._room.acquire()
                    running.create_task(self._answer(request), name=f"request {request.id!r}")
            await self._unread.put(None)

    async def _write(self) -> None:
        while (response := await self._unread.get()) is not None:
            await self._client.write(response)

    async def _answer(self, request: kserve.ModelInferRequest) -> None:
        try:
            await self._serve(request, self._send)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something that it awaited was cancelled, and not the request.
            await self._unread.put(_failed(request, typed_error(error, METHOD)))
        except Exception as error:  # noqa: BLE001 - the boundary
            await self._unread.put(_failed(request, typed_error(error, METHOD)))
        finally:
            self._room.release()

    async def _send(self, response: kserve.ModelInferResponse) -> None:
        await self._unread.put(kserve.ModelStreamInferResponse(infer_response=response))


def _failed(
    request: kserve.ModelInferRequest, error: BatonError
) -> kserve.ModelStreamInferResponse:
    """The id stands in the text as well: tritonclient hands on nothing else."""
    request_id = request.id[:MAX_ID_CHARACTERS]
    name = f"[request id: {request_id}] " if request_id else ""
    message = f"{name}{code_of(error).name}: {error.message}"
    response = kserve.ModelStreamInferResponse(error_message=message)
    response.infer_response.id = request_id
    response.infer_response.model_name = request.model_name
    response.infer_response.parameters[FINAL].bool_param = True
    return response
