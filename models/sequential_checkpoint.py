"""A sequential drafter on disk: our own format.

`config.json` says `"model_type": "medusa_sequential"`, sizes and accuracies; WEIGHTS_NAME holds the tensors of
`drafters.sequential.SequentialHeads` by name, and `token_map`. Embedding and LM head are the base model's, not written.

Invariants: as in `models.checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.checkpoint import WEIGHTS_NAME, CheckpointError
from models.drafters.resblock import Accuracies
from models.drafters.sequential import SequentialHeads, Shape

MODEL_TYPE = "medusa_sequential"


@dataclass(frozen=True)
class SequentialTensors:
    """A checkpoint that was read."""

    source: Path
    shape: Shape
    num_heads: int
    tensors: dict[str, Tensor]
    token_map: Tensor | None  # [draft_vocab]
    accuracies: Accuracies | None


def is_sequential(path: Path) -> bool:
    """Whether `path` is a folder of this format."""
    try:
        return bool(json.loads((path / "config.json").read_text())["model_type"] == MODEL_TYPE)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_sequential(path: Path) -> SequentialTensors:
    """Read a folder for which `is_sequential`. Raises CheckpointError."""
    try:
        config = json.loads((path / "config.json").read_text())
        shape, num_heads = Shape(**config["shape"]), int(config["num_heads"])
        rows = config.get("accuracies")
        accuracies = None if rows is None else tuple(tuple(float(share) for share in row) for row in rows)
        tensors = load_file(path / WEIGHTS_NAME)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The heads in {path} cannot be read ({error}); fetch the folder again.") from error
    if num_heads < 1 or (accuracies is not None and len(accuracies) != num_heads):
        raise CheckpointError(f"{path / 'config.json'} has accuracies of another number of heads; fetch it again.")
    return SequentialTensors(path, shape, num_heads, tensors, tensors.pop("token_map", None), accuracies)


def check_sequential(found: SequentialTensors, *, hidden_size: int, vocab_size: int) -> None:
    """Raise CheckpointError unless the drafter fits a model of these sizes. Needs no model."""
    if found.shape.hidden_size != hidden_size:
        raise CheckpointError(
            f"The heads in {found.source} are for a hidden size of {found.shape.hidden_size}, this model has "
            f"{hidden_size}; give heads that were trained for this model."
        )
    if found.token_map is not None:
        ids = found.token_map.flatten().tolist()
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab_size:
            raise CheckpointError(
                f"The token_map in {found.source} does not fit this model's vocabulary of {vocab_size}; "
                "give heads that were trained for this model."
            )


def build_sequential(found: SequentialTensors, embedding: Tensor, lm_head: Tensor) -> SequentialHeads:
    """Put the drafter between the model's own embedding and LM head, [vocab, hidden] both, in their dtype.

    Raises CheckpointError.
    """
    check_sequential(found, hidden_size=lm_head.shape[1], vocab_size=len(lm_head))
    ids = None if found.token_map is None else found.token_map.long()
    rows = lm_head if ids is None else lm_head[ids.to(lm_head.device)]
    heads = SequentialHeads(
        found.shape, embedding, rows, num_heads=found.num_heads, token_ids=ids, accuracies=found.accuracies
    ).to(lm_head.device, lm_head.dtype)
    heads.rotary = LlamaRotaryEmbedding(found.shape.config()).to(lm_head.device)  # whose frequencies were rounded, too
    try:
        heads.load_state_dict(found.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The heads in {found.source} do not fit their config.json ({reason}); fetch them again."
        ) from error
    return heads.eval().requires_grad_(False)


def save_sequential(
    folder: Path,
    heads: SequentialHeads,
    *,
    base_model: str,
    vocab_size: int,
    card: str,
    facts: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write config.json, WEIGHTS_NAME and README.md (`card`). `facts` go into config.json as "training"."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: value.detach().to("cpu", dtype).contiguous() for name, value in heads.state_dict().items()}
    if len(heads.token_ids) < vocab_size:
        named["token_map"] = heads.token_ids.to("cpu", torch.int32)
    (folder / WEIGHTS_NAME).write_bytes(save(named))
    config = {
        "model_type": MODEL_TYPE,
        "num_heads": heads.num_heads,
        "shape": asdict(heads.shape),
        "draft_vocab_size": len(heads.token_ids),
        "base_model_name_or_path": base_model,
        "accuracies": heads.accuracies,
        "training": dict(facts or {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
