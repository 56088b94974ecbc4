"""Heads written in every format and read again: the same drafts, and files that the other software would find."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import PICKLE_NAME, WEIGHTS_NAME, HeadTensors, load_heads, read_heads, save_heads
from models.drafters.medusa import DraftRow, propose
from models.drafters.resblock import ResBlockHeads
from models.export import FORMATS, ExportError, Source, check_expressible, export, main, remarks
from models.train.trunk import load_trunk
from server.engine.messages import SamplingParams

HIDDEN, VOCAB, HEADS = 32, 64, 3
MAP = tuple(range(1, VOCAB, 2))
ACCURACIES = ((0.5, 0.2), (0.3, 0.1), (0.2, 0.1))


@pytest.fixture
def lm_head(tiny_model: Path) -> Tensor:
    weight: Tensor = load_trunk(tiny_model, torch.float32, "cpu")[0].get_output_embeddings().weight
    return weight.detach()


def write_heads(folder: Path, lm_head: Tensor, num_layers: int, *, is_cut: bool, **options: Any) -> Path:
    """Random heads in our own format."""
    torch.manual_seed(num_layers)
    ids = torch.tensor(MAP) if is_cut else torch.arange(VOCAB)
    heads = ResBlockHeads(lm_head[ids], num_heads=HEADS, num_layers=num_layers, token_ids=ids, **options)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    save_heads(folder, heads, base_model="org/base", vocab_size=VOCAB, card="", dtype=torch.float16)
    return folder


def drafts(path: Path, lm_head: Tensor) -> list[list[list[int]]]:
    heads = load_heads(path, lm_head)
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(5))
    sampled = DraftRow(SamplingParams(9, temperature=0.8, seed=3), 4)
    rows = [DraftRow(SamplingParams(9, temperature=0), 4), sampled] * 10
    return propose(heads, hidden, rows, 12).tokens.tolist()


CASES = list(itertools.product(sorted(FORMATS), (1, 2, 3), (False, True)))


@pytest.mark.parametrize(("format", "num_layers", "is_cut"), CASES)
def test_read_again_they_make_the_same_drafts(
    tmp_path: Path,
    tiny_model: Path,
    lm_head: Tensor,
    format: str,
    num_layers: int,
    is_cut: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads = write_heads(tmp_path / "heads", lm_head, num_layers, is_cut=is_cut, accuracies=ACCURACIES)
    output = tmp_path / "exported"
    assert main([str(heads), "--format", format, "--model", str(tiny_model), "--output", str(output)]) == 0
    assert drafts(output, lm_head) == drafts(heads, lm_head)
    assert read_heads(output).accuracies == ACCURACIES
    said = " ".join(capsys.readouterr().out.split())
    assert ("guess from the whole vocabulary" in said) == (is_cut and format != "vllm")
    assert ("shares one block" in said) == (num_layers > 1 and format.startswith("fasterdecoding"))


def exported(tmp_path: Path, lm_head: Tensor, format: str, num_layers: int = 1, **options: Any) -> tuple[Path, Any]:
    """The folder and its config.json."""
    heads = write_heads(tmp_path / "heads", lm_head, num_layers, **{"is_cut": False, **options})
    export(Source(read_heads(heads), lm_head, "org/base"), format, tmp_path / "out")
    return tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())


def test_fasterdecoding_is_a_pickle_with_an_lm_head_each(tmp_path: Path, lm_head: Tensor) -> None:
    folder, config = exported(tmp_path, lm_head, "fasterdecoding", 2)
    state = torch.load(folder / PICKLE_NAME, weights_only=True)
    blocks = {f"{h}.{n}.linear.{kind}" for h in range(HEADS) for n in (0, 1) for kind in ("weight", "bias")}
    assert set(state) == blocks | {f"{h}.2.weight" for h in range(HEADS)}
    assert all(torch.equal(state[f"{h}.2.weight"], lm_head) for h in range(HEADS))
    assert config == {"base_model_name_or_path": "org/base", "medusa_num_heads": HEADS, "medusa_num_layers": 2}
    assert (folder / PICKLE_NAME).stat().st_size < 2 * lm_head.nbytes + 40_000  # shared storage is written once


def test_version_2_has_blocks_alone(tmp_path: Path, lm_head: Tensor) -> None:
    folder, config = exported(tmp_path, lm_head, "fasterdecoding-2")
    assert len(torch.load(folder / PICKLE_NAME, weights_only=True)) == 2 * HEADS
    assert config["version"] == "2"


@pytest.mark.parametrize(("num_layers", "num_tensors"), [(1, 2 * HEADS), (2, 5 * HEADS)])
def test_tgi_ties_heads_of_one_block_only(tmp_path: Path, lm_head: Tensor, num_layers: int, num_tensors: int) -> None:
    folder, config = exported(tmp_path, lm_head, "tgi", num_layers)
    assert len(load_file(folder / WEIGHTS_NAME)) == num_tensors
    assert config["medusa_num_layers"] == num_layers


def test_vllm_has_one_lm_head_of_the_draft_vocabulary(tmp_path: Path, lm_head: Tensor) -> None:
    folder, config = exported(tmp_path, lm_head, "vllm", is_cut=True)
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], lm_head[list(MAP)])
    assert (state["token_map"].dtype, state["token_map"].tolist()) == (torch.int64, list(MAP))
    assert {name for name in state if name.startswith("blocks.0")} == {
        "blocks.0.layers.0.weight",
        "blocks.0.layers.0.bias",
    }
    assert (
        config
        | {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "medusa_fc_bias": True,
            "original_lm_head": True,
            "num_heads": HEADS,
            "vocab_size": VOCAB,
            "truncated_vocab_size": len(MAP),
        }
        == config
    )


@pytest.mark.parametrize("format", ["fasterdecoding", "tgi", "vllm"])
def test_lm_heads_of_their_own_go_along(tmp_path: Path, lm_head: Tensor, format: str) -> None:
    torch.manual_seed(1)
    state = {f"{h}.0.linear.weight": 0.2 * torch.randn(HIDDEN, HIDDEN) for h in range(HEADS)}  # without biases
    state |= {f"{h}.1.weight": torch.randn(VOCAB, HIDDEN) for h in range(HEADS)}
    save_file(state, tmp_path / "foreign.safetensors")
    export(Source(read_heads(tmp_path / "foreign.safetensors"), lm_head, "x"), format, tmp_path / "out")
    assert drafts(tmp_path / "out", lm_head) == drafts(tmp_path / "foreign.safetensors", lm_head)


def test_what_a_format_cannot_say_is_refused(tmp_path: Path, tiny_model: Path, lm_head: Tensor) -> None:
    folder = write_heads(tmp_path / "heads", lm_head, 1, is_cut=True)
    own = replace(read_heads(folder), shared_lm_head=lm_head[list(MAP)])
    with pytest.raises(ExportError, match="give --format fasterdecoding"):
        check_expressible(own, "fasterdecoding-2")
    with pytest.raises(ExportError, match="only --format vllm"):
        export(Source(own, lm_head, "x"), "tgi", tmp_path / "out")
    export(Source(own, lm_head, "x"), "vllm", tmp_path / "out")
    assert remarks(own, "vllm") == []


def test_errors_are_sentences(
    tmp_path: Path, tiny_model: Path, lm_head: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--format", "tgi", "--model", str(tiny_model), "--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "none"), *flags]) == 2
    assert "nothing at" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "medusa_sequential"}')
    assert main([str(tmp_path), *flags]) == 2
    assert "--design resblock" in capsys.readouterr().err
    save_file({"0.0.linear.weight": torch.zeros(4, 4)}, tmp_path / "small.safetensors")
    assert main([str(tmp_path / "small.safetensors"), *flags]) == 2
    assert "hidden size" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["fasterdecoding", "tgi", "vllm"])
def test_heads_that_see_inner_layers_have_no_place_elsewhere(format: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--features last"):
        check_expressible(HeadTensors(tmp_path, fusion=torch.zeros(2, 6)), format)
