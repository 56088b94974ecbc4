"""/health, /ready, /metrics and /version."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import ScriptedEngine

from server import __version__


@pytest.mark.parametrize("route", ["/health", "/ready"])
async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine, route: str) -> None:
    assert (await client.get(route)).status_code == 200
    for status in ("starting", "restarting", "dead"):
        engine.status = status
        response = await client.get(route)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": __version__}


async def test_metrics_can_be_parsed(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert {"medusa_num_requests_running", "medusa_engine_restarts", "process_cpu_seconds"} <= names
