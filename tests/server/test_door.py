"""What a request passes before the routes: ids, the access log, keys, CORS, sizes and time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from scripted import HANG, ScriptedEngine, app_of, client_of, events, live, say

from server.access_log import entry
from server.auth import OPEN
from server.options import DoorOptions
from server.visit import Visit

KEYS = DoorOptions(api_keys=("sk-first", "sk-second"))
PROMPT = {"prompt": "Hi", "max_tokens": 5}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response.json()["error"]


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer sk-firs", "Bearer sk-first2", "Basic sk-first"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/debug/controller", "/nowhere"])
async def test_no_key_no_entry(path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with client_of(app_of(ScriptedEngine(), options=KEYS)) as client:
        response = await client.get(path, headers=headers)
    error = error_of(response, 401)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert "sk-" not in response.text


@pytest.mark.parametrize("header", ["Bearer sk-first", "bearer sk-second", "Bearer  sk-second "])
async def test_any_key_opens(header: str) -> None:
    async with client_of(app_of(ScriptedEngine(), options=KEYS)) as client:
        assert (await client.get("/v1/models", headers={"authorization": header})).status_code == 200


async def test_what_operators_ask_for_stays_open() -> None:
    async with client_of(app_of(ScriptedEngine(), options=KEYS)) as client:
        assert {(await client.get(path)).status_code for path in OPEN} == {200}
        assert (await client.get("/v1/../health")).status_code in (200, 401)  # the client resolves it
        assert (await client.get("/health/")).status_code == 401


async def test_a_request_id_goes_in_and_out(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/nowhere", "/v1/models/none"):
        response = await client.get(path, headers={"X-Request-Id": "trace/7:a=b+c@d.e_f-g"})
        assert response.headers.get_list("x-request-id") == ["trace/7:a=b+c@d.e_f-g"]
    made = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2


@pytest.mark.parametrize("bad", ["", "a b", 'a"b', "a\tb", "x" * 129, "ä"])
async def test_a_malformed_request_id_is_replaced(client: httpx.AsyncClient, bad: str) -> None:
    response = await client.get("/health", headers={"X-Request-Id": bad.encode()})
    assert len(response.headers["x-request-id"]) == 32


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> object:
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


async def test_each_request_is_one_line_of_the_access_log(logged: object) -> None:
    options = DoorOptions(api_keys=("sk-first", "sk-second"), access_log=True)
    engine = ScriptedEngine()
    headers = {"authorization": "Bearer sk-second", "x-request-id": "mine"}
    async with client_of(app_of(engine, options=options)) as client:
        await client.post("/v1/completions", json=PROMPT | {"n": 2, "prompt": ["Hi", "you"]}, headers=headers)
        await client.post("/v1/completions?key=sk-first", json=PROMPT)
        engine.script = lambda submit: [*say(submit, "ab")[:1], ZeroDivisionError("bug")]
        await client.post("/v1/completions", json=PROMPT | {"stream": True}, headers=headers)
    whole, refused, broken = logged()
    assert whole.pop("seconds") >= 0
    assert whole.pop("time").endswith("+00:00")
    assert whole == {
        "request_id": "mine",
        "client": "127.0.0.1",
        "key": "key-2",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "error": None,
        "complete": True,
        "prompt_tokens": 5,
        "completion_tokens": 20,
    }
    assert (refused["status"], refused["error"], refused["key"]) == (401, "invalid_api_key", None)
    assert (refused["path"], refused["prompt_tokens"]) == ("/v1/completions", None)
    assert (broken["status"], broken["error"], broken["completion_tokens"]) == (200, "internal_error", 1)
    assert not any("sk-" in str(line) for line in (whole, refused, broken))


def test_a_client_that_leaves_is_seen_in_the_access_log() -> None:
    visit = Visit("id", "GET", "/" + "x" * 1000, None)
    line = entry(visit)
    assert (line["status"], line["complete"], len(str(line["path"]))) == (499, False, 256)


async def test_a_bug_is_500_and_its_trace_is_in_the_log_alone(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda submit: 1 / 0
    with caplog.at_level(logging.ERROR):
        error = error_of(await client.post("/v1/completions", json=PROMPT), 500)
    assert error["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text


async def test_a_bug_in_mid_stream_is_an_event_before_the_end(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda submit: [*say(submit, "ab")[:1], ZeroDivisionError("secret")]
    with caplog.at_level(logging.ERROR):
        response = await client.post("/v1/completions", json=PROMPT | {"stream": True})
    first, last = events(response.text)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_browsers_may_call_and_may_read_errors() -> None:
    options = DoorOptions(api_keys=("sk-first",), allowed_origins=("https://page.example",))
    origin = {"origin": "https://page.example"}
    async with client_of(app_of(ScriptedEngine(), options=options)) as client:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await client.options("/v1/completions", headers=origin | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        refused = await client.post("/v1/completions", json=PROMPT, headers=origin)
        error_of(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
        other = await client.get("/health", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_without_origins_there_is_no_cors(client: httpx.AsyncClient) -> None:
    response = await client.get("/health", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_body_has_its_limit(declared: bool, path: str) -> None:
    body = json.dumps({"prompt": "x" * 90}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    headers = {"content-type": "application/json"}
    async with client_of(app_of(ScriptedEngine(), options=DoorOptions(max_request_bytes=100))) as client:
        content = body if declared else pieces()
        error = error_of(await client.post(path, content=content, headers=headers), 413)
        assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
        assert "100 bytes" in error["message"]
        small = json.dumps({"prompt": "x" * 50}).encode()
        assert (await client.post("/v1/completions", content=small, headers=headers)).status_code == 200


def hanging(text: str) -> ScriptedEngine:
    return ScriptedEngine(lambda submit: [*say(submit, text + "!")[: len(text)], HANG])


async def test_a_request_has_its_time() -> None:
    engine = hanging("abc")
    async with client_of(app_of(engine, options=DoorOptions(request_timeout_seconds=0.1))) as client:
        error = error_of(await client.post("/v1/completions", json=PROMPT), 504)
        assert (error["type"], error["code"]) == ("server_error", "request_timeout")
        assert "0.1 seconds" in error["message"]
        response = await client.post("/v1/completions", json=PROMPT | {"stream": True})
        assert response.status_code == 200
        *chunks, last = events(response.text)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]
        assert last["error"]["code"] == "request_timeout"
    assert len(engine.aborted) == 2


async def test_somebody_elses_time_out_is_a_bug() -> None:
    engine = ScriptedEngine(lambda submit: [TimeoutError("not the deadline's")])
    async with client_of(app_of(engine, options=DoorOptions(request_timeout_seconds=30))) as client:
        error_of(await client.post("/v1/completions", json=PROMPT), 500)


def test_whoever_does_not_read_is_cut_off_at_the_deadline() -> None:
    text = "x" * 60
    engine = ScriptedEngine(lambda submit: [say(submit, text, by=60)[0]] * 200_000, max_model_len=10**9)

    async def reads_nothing(url: httpx.URL) -> bytes:
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await asyncio.sleep(2)
        received = b""
        while piece := await reader.read(2**20):
            received = received[-1000:] + piece
        writer.close()
        return received

    with live(app_of(engine, options=DoorOptions(request_timeout_seconds=0.2))) as url:
        last = asyncio.run(asyncio.wait_for(reads_nothing(httpx.URL(url)), 20))
    assert b"data: " in last
