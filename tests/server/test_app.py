"""The application as a whole: its routes, and what it counts."""

from __future__ import annotations

import httpx
from scripted import ScriptedEngine, app_of


async def counted(client: httpx.AsyncClient) -> list[str]:
    page = (await client.get("/metrics")).text
    return [line for line in page.splitlines() if line.startswith("http_requests_total")]


async def test_requests_are_counted_by_route(client: httpx.AsyncClient) -> None:
    await client.get("/v1/models/org/tiny")
    await client.get("/v1/models/other")
    await client.get("/nowhere/at/all")
    await client.get("/v1/completions")
    await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert sorted(await counted(client)) == [
        'http_requests_total{handler="/v1/completions",method="GET",status="4xx"} 1.0',
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0',
        'http_requests_total{handler="/v1/models/{model:path}",method="GET",status="2xx"} 1.0',
        'http_requests_total{handler="/v1/models/{model:path}",method="GET",status="4xx"} 1.0',
        'http_requests_total{handler="none",method="GET",status="4xx"} 1.0',
    ]


async def test_bugs_are_counted(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: 1 / 0
    await client.post("/v1/completions", json={"prompt": "a"})
    assert await counted(client) == ['http_requests_total{handler="/v1/completions",method="POST",status="5xx"} 1.0']


async def test_schema_names_the_routes(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths["/v1/completions"]["post"]["responses"]) == {"200", "4XX", "5XX"}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= set(paths)


async def test_applications_share_nothing() -> None:
    one, two = app_of(ScriptedEngine()), app_of(ScriptedEngine())
    assert one.state.service.metrics.registry is not two.state.service.metrics.registry
