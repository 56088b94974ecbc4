"""What the command lines have in common."""

from __future__ import annotations

import argparse
import json

import pytest

from tests.bench.client import Prompt
from tests.bench.command import PROMPTS, add_options, integers, write


def test_numbers_on_the_command_line() -> None:
    assert integers("1,2,8") == (1, 2, 8)
    with pytest.raises(argparse.ArgumentTypeError, match="below 1"):
        integers("4,0")


def test_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, (1, 64))
    options = parser.parse_args(["--", "--num-threads", "1"])
    assert (options.concurrency, options.prompts, options.rest) == ((1, 64), PROMPTS, ["--num-threads", "1"])
    assert PROMPTS.is_file()


def test_dataclasses_are_written(tmp_path) -> None:
    write(tmp_path / "bench.json", {"prompts": [Prompt("a")]})
    prompt = {"user": "a", "system": None, "max_tokens": None}
    assert json.loads((tmp_path / "bench.json").read_text()) == {"prompts": [prompt]}
    write(None, {"prompts": []})
