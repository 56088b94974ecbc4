"""response_format and structured_outputs become grammars, or a 400 in the compiler's words."""

from __future__ import annotations

import json

import httpx
import pytest
from scripted import ScriptedEngine

URLS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]}, "/v1/completions": {"prompt": "Hi"}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b", "a"]}


def schema_format(schema: object, **more: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}}


async def grammar(client: httpx.AsyncClient, engine: ScriptedEngine, url: str, **body: object) -> str | None:
    response = await client.post(url, json={**URLS[url], **body})
    assert response.status_code == 200, response.text
    found: str | None = engine.submits[-1].sampling.grammar
    return found


@pytest.mark.parametrize("url", URLS)
async def test_formats(client: httpx.AsyncClient, engine: ScriptedEngine, url: str) -> None:
    assert await grammar(client, engine, url) is None
    assert await grammar(client, engine, url, response_format={"type": "text"}) is None
    strict = await grammar(client, engine, url, **schema_format(SCHEMA, strict=True, description="A thing."))
    assert strict is not None
    assert strict.index('"b"') < strict.index('"a"')  # properties stay in their order
    assert await grammar(client, engine, url, **schema_format(SCHEMA, strict=False)) == strict
    assert await grammar(client, engine, url, structured_outputs={"json": SCHEMA}) == strict
    assert await grammar(client, engine, url, structured_outputs={"json": json.dumps(SCHEMA)}) == strict
    anything = await grammar(client, engine, url, response_format={"type": "json_object"})
    assert anything is not None
    assert await grammar(client, engine, url, structured_outputs={"json_object": True}) == anything
    assert (
        await grammar(client, engine, url, structured_outputs={"choice": ["yes", "no"]})
        == 'start: CHOICE\nCHOICE: "yes" | "no"'
    )
    assert "a+" in (await grammar(client, engine, url, structured_outputs={"regex": "a+"}) or "")
    lark = 'start: "a" | "b"'
    assert await grammar(client, engine, url, structured_outputs={"grammar": lark}) == lark


BAD = [
    (schema_format({"type": "foo"}), "response_format", "Invalid schema for response_format 'it': Invalid type: foo."),
    (schema_format([1]), "response_format.json_schema.schema", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format", "json_schema goes with"),
    (schema_format(SCHEMA, name="no spaces"), "response_format.json_schema.name", ""),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "must be a JSON schema"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "GBNF"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", ""),
    ({"structured_outputs": {"guess": 1}}, "structured_outputs.guess", "Unrecognized"),
    (schema_format(SCHEMA) | {"structured_outputs": {"regex": "a"}}, "structured_outputs", "either"),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("body", "param", "sentence"), BAD)
async def test_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, body: dict, param: str, sentence: str
) -> None:
    response = await client.post(url, json={**URLS[url], **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert sentence in error["message"]
    assert error["message"].endswith(".")
    assert engine.submits == []


@pytest.mark.parametrize(("schema", "status"), [(True, 200), (False, 400)])
@pytest.mark.parametrize("url", URLS)
async def test_a_schema_may_be_a_word(client: httpx.AsyncClient, url: str, schema: bool, status: int) -> None:
    response = await client.post(url, json={**URLS[url], **schema_format(schema)})
    assert response.status_code == status, response.text
    assert status == 200 or "Unsatisfiable" in response.json()["error"]["message"]
