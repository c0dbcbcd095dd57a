"""What load balancers, Kubernetes and Prometheus ask, without a key.

Handlers run on the router's event loop; the metrics are written by a thread, for that takes longer than a token may wait.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import JSONResponse, Response

from baton.service.metrics import RouterMetrics
from router.inference import Inference

Responses = dict[int | str, dict[str, Any]]


def health_routes(inference: Inference, metrics: RouterMetrics) -> APIRouter:
    """`/health`: the router serves; `/ready`: and so do workers enough for a request; `/metrics`."""
    routes = APIRouter(tags=["health"])

    @routes.get("/health", summary="Whether the router serves", responses=_STATES)
    async def health() -> Response:
        return _state(None if inference.serves else "draining")

    @routes.get("/ready", summary="Whether a request would find workers", responses=_STATES)
    async def ready() -> Response:
        if not inference.serves:
            return _state("draining")
        return _state(None if inference.can_serve() else "no workers")

    @routes.get("/metrics", summary="For Prometheus", responses=_METRICS)
    async def export(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, metrics.registry)
        return Response(text, headers={"content-type": content_type})

    return routes


_STATE = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
_STATES: Responses = {
    200: {"content": _STATE},
    503: {"content": _STATE, "description": "It does not."},
}
_METRICS: Responses = {200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}


def _state(why_not: str | None) -> Response:
    return JSONResponse({"status": why_not or "ok"}, 200 if why_not is None else 503)
