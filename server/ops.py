"""For operators: /health, /ready, /metrics, /debug/controller and /version."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server import __version__
from server.controller_answers import ControllerAnswer, controller_answer
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


@router.get("/debug/controller", summary="How many guesses pay, and why")
async def controller(service: ServiceDep) -> ControllerAnswer:
    """What the engine knows of costs and gains: measured curves, calibration, speedups with their intervals, the latest
    decisions. It tells about once a second while it works. Unlike /metrics this needs an API key if the server has any.
    """
    return controller_answer(service.engine.controller)


@router.get("/version", summary="The server's version")
async def version() -> VersionAnswer:
    """Of the server."""
    return VersionAnswer(version=__version__)
