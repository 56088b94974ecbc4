"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from fastapi import APIRouter

from server.openai.answers import ModelCard, ModelList
from server.openai.service import Service, ServiceDep

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List models")
async def list_models(service: ServiceDep) -> ModelList:
    """The one model that is served."""
    return ModelList(object="list", data=[_card(service)])


@router.get("/v1/models/{model:path}", summary="Describe a model")
async def retrieve_model(model: str, service: ServiceDep) -> ModelCard:
    """Raises ModelNotFoundError for any other. Names of models may hold slashes."""
    service.check_model(model)
    return _card(service)


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.model_name,
        object="model",
        created=service.created,
        owned_by="medusa-serve",
        max_model_len=service.engine.info.max_model_len,
    )
