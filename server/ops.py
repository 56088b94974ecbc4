"""For operators: /health, /ready, /metrics and /version."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server import __version__
from server.openai.service import ServiceDep

router = APIRouter()


@router.get("/health")
async def health(service: ServiceDep) -> dict[str, str]:
    """200 while the engine works, also when the server is about to end. Raises EngineDeadError (503) otherwise."""
    service.check_alive()
    return {"status": service.engine.status}


@router.get("/ready")
async def ready(service: ServiceDep) -> dict[str, str]:
    """200 while new requests are taken. Raises ShuttingDownError and EngineDeadError (503) while they are not."""
    service.check_ready()
    return {"status": service.engine.status}


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    """Of the server."""
    return {"version": __version__}
