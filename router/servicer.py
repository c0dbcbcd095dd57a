"""InferenceService: the gRPC front of `router.inference`.

Runs on the router's event loop. Errors become statuses in `baton.service.interceptors`.
"""

from baton.service.access import Access, caller_of
from baton.service.calls import Context
from baton.service.tracing import Origin, rpc_origin
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from router.client_stream import ClientStream
from router.inference import Inference


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See the module docstring."""

    def __init__(self, inference: Inference, *, access: Access, write_stall_s: float) -> None:
        self._inference = inference
        self._access = access
        self._write_stall_s = write_stall_s

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        await self._inference.generate(
            request,
            caller_of(self._access, context),
            ClientStream(context, self._write_stall_s),
            timeout_s=context.time_remaining(),
            origin=_origin(context, "Generate"),
        )

    async def Attach(self, request: pb.AttachRequest, context: Context) -> None:  # noqa: N802
        await self._inference.attach(
            request,
            caller_of(self._access, context),
            ClientStream(context, self._write_stall_s),
            timeout_s=context.time_remaining(),
            origin=_origin(context, "Attach"),
        )

    async def Cancel(  # noqa: N802
        self,
        request: pb.CancelRequest,
        context: Context,
    ) -> pb.CancelResponse:
        self._inference.cancel(request.request_id, caller_of(self._access, context))
        return pb.CancelResponse()

    async def GetModel(  # noqa: N802
        self,
        request: pb.GetModelRequest,
        context: Context,
    ) -> pb.GetModelResponse:
        return self._inference.describe(request.model, caller_of(self._access, context))


def _origin(context: Context, method: str) -> Origin:
    return rpc_origin(context.invocation_metadata() or (), "baton.v1.InferenceService", method)
