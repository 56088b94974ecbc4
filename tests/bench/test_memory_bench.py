"""What processes hold, read where Linux says it, and slots filled by a stand-in that counts tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from tests.bench import memory

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
CHILD = "data = b'1' * (100 << 20); del data; print(1, flush=True); input()"


@needs_proc
def test_children_count_and_what_they_held_is_remembered() -> None:
    before, peak = memory.held(os.getpid()), memory.held(os.getpid(), "VmHWM")
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    assert memory.held(os.getpid()) > before + (4 << 20)  # an interpreter
    assert memory.held(os.getpid(), "VmHWM") > peak + (100 << 20)
    child.communicate(b"\n")


def test_slots_are_filled_by_prompts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def post(url: str, json: dict[str, object], **_: object) -> httpx.Response:
        prompt = json["prompt"]
        assert isinstance(prompt, list)
        seen.append(tuple(prompt))
        request = httpx.Request("POST", url)
        return httpx.Response(200, json={"usage": {"prompt_tokens": len(prompt)}}, request=request)

    monkeypatch.setattr(memory, "served_model", lambda _: "tiny")
    monkeypatch.setattr(httpx, "post", post)
    assert memory.fill(1, 5000) == 6000
    assert len(set(seen)) == 3
