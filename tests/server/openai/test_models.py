"""GET /v1/models."""

from __future__ import annotations

from urllib.parse import quote

import httpx
from openai.types import Model
from scripted import MODEL


async def test_list_and_retrieve(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    Model.model_validate(card)
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 64)
    assert isinstance(card["created"], int)
    assert (await client.get(f"/v1/models/{MODEL}")).json() == card
    assert (await client.get(f"/v1/models/{quote(MODEL, safe='')}")).json() == card


async def test_unknown(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
