"""The paths of OpenAI's API. Handlers run on the router's event loop, in the task of their request."""

import secrets
import time
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from baton.errors import FieldViolation, InvalidRequestError
from baton.service.access import Caller
from baton.service.tracing import Origin, http_origin
from baton.v1 import inference_pb2
from router.http.edge import caller_of
from router.http.errors import violations
from router.http.openai.documents import ChatCompletion, Completion, Model, Models, answers
from router.http.openai.fields import ChatRequest, Common, CompletionRequest
from router.http.openai.forms import ChatForm, Form, TextForm
from router.http.openai.logprobs import Vocabulary
from router.http.openai.request import chat_requests, completion_requests
from router.http.openai.stream import EventWriter, GenerationResponse, WholeWriter, WriterOf
from router.inference import Inference
from router.model import ServedModel

TIMEOUT_HEADER = "x-request-timeout-s"
KEY_HEADER = "idempotency-key"

_Caller = Annotated[Caller, Depends(caller_of)]
_Timeout = Annotated[
    float | None,
    Header(
        alias=TIMEOUT_HEADER,
        gt=0,
        allow_inf_nan=False,
        description="The request's deadline, in seconds from now.",
    ),
]
_Key = Annotated[
    str,
    Header(
        alias=KEY_HEADER,
        description="Of a session's turn: its request's id. The same turn under the same key is told again, not had twice.",
    ),
]


def openai_routes(inference: Inference, model: ServedModel) -> APIRouter:
    """Everything below `/v1`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=_counting(inference))
    vocabulary = Vocabulary(model.tokenizer)
    created = int(time.time())

    def fingerprint() -> str:
        return "" if model.latest is None else f"fp_{model.latest.spec.model_fingerprint[:12]}"

    def writer_of(body: Common, form: Form) -> WriterOf:
        if not body.stream:
            return partial(WholeWriter, form=form, fingerprint=fingerprint)
        options = body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        return partial(EventWriter, form=form, fingerprint=fingerprint, with_usage=with_usage)

    @routes.post(
        "/completions", summary="Go on with a text", responses=answers(Completion, streams=True)
    )
    async def complete(
        request: Request,
        caller: _Caller,
        body: CompletionRequest,
        timeout_s: _Timeout = None,
        key: _Key = "",
    ) -> Response:
        requests = completion_requests(body, _named(request, body, key))
        return GenerationResponse(
            inference,
            requests,
            caller,
            writer_of(body, TextForm(vocabulary)),
            timeout_s=timeout_s,
            origin=_origin(request),
        )

    @routes.post(
        "/chat/completions",
        summary="Answer in a chat",
        responses=answers(ChatCompletion, streams=True),
    )
    async def chat(
        request: Request,
        caller: _Caller,
        body: ChatRequest,
        timeout_s: _Timeout = None,
        key: _Key = "",
    ) -> Response:
        requests = chat_requests(body, _named(request, body, key))
        return GenerationResponse(
            inference,
            requests,
            caller,
            writer_of(body, ChatForm(vocabulary)),
            timeout_s=timeout_s,
            origin=_origin(request),
        )

    def described(found: inference_pb2.GetModelResponse) -> Model:
        return Model(
            id=found.model,
            object="model",
            created=created,
            owned_by="baton",
            max_model_len=found.max_context_tokens,
        )

    @routes.get("/models", summary="The served model", responses=answers(Models))
    async def models(caller: _Caller) -> Response:
        found = inference.describe("", caller)
        data = [described(found)] if found.model else []
        return JSONResponse(Models(object="list", data=data).model_dump())

    @routes.get("/models/{name:path}", summary="One model", responses=answers(Model))
    async def one_model(name: str, caller: _Caller) -> Response:
        return JSONResponse(described(inference.describe(name, caller)).model_dump())

    return routes


def _counting(inference: Inference) -> type[APIRoute]:
    """Routes by which requests that are none count as those that the core refuses."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def counted(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    problem = InvalidRequestError(*violations(error.errors()))
                except InvalidRequestError as error:
                    problem = error
                except HTTPException as error:
                    if error.status_code != HTTPStatus.BAD_REQUEST:
                        raise
                    problem = InvalidRequestError(FieldViolation("body", "is not JSON in UTF-8"))
                return await inference.refuse(
                    problem, caller_of(request), _request_id(request), origin=_origin(request)
                )

            return counted

    return Route


def _named(request: Request, body: Common, key: str) -> str:
    """The request's id: of a session's turn the client's key, by which the session knows it again; the standard's form has quotes."""
    named = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
    return named if named and body.session_id else _request_id(request)


def _request_id(request: Request) -> str:
    """Begins with what the answer's header says. A client may give one id to several requests that run at once."""
    return f"{request.state.request_id}.{secrets.token_hex(4)}"


def _origin(request: Request) -> Origin:
    """Precondition: the route's path has no parameters."""
    return http_origin(request.headers.items(), request.method, request.url.path)
