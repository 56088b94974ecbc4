"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.openai.service import Service, ServiceDep

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, service: ServiceDep) -> dict[str, Any]:
    """Raises ModelNotFoundError for any other. Names of models may hold slashes."""
    service.check_model(model)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "medusa-serve",
        "max_model_len": service.engine.info.max_model_len,
    }
