"""GRPCInferenceService: the Open Inference Protocol's front of `router.inference`.

Runs on the router's event loop. Errors become statuses in `baton.service.interceptors`, but for those of requests on a stream.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator

from baton.errors import BatonError, FieldViolation, InvalidRequestError
from baton.service.access import Access, caller_of
from baton.service.calls import Context
from baton.service.settings import RouterSettings
from baton.service.tracing import rpc_origin
from router.client_stream import ClientStream
from router.inference import INLINE_BYTES, Inference
from router.kserve.answer import AnswerWriter, Send
from router.kserve.description import model_config, model_metadata, server_metadata
from router.kserve.request import Asked, check_version, in_this_protocol, parse
from router.kserve.stream import InferStream
from router.kserve.v2 import inference_pb2 as kserve
from router.kserve.v2 import inference_pb2_grpc as kserve_grpc
from router.text import Tokenizer

_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


class OpenInferenceServicer(kserve_grpc.GRPCInferenceServiceServicer):
    """See the module docstring."""

    def __init__(
        self,
        inference: Inference,
        tokenizer: Tokenizer,
        *,
        access: Access,
        settings: RouterSettings,
    ) -> None:
        self._inference = inference
        self._tokenizer = tokenizer
        self._access = access
        self._settings = settings

    async def ServerLive(  # noqa: N802
        self,
        request: kserve.ServerLiveRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> kserve.ServerLiveResponse:
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self,
        request: kserve.ServerReadyRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> kserve.ServerReadyResponse:
        return kserve.ServerReadyResponse(ready=self._inference.serves)

    async def ModelReady(  # noqa: N802
        self, request: kserve.ModelReadyRequest, context: Context
    ) -> kserve.ModelReadyResponse:
        self._model(request.name, request.version, context)
        return kserve.ModelReadyResponse(ready=self._inference.can_serve())

    async def ServerMetadata(  # noqa: N802
        self,
        request: kserve.ServerMetadataRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> kserve.ServerMetadataResponse:
        return server_metadata()

    async def ModelMetadata(  # noqa: N802
        self, request: kserve.ModelMetadataRequest, context: Context
    ) -> kserve.ModelMetadataResponse:
        return model_metadata(self._model(request.name, request.version, context))

    async def ModelConfig(  # noqa: N802
        self, request: kserve.ModelConfigRequest, context: Context
    ) -> kserve.ModelConfigResponse:
        return model_config(self._model(request.name, request.version, context))

    async def ModelInfer(  # noqa: N802
        self, request: kserve.ModelInferRequest, context: Context
    ) -> kserve.ModelInferResponse:
        answers = []

        async def keep(response: kserve.ModelInferResponse) -> None:
            answers.append(response)

        await self._serve(request, context, keep, on_stream=False)
        (answer,) = answers
        return answer

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[kserve.ModelInferRequest], context: Context
    ) -> None:
        async def serve(request: kserve.ModelInferRequest, send: Send) -> None:
            await self._serve(request, context, send, on_stream=True)

        client = ClientStream(context, self._settings.write_stall_s)
        stream = InferStream(client, serve, self._settings.max_stream_requests)
        await stream.run(request_iterator)

    def _model(self, name: str, version: str, context: Context) -> str:
        """The name of the model served. Raises `NotFoundError` for another one."""
        described = self._inference.describe(name, caller_of(self._access, context))
        check_version(name, version)
        return described.model

    async def _serve(
        self, request: kserve.ModelInferRequest, context: Context, send: Send, *, on_stream: bool
    ) -> None:
        # With each request: a key may be revoked while a stream is open.
        caller = caller_of(self._access, context)
        headers = context.invocation_metadata() or ()
        method = "ModelStreamInfer" if on_stream else "ModelInfer"
        origin = rpc_origin(headers, "inference.GRPCInferenceService", method)
        request_id = _request_id(request.id)
        try:
            asked = await _parsed(request)
            if asked.streams and not on_stream:
                raise InvalidRequestError(FieldViolation("stream", "needs ModelStreamInfer"))
        except BatonError as error:
            await self._inference.refuse(error, caller, request_id, origin=origin)
        asked.generate.request_id = request_id
        limits_s = [s for s in (context.time_remaining(), asked.timeout_s) if s is not None]
        try:
            await self._inference.generate(
                asked.generate,
                caller,
                AnswerWriter(asked, send, self._token_text),
                timeout_s=min(limits_s, default=None),
                origin=origin,
            )
        except InvalidRequestError as error:
            raise in_this_protocol(error) from None

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.special_text(token_id) or self._tokenizer.decode([token_id])


def _request_id(client_id: str) -> str:
    """Begins with the client's, where that can be part of one: several requests that run at once may have the same."""
    return f"{client_id}.{secrets.token_hex(4)}" if _ID.fullmatch(client_id) else ""


async def _parsed(request: kserve.ModelInferRequest) -> Asked:
    inline = request.ByteSize() <= INLINE_BYTES
    return parse(request) if inline else await asyncio.to_thread(parse, request)
