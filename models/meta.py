"""Meta's own checkpoints (`params.json`, `consolidated.pth`, `tokenizer.model`) as a folder of `models.mtp`.

That is the layout of facebook/multi-token-prediction and of the first Llamas, which are such models with one head:

    tok_embeddings.weight, norm.weight, output.weight
    {layers.L | extra_heads.H}.{attention.{wq,wk,wv,wo} | feed_forward.{w1,w2,w3} | attention_norm | ffn_norm}.weight

The last of `layers` is the head of the next token, `extra_heads.H` guesses H + 1 places further. `params.json` names
the heads, the norm's epsilon and the rotation; all sizes that weights have are taken from the weights.

Invariants:
- pickles are opened with `weights_only=True`: none of their code runs;
- rotary pairs stand side by side in Meta's rows of wq and wk, and half a head apart in transformers': they are moved,
  and no number is changed;
- a checkpoint with a tensor too many or too few is refused, by a sentence in one line.

`python -m models.meta SRC DST` does the work; the last line on stderr says what went wrong.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.mtp import MTPConfig, MTPForCausalLM
from models.sentence_pieces import llama_tokenizer

CONTEXT = 4096  # tokens; of the paper's models (arXiv 2404.19737) where params.json names no `max_seq_len`
_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"(layers|extra_heads)\.(\d+)\.(.+)\.weight")
_COMPUTED = "rope.freqs"  # a buffer that some files carry


class MetaFormatError(ValueError):
    """This checkpoint cannot be converted faithfully."""


def convert(source: Path, folder: Path) -> None:
    """Write the checkpoint in `source` into the existing `folder`. Raises MetaFormatError and TokenizerError."""
    params = read_params(source)
    state = _read_state(source)
    config = config_of(params, state)
    tokenizer = _tokenizer(source)
    if len(tokenizer) > config.vocab_size:
        raise MetaFormatError(f"The tokenizer has {len(tokenizer)} tokens, but the model {config.vocab_size}.")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(folder)
    save_file(rename(state, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def read_params(source: Path) -> dict[str, Any]:
    """params.json. Raises MetaFormatError."""
    try:
        params = json.loads((source / "params.json").read_text(encoding="utf-8"))
        if not isinstance(params, dict) or not isinstance(params["n_heads"], int) or params["n_heads"] < 1:
            raise TypeError("n_heads must be a number of heads")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MetaFormatError(
            f"{source / 'params.json'} does not describe a model ({error}): fetch it again."
        ) from error
    return params


def config_of(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> MTPConfig:
    """The model's configuration, by its weights where they tell. Raises MetaFormatError."""
    layers, extra = _count(state, "layers"), _count(state, "extra_heads")
    for key, told, found in (
        ("n_layers", params.get("n_layers", layers + extra), layers + extra),
        ("n_future_tokens", params.get("n_future_tokens", 1 + extra), 1 + extra),
    ):
        if told != found and not (key == "n_layers" and told == layers):  # without the extra heads
            raise MetaFormatError(f"params.json says {key} = {told!r}, but the weights have {found}: fetch both again.")
    vocab_size, hidden_size = _shape(state, "tok_embeddings.weight")
    heads = params["n_heads"]
    if hidden_size % (2 * heads):
        raise MetaFormatError(f"{heads} heads do not divide a hidden size of {hidden_size} into pairs.")
    kv_heads = _shape(state, "layers.0.attention.wk.weight")[0] * heads // hidden_size
    return MTPConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_shape(state, "layers.0.feed_forward.w1.weight")[0],
        num_hidden_layers=layers + extra,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(params.get("max_seq_len", CONTEXT)),
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10_000.0))},
        num_future_tokens=1 + extra,
        tie_word_embeddings=False,
        architectures=[MTPForCausalLM.__name__],
        dtype=str(state["output.weight"].dtype).removeprefix("torch.") if "output.weight" in state else "float32",
    )


def rename(state: Mapping[str, Tensor], config: MTPConfig) -> dict[str, Tensor]:
    """Meta's tensors under transformers' names, checked one by one. Raises MetaFormatError."""
    tensors = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if name in _OUTSIDE:
            tensors[_OUTSIDE[name]] = tensor.contiguous()
        elif match and match[3] in _INSIDE:
            heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}
            moved = tensor if match[3] not in heads else halves_from_pairs(tensor, heads[match[3]])
            tensors[f"model.{match[1]}.{match[2]}.{_INSIDE[match[3]]}.weight"] = moved.contiguous()
        else:
            raise MetaFormatError(f"The checkpoint has a tensor named {name}, which a multi-token Llama has not.")
    with torch.device("meta"):
        wanted = MTPForCausalLM(config).state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        shapes = [None if name not in of else tuple(of[name].shape) for of in (tensors, wanted)]
        if shapes[0] != shapes[1]:
            raise MetaFormatError(f"The checkpoint's {name} has the shape {shapes[0]} where {shapes[1]} is wanted.")
    return tensors


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """[heads * dim, hidden]: row 2 i + j of a head becomes its row j dim / 2 + i."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _count(state: Mapping[str, Tensor], kind: str) -> int:
    """How many layers of this kind there are, counted from 0 without a gap."""
    matches = (_LAYER.fullmatch(name) for name in state)
    found = {int(match[2]) for match in matches if match and match[1] == kind}
    if found != set(range(len(found))):
        raise MetaFormatError(f"The checkpoint's {kind} are numbered {sorted(found)}, which leaves some out.")
    return len(found)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Of a matrix. Raises MetaFormatError."""
    if name not in state or state[name].dim() != 2:
        raise MetaFormatError(f"The checkpoint has no matrix {name}.")
    rows, columns = state[name].shape
    return rows, columns


def _read_state(source: Path) -> dict[str, Tensor]:
    """The named tensors of the only weight file. Raises MetaFormatError."""
    files = sorted(source.glob("consolidated*.pth"))
    if len(files) != 1:
        raise MetaFormatError(
            f"{source} has {len(files)} files consolidated*.pth, but one is wanted: merge the parts of a "
            "model-parallel checkpoint first."
        )
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(files[0]))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise MetaFormatError(f"{files[0]} cannot be read as tensors ({reason}): fetch it again.") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise MetaFormatError(f"{files[0]} holds no named tensors: fetch it again.")
    return {name: tensor for name, tensor in state.items() if name != _COMPUTED}


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """In the folder or, as in Meta's release of several models, in the one above. Raises MetaFormatError."""
    for folder in (source, source.parent):
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / "tokenizer.model").is_file():
            return llama_tokenizer(folder / "tokenizer.model")
    raise MetaFormatError(f"There is no tokenizer.model in {source} or above it: copy the release's there.")


def main(argv: list[str]) -> int:
    """`SRC DST`: convert the checkpoint in SRC into the existing folder DST."""
    source, folder = argv
    convert(Path(source), Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
