"""Text to train on."""

import json
import random
from pathlib import Path

import pytest

WORDS = [f"w{i}" for i in range(59)]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats whose answers count on from a random word: easy to guess ahead once the state shows where they are."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    rows = []
    for _ in range(80):
        start, length = draw.randrange(59), draw.randrange(6, 20)
        answer = " ".join(WORDS[(start + i) % 59] for i in range(length))
        rows.append({"q": " ".join(draw.choices(WORDS, k=4)), "a": answer, "temp": draw.choice([0.0, 0.7])})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
