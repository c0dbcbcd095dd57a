"""Between gRPC and the servicers: no handler runs for a caller without access, whatever a handler raises becomes a status, and bytes
that are no message become INVALID_ARGUMENT.

Runs on the server's event loop. Handlers are async: generators, or coroutines that return a response or write their own.
Generators are closed here on every way out, so that their `finally` blocks run before the call ends, not when garbage is
collected. Cancellation passes through. Nothing that a request contained is logged or sent back.
"""

import asyncio
import inspect
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from baton.errors import BatonError, FieldViolation, InternalError, InvalidRequestError
from baton.service.access import Access, check
from baton.service.groups import first_error
from baton.service.status import abort

_log = logging.getLogger(__name__)

# gRPC's handler types are generic over messages that an interceptor does not know.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context = grpc.aio.ServicerContext[Any, Any]
_Behaviour = Callable[[Any, _Context], Any]
_Wrapped = Callable[[Any, _Context], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that could not be parsed."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """See the module docstring."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._guarded: dict[str, _Handler] = {}
        """By method."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is not None:
            return guarded
        handler: _Handler | None = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # the stubs forget unknown methods
        guarded = self._guarded[method] = self._guard(handler, method)
        return guarded

    def _guard(self, handler: _Handler, method: str) -> _Handler:
        wrap, make = _KINDS[handler.request_streaming, handler.response_streaming]
        behaviour: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        assert behaviour is not None
        return make(  # type: ignore[no-any-return]
            wrap(behaviour, method, self._access),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _respond_once(behaviour: _Behaviour, method: str, access: Access) -> _Wrapped:
    async def call(request: Any, context: _Context) -> Any:
        try:
            check(access, method, context)
            return await behaviour(_checked(request), context)
        except asyncio.CancelledError as error:
            await _fail_unless_cancelled(context, error, method)
        except Exception as error:  # noqa: BLE001 - the boundary
            await _fail(context, error, method)

    return call


def _respond_stream(behaviour: _Behaviour, method: str, access: Access) -> _Wrapped:
    async def call(request: Any, context: _Context) -> None:
        try:
            check(access, method, context)
            responses = behaviour(_checked(request), context)
            if not inspect.isasyncgen(responses):
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)
        except asyncio.CancelledError as error:
            await _fail_unless_cancelled(context, error, method)
        except Exception as error:  # noqa: BLE001 - the boundary
            await _fail(context, error, method)

    return call


_KINDS: dict[
    tuple[bool, bool], tuple[Callable[[_Behaviour, str, Access], _Wrapped], Callable[..., Any]]
] = {
    (False, False): (_respond_once, grpc.unary_unary_rpc_method_handler),
    (True, False): (_respond_once, grpc.stream_unary_rpc_method_handler),
    (False, True): (_respond_stream, grpc.unary_stream_rpc_method_handler),
    (True, True): (_respond_stream, grpc.stream_stream_rpc_method_handler),
}


def _tolerant(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Left alone, gRPC answers INTERNAL to what its deserializer raises, before any handler runs."""
    if parse is None:
        return None

    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except (DecodeError, ValueError):
            return _Malformed()

    return parse_or_mark


def _checked(request: Any) -> Any:
    """The request, or the iterator of requests, with unparsable ones raised as `InvalidRequestError`."""
    if isinstance(request, _Malformed):
        raise _malformed()
    if isinstance(request, AsyncIterator):
        return _checked_each(request)
    return request


async def _checked_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Malformed):
            raise _malformed()
        yield request


def _malformed() -> InvalidRequestError:
    return InvalidRequestError(
        FieldViolation("request", "not a valid protobuf message of the expected type")
    )


async def _fail_unless_cancelled(
    context: _Context, error: asyncio.CancelledError, method: str
) -> None:
    """A handler may raise CancelledError though nobody cancelled its call. gRPC would send no status, and the peer would hang."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise error
    await _fail(context, error, method)


async def _fail(context: _Context, error: BaseException, method: str) -> None:
    if isinstance(error, BaseExceptionGroup):
        error = first_error(error)
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await abort(context, typed_error(error, method))


def typed_error(error: BaseException, method: str) -> BatonError:
    """What a caller is told of an exception that a handler raised; one that is no `BatonError` is logged."""
    if isinstance(error, BaseExceptionGroup):
        error = first_error(error)
    if isinstance(error, BatonError):
        return error
    frames = "".join(traceback.format_tb(error.__traceback__))
    # The exception's own text may quote the request.
    _log.error("%s failed: %s\n%s", method, type(error).__name__, frames)
    return InternalError(f"internal error ({type(error).__name__})")
