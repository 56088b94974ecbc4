"""Fixtures of the HTTP side: a scripted engine and clients of the application around it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from scripted import ScriptedEngine, app_of, client_of


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest_asyncio.fixture
async def client(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_of(engine)) as client:
        yield client
