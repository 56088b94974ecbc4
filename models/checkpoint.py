"""Heads on disk: our own format, written and read, and everyone else's, read.

| format | keys |
|---|---|
| ours, TGI and Medusa "version 2" | `{head}.{layer}.linear.weight`, `.bias`; ours also `token_map`, as in vLLM, and |
| | `fusion.weight` of heads that see the layers that config.json names as `inner_layers` |
| FasterDecoding v0.1 | the same and `{head}.{layers}.weight`: an LM head for each head |
| Medusa-2 full models | the same behind `medusa_head.`, among the base model's shards |
| vLLM | `blocks.{head}.layers.{layer}.weight`, `lm_heads.{head}.weight` or `lm_head.weight`, `token_map` |

Invariants:
- nothing is unpickled but tensors; only the heads' tensors are read from a shard;
- the number of heads is what the tensors say (published configs are wrong about it);
- tensors of an unexpected name or shape are an error, never ignored.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.drafters.resblock import Accuracies, ResBlockHeads
from models.errors import UsageError

WEIGHTS_NAME = "medusa_lm_head.safetensors"
PICKLE_NAME = "medusa_lm_head.pt"
_TRUNK = ("model.", "transformer.", "gpt_neox.")
_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"^(\d+)\.(\d+)\.linear\.(weight|bias)$|^blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)$")
_OWN_HEAD = re.compile(r"^(\d+)\.(\d+)\.weight$|^lm_heads\.(\d+)\.weight$")


class CheckpointError(UsageError):
    """Heads cannot be loaded; the message is one sentence that says what is wrong and what to do."""


@dataclass
class HeadTensors:
    """A checkpoint's tensors in one naming. Weights are not copied until they are needed."""

    source: Path
    blocks: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)  # (head, layer) -> weight, bias
    lm_heads: dict[int, Tensor] = field(default_factory=dict)  # head -> [rows, hidden]
    shared_lm_head: Tensor | None = None
    token_map: Tensor | None = None  # [draft_vocab]
    fusion: Tensor | None = None  # [hidden, (inner layers + 1) * hidden]
    inner_layers: tuple[int, ...] = ()
    accuracies: Accuracies | None = None

    @property
    def num_heads(self) -> int:
        return len({head for head, _ in self.blocks})

    @property
    def num_layers(self) -> int:
        return len(self.blocks) // max(1, self.num_heads)


def load_heads(
    path: Path,
    lm_head: Tensor | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ResBlockHeads:
    """Read heads of any known format from a file or folder and put them on top of the model's LM head.

    lm_head: the output embedding or its weight, [vocab, hidden]; dtype and device default to its own.
    Raises CheckpointError.
    """
    return build_heads(read_heads(path), lm_head, dtype=dtype, device=device)


def build_heads(
    tensors: HeadTensors,
    lm_head: Tensor | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ResBlockHeads:
    """`load_heads` for a checkpoint that has been read. Raises CheckpointError."""
    base = (lm_head if isinstance(lm_head, Tensor) else lm_head.get_parameter("weight")).detach()
    check_heads(tensors, hidden_size=base.shape[1], vocab_size=base.shape[0])
    base = base.to(device=device or base.device, dtype=dtype or base.dtype)
    rows = _output_rows(tensors, base)
    heads = ResBlockHeads(
        rows,
        num_heads=tensors.num_heads,
        num_layers=tensors.num_layers,
        token_ids=None if tensors.token_map is None else tensors.token_map.long(),
        accuracies=tensors.accuracies,
        inner_layers=tensors.inner_layers,
    )
    with torch.no_grad():
        if heads.fusion is not None and tensors.fusion is not None:
            heads.fusion.copy_(tensors.fusion)
        for (head, layer), block in tensors.blocks.items():
            heads.weight[layer, head].copy_(block["weight"])
            if "bias" in block:
                heads.bias[layer, head, 0].copy_(block["bias"])
    return heads.eval().requires_grad_(False)


def check_heads(tensors: HeadTensors, *, hidden_size: int, vocab_size: int) -> None:
    """Raise CheckpointError unless the heads fit a model of these sizes. Needs no model: do it before loading one."""
    where, heads, layers = tensors.source, tensors.num_heads, tensors.num_layers
    if set(tensors.blocks) != {(head, layer) for head in range(heads) for layer in range(layers)}:
        raise CheckpointError(f"The heads in {where} are incomplete: some layers are missing; fetch the files again.")
    for (head, layer), block in tensors.blocks.items():
        weight = block.get("weight")
        if weight is None or weight.shape != (hidden_size, hidden_size):
            found = "no weight" if weight is None else f"{tuple(weight.shape)}"
            raise CheckpointError(
                f"Head {head}, layer {layer} in {where} has {found} where this model's hidden size needs "
                f"({hidden_size}, {hidden_size}); give heads that were trained for this model."
            )
        if "bias" in block and block["bias"].shape != (hidden_size,):
            raise CheckpointError(
                f"Head {head}, layer {layer} in {where} has a bias of the wrong size; fetch it again."
            )
    _check_fusion(tensors, hidden_size)
    _check_vocabulary(tensors, hidden_size, vocab_size)


def _check_fusion(tensors: HeadTensors, hidden_size: int) -> None:
    found = None if tensors.fusion is None else tuple(tensors.fusion.shape)
    count = len(tensors.inner_layers)
    if found != ((hidden_size, (count + 1) * hidden_size) if count else None):
        raise CheckpointError(
            f"The fusion.weight in {tensors.source} is {found or 'missing'}, which does not fit the {count} "
            f"inner_layers of its config.json and this model's hidden size, {hidden_size}; "
            "give heads that were trained for it."
        )


def _check_vocabulary(tensors: HeadTensors, hidden_size: int, vocab_size: int) -> None:
    where, mapped = tensors.source, tensors.token_map
    if mapped is not None:
        ids = mapped.flatten().tolist()
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab_size:
            raise CheckpointError(
                f"The token_map in {where} does not fit this model's vocabulary of {vocab_size}; "
                "give heads that were trained for this model."
            )
    if tensors.lm_heads and set(tensors.lm_heads) not in ({0}, set(range(tensors.num_heads))):
        raise CheckpointError(
            f"Some heads in {where} have an LM head of their own and some not; fetch the files again."
        )
    allowed = {vocab_size} if mapped is None else {vocab_size, len(mapped)}
    for rows in (*tensors.lm_heads.values(), *([] if tensors.shared_lm_head is None else [tensors.shared_lm_head])):
        if rows.dim() != 2 or rows.shape[0] not in allowed or rows.shape[1] != hidden_size:
            raise CheckpointError(
                f"An LM head in {where} is {tuple(rows.shape)} where this model needs ({vocab_size}, {hidden_size}); "
                "give heads that were trained for this model."
            )


def _output_rows(tensors: HeadTensors, base: Tensor) -> Tensor:
    """The LM head that the heads use, cut to the draft vocabulary: [draft_vocab, hidden], or one for each head."""

    def cut(rows: Tensor) -> Tensor:
        mapped = tensors.token_map
        if mapped is not None and rows.shape[0] != len(mapped):
            rows = rows[mapped.to(rows.device, torch.long)]
        return rows.to(base)

    if len(tensors.lm_heads) > 1:
        return torch.stack([cut(tensors.lm_heads[head]) for head in range(tensors.num_heads)])
    own = tensors.lm_heads.get(0, tensors.shared_lm_head)
    return cut(base if own is None else own)


def read_heads(path: Path) -> HeadTensors:
    """Read and name a checkpoint's tensors without knowing the model. Raises CheckpointError."""
    tensors = HeadTensors(path)
    for file in _weight_files(path):
        for name, tensor in _read(file):
            _place(tensors, name, tensor)
    if not tensors.blocks:
        raise CheckpointError(f"There are no Medusa heads in {path}; give a file or folder with trained heads.")
    config = _config(path / "config.json")
    tensors.accuracies = _accuracies(path, config.get("accuracies"), tensors.num_heads)
    tensors.inner_layers = _inner_layers(path, config.get("inner_layers", []))
    return tensors


def _place(tensors: HeadTensors, full_name: str, tensor: Tensor) -> None:
    name = _PREFIX.sub("", full_name)
    if match := _BLOCK.match(name):
        head, layer, kind = (group for group in match.groups() if group is not None)
        tensors.blocks.setdefault((int(head), int(layer)), {})[kind] = tensor
    elif match := _OWN_HEAD.match(name):
        tensors.lm_heads[int(match[1] or match[3] or 0)] = tensor
    elif name == "lm_head.weight":
        tensors.shared_lm_head = tensor
    elif name == "token_map":
        tensors.token_map = tensor
    elif name == "fusion.weight":
        tensors.fusion = tensor
    else:
        raise CheckpointError(
            f"{tensors.source} has a tensor named '{full_name}', which belongs to no known format of Medusa heads; "
            "give heads in the format of Medusa, TGI, vLLM or medusa-serve."
        )


def _weight_files(path: Path) -> list[Path]:
    """The files to look into: the one with heads alone if there is one, else every shard."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"There is nothing at {path}; give the file or folder of trained heads.")
    for pattern in (WEIGHTS_NAME, PICKLE_NAME, "*.safetensors", "*.pt", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return files
    raise CheckpointError(f"There are no weights in {path}; expected {WEIGHTS_NAME} or {PICKLE_NAME}.")


def _read(file: Path) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of the tensors that belong to heads."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return [(name, opened.get_tensor(name)) for name in _of_heads(opened.keys())]
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise CheckpointError(f"{file} holds no named tensors; give a file with trained heads.")
        return [(name, state[name]) for name in _of_heads(state)]
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} cannot be read as tensors ({reason}); fetch it again.") from error


def _of_heads(names: Iterable[str]) -> list[str]:
    """In a full model's shard the prefixed names alone; else all."""
    every = list(names)
    is_shard = any(name.startswith(_TRUNK) for name in every)
    return [name for name in every if _PREFIX.match(name) or not is_shard]


def _config(file: Path) -> dict[str, Any]:
    """The content of config.json; empty if there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again or remove it.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} cannot be read (it is no JSON object); fetch it again or remove it.")
    return config


def _accuracies(path: Path, rows: Any, num_heads: int) -> Accuracies | None:
    if rows is None:
        return None
    try:
        accuracies = tuple(tuple(float(share) for share in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"accuracies in {path}/config.json cannot be read ({error}); remove them.") from error
    if len(accuracies) != num_heads:
        raise CheckpointError(
            f"{path}/config.json has accuracies of {len(accuracies)} heads, not {num_heads}; remove them."
        )
    return accuracies


def _inner_layers(path: Path, layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"inner_layers in {path}/config.json is no list of layers; fetch the files again.")
    return tuple(layers)


def save_heads(
    folder: Path,
    heads: ResBlockHeads,
    *,
    base_model: str,
    vocab_size: int,
    card: str,
    facts: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write our format: config.json, WEIGHTS_NAME and README.md (`card`). `facts` go into config.json as "training".

    The LM head is the base model's and is not written. Raises ValueError for heads with their own.
    """
    if heads.lm_head.dim() != 2:
        raise ValueError("Heads with LM heads of their own cannot be saved in this format; keep their original files.")
    folder.mkdir(parents=True, exist_ok=True)
    named = _named(heads, vocab_size, lambda tensor: tensor.detach().to("cpu", dtype).contiguous())
    (folder / WEIGHTS_NAME).write_bytes(save(named))
    config = {
        "model_type": "medusa",
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "vocab_size": vocab_size,
        "draft_vocab_size": len(heads.token_ids),
        "base_model_name_or_path": base_model,
        "accuracies": heads.accuracies,
        **({"inner_layers": heads.inner_layers} if heads.inner_layers else {}),
        "training": dict(facts or {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _named(heads: ResBlockHeads, vocab_size: int, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            named[f"{head}.{layer}.linear.weight"] = convert(heads.weight[layer, head])
            named[f"{head}.{layer}.linear.bias"] = convert(heads.bias[layer, head, 0])
    if heads.fusion is not None:
        named["fusion.weight"] = convert(heads.fusion)
    if len(heads.token_ids) < vocab_size:
        named["token_map"] = heads.token_ids.to("cpu", torch.int32)
    return named
