"""What /openapi.json promises, held against requests that schemathesis makes up from it: valid ones and broken ones.

No answer is a server error, every answer has a documented status, type and schema, every event of a stream too, and a
request that the document forbids is refused. For longer: `CONTRACT_EXAMPLES=5000 pytest tests/server/test_contract.py`
makes so many requests to each route instead of 400.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted import ScriptedEngine, app_of, live

EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "400"))
BROKEN = EXAMPLES // 4
VALID = EXAMPLES - BROKEN
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
POSTS: dict[str, dict[str, Any]] = {  # with what a schema cannot say: a conversation that a template takes, and so on
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hi"}],
        **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs")),
    },
    "/v1/responses": {"input": "Hi"},
    "/tokenize": {
        "prompt": "Hi",
        **dict.fromkeys(("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")),
    },
    "/detokenize": {"tokens": [72, 105]},
}
GETS = ["/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics", "/debug/controller", "/version"]

pytestmark = pytest.mark.timeout(300 + EXAMPLES)


@pytest.fixture(scope="module")
def contract() -> Iterator[Any]:
    app = app_of(ScriptedEngine(max_model_len=4096))
    with live(app) as url:
        schema = schemathesis.openapi.from_dict(app.openapi())
        schema.config.update(base_url=url)
        yield schema


def hold(operation: APIOperation, mode: GenerationMode, examples: int, sound: dict[str, Any] | None) -> dict[int, int]:
    """How many requests were answered with which status. `sound` goes into every second of them."""
    answered: dict[int, int] = {}

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans() if sound else st.just(False))
    def check(case: schemathesis.Case, is_sound: bool) -> None:
        case.body = integral(case.body) | sound if is_sound else integral(case.body)
        response = case.call_and_validate(checks=CHECKS)
        answered[response.status_code] = answered.get(response.status_code, 0) + 1

    check()
    return answered


def integral(value: Any) -> Any:
    """JSON knows one kind of number, clients and servers know two: 3.0 is sent as 3."""
    if isinstance(value, dict):
        return {key: integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [integral(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def test_every_route_is_held_and_often(contract: Any) -> None:
    routes = {(operation.ok().method, operation.ok().path) for operation in contract.get_all_operations()}
    assert routes == {("post", path) for path in POSTS} | {("get", path) for path in GETS}
    assert len(POSTS) * EXAMPLES >= 2000


@pytest.mark.parametrize("path", POSTS)
def test_valid_requests(contract: Any, path: str) -> None:
    answered = hold(contract[path]["POST"], GenerationMode.POSITIVE, VALID, POSTS[path])
    assert sum(answered.values()) >= VALID
    assert answered[200] >= VALID / 10


@pytest.mark.parametrize("path", POSTS)
def test_broken_requests(contract: Any, path: str) -> None:
    answered = hold(contract[path]["POST"], GenerationMode.NEGATIVE, BROKEN, None)
    assert sum(answered.values()) >= BROKEN
    assert 200 not in answered


@pytest.mark.parametrize("path", GETS)
def test_pages(contract: Any, path: str) -> None:
    assert hold(contract[path]["GET"], GenerationMode.POSITIVE, 10, None).keys() <= {200, 404}
