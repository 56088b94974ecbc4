"""For operators: /health, /ready, /metrics and /version."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server import __version__
from server.openai.answers import HealthAnswer, VersionAnswer
from server.openai.service import ServiceDep

router = APIRouter(tags=["operation"])


@router.get("/health", summary="Is the engine alive?")
async def health(service: ServiceDep) -> HealthAnswer:
    """200 while the engine works, also when the server is about to end. Raises EngineDeadError (503) otherwise."""
    service.check_alive()
    return HealthAnswer(status="ready")


@router.get("/ready", summary="Can requests be sent?")
async def ready(service: ServiceDep) -> HealthAnswer:
    """200 while new requests are taken. Raises ShuttingDownError and EngineDeadError (503) while they are not."""
    service.check_ready()
    return HealthAnswer(status="ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", summary="The server's version")
async def version() -> VersionAnswer:
    """Of the server."""
    return VersionAnswer(version=__version__)
