"""The frozen trunk's answers, computed once and kept on disk: what the heads see and what they should say.

For each token position: the hidden state that enters the output embedding (behind those of inner layers, if heads want
to see them), and the model's own next-token distribution there, as its `TEACHER_RANKS` likeliest tokens with their
probabilities (of the whole vocabulary, not renormalised).

Invariants: a cache folder belongs to one (model, text, dtype), named by its digest; a build that was interrupted goes
on where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.errors import UsageError
from models.inner import InnerStates, normed
from models.kv_pool import KVPool
from models.quantize import Quantization
from models.train.data import Example

TEACHER_RANKS = 64
_ROWS_PER_FORWARD = 1024


class TrunkError(UsageError):
    """The model or the device cannot be used; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class TrunkCache:
    """Positions of all examples, one after another. `starts[i]` is the first position of example i."""

    tokens: NDArray[np.int64]  # [positions]
    counts: NDArray[np.bool_]  # [positions] this token is one to guess
    starts: NDArray[np.int64]  # [examples + 1]
    hidden: NDArray[np.float16]  # [positions, (inner layers + 1) * hidden], inner states normed: float16 ends at 65504
    teacher_ids: NDArray[np.int32]  # [positions, ranks] likeliest next tokens, best first
    teacher_probs: NDArray[np.float16]  # [positions, ranks]

    def put(self, start: int, hidden: Tensor, logits: Tensor) -> None:
        """Keep the states [n, hidden] and logits [n, vocab] of the positions from `start` on."""
        here = slice(start, start + len(hidden))
        best = logits.topk(self.teacher_ids.shape[1], dim=-1)
        totals = torch.cat([part.logsumexp(-1) for part in torch.split(logits, 64)])  # few at a time stay in the cache
        self.hidden[here] = hidden.to(torch.float16).cpu().numpy()
        self.teacher_ids[here] = best.indices.to(torch.int32).cpu().numpy()
        self.teacher_probs[here] = (best.values - totals[:, None]).exp().to(torch.float16).cpu().numpy()


class ServedTrunk:
    """A model as a CPU serves it: narrow weights, and states that differ a little from those in float32."""

    def __init__(self, path: Path, quantization: Quantization, max_length: int) -> None:
        """Raises BackboneError and KernelError. No sequence may be longer than `max_length`."""
        self.backbone = Backbone.load(path, dtype=torch.float32, device=torch.device("cpu"))
        self.backbone.quantize(quantization)
        shapes, dtype = self.backbone.kv_shapes, self.backbone.kv_dtype
        self._pool = KVPool(shapes, max_length, dtype=dtype, device="cpu")

    def run(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States as `Backbone.forward` keeps them and logits: [n, hidden], [n, vocab]."""
        rows = torch.arange(len(tokens))
        alone = Segment(len(tokens), torch.empty(0, dtype=torch.int64), len(tokens), ())
        batch = build_batch([alone], rows, rows + 1, "cpu")
        logits, hidden = self.backbone.forward(torch.tensor(tokens), batch, self._pool, rows)
        return hidden, logits


@dataclass(frozen=True)
class Frozen:
    """A model that heads are trained for, and what they take from it."""

    trunk: Any  # what `build_cache` runs: transformers' model, or a ServedTrunk
    tokenizer: Any
    config: Any
    embedding: Tensor  # [vocab, hidden]
    lm_head: Tensor  # [vocab, hidden]
    ends: list[int]  # token ids that end a text


def load_frozen(
    path: Path, dtype: torch.dtype, device: str, *, quantization: Quantization | None, max_length: int
) -> Frozen:
    """Load the model; with a `quantization` as a CPU serves it. Raises TrunkError, BackboneError and KernelError."""
    model, tokenizer = load_trunk(path, dtype, device)
    return Frozen(
        ServedTrunk(path, quantization, max_length) if quantization else model,
        tokenizer,
        model.config.get_text_config(decoder=True),
        model.get_input_embeddings().weight.detach(),
        model.get_output_embeddings().weight.detach(),
        end_tokens(model, tokenizer),
    )


def load_trunk(path: Path, dtype: torch.dtype | Literal["auto"], device: str) -> tuple[Any, Any]:
    """The model, frozen, and its tokenizer. Raises TrunkError."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what matters of its loading report is raised
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise TrunkError(f"The model in {path} cannot be loaded: {reason}; fetch it again.") from error
    finally:
        logging.set_verbosity(verbosity)
    if faults := [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]:
        raise TrunkError(f"The weights in {path} lack a {min(faults)} of the right shape; fetch the model again.")
    return model, tokenizer


def check_device(name: str) -> None:
    """Raise TrunkError unless tensors can be put on this device."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise TrunkError(
            f"--device {name} cannot be used here; give cpu, or cuda with a GPU and a CUDA build of torch."
        ) from error


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text, as the model's generation settings and its tokenizer say."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({id_ for id_ in (*ids, tokenizer.eos_token_id) if id_ is not None})


@torch.inference_mode()
def build_cache(
    model: Any,
    examples: Sequence[Example],
    folder: Path,
    *,
    inner_layers: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> TrunkCache:
    """Run the trunk over all examples, shortest first, and keep the results under `folder`.

    `inner_layers` are kept besides the last state. `progress(done, total)` is called with position counts. float16
    holds post-norm states to 3 digits.
    """
    folder = folder / _digest(model, examples, inner_layers)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size, hidden_size = _lm_head(model).shape
    cache = _open(folder, examples, vocab_size, hidden_size * (len(inner_layers) + 1))
    done_file = folder / "batches_done"
    done = int(done_file.read_text()) if done_file.exists() else 0
    batches = _batches(examples)
    total, finished = len(cache.tokens), 0
    for number, batch in enumerate(batches):
        if number >= done:
            starts = [int(cache.starts[i]) for i in batch]
            _run_batch(model, [examples[i].tokens for i in batch], starts, cache, tuple(inner_layers))
            done_file.write_text(str(number + 1))
        finished += sum(len(examples[i].tokens) for i in batch)
        progress(finished, total)
    return cache


def _run_batch(
    model: Any,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    cache: TrunkCache,
    inner_layers: tuple[int, ...],
) -> None:
    if isinstance(model, ServedTrunk):
        model.backbone.show(inner_layers)
        for sequence, start in zip(sequences, starts, strict=True):
            hidden, logits = model.run(sequence)
            cache.put(start, normed(hidden, len(inner_layers)), logits)
        return
    width = max(map(len, sequences))
    padded = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=model.device)  # [batch, width]
    hidden, logits = forward_with_hidden(model, padded, inner_layers)
    hidden = normed(hidden, len(inner_layers))
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        cache.put(start, hidden[row, : len(sequence)], logits[row, : len(sequence)].float())


def forward_with_hidden(model: Any, tokens: Tensor, inner_layers: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """States that enter the output embedding, and logits: [batch, width, hidden], [batch, width, vocab].

    With inner layers, their outputs stand before: [batch, width, (inner layers + 1) * hidden]. Padding on the right
    needs no mask: a causal model never looks there.
    """
    seen: list[Tensor] = []

    def remember(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    inner = InnerStates(model, num_layers(model), inner_layers)
    handle = model.get_output_embeddings().register_forward_pre_hook(remember)
    try:
        logits = model(tokens, use_cache=False).logits
    finally:
        handle.remove()
        inner.close()
    return inner.beside(seen[0]), logits


def num_layers(model: Any) -> int:
    """Decoder layers, as the model's configuration says."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _batches(examples: Sequence[Example]) -> list[list[int]]:
    """Example numbers in groups of about equal length and at most `_ROWS_PER_FORWARD` rows, padding counted."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(examples[i].tokens) > _ROWS_PER_FORWARD:
            batches.append([])
        batches[-1].append(i)
    return batches


def _lm_head(model: Any) -> Tensor:
    """[vocab, hidden]"""
    head: Tensor = (
        model.backbone.lm_head_weight if isinstance(model, ServedTrunk) else model.get_output_embeddings().weight
    )
    return head


def _digest(model: Any, examples: Sequence[Example], inner_layers: Sequence[int]) -> str:
    digest = hashlib.blake2b(repr(tuple(inner_layers)).encode() if inner_layers else b"", digest_size=8)
    served = model.backbone if isinstance(model, ServedTrunk) else None
    kind, config = (served.quantization, served.config) if served else (model.dtype, model.config)
    digest.update(repr((sorted(config.to_dict().items(), key=str), str(kind))).encode())
    digest.update(_lm_head(model)[:64].float().cpu().numpy().tobytes())
    for example in examples:
        digest.update(np.array(example.tokens, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def _open(folder: Path, examples: Sequence[Example], vocab_size: int, hidden_width: int) -> TrunkCache:
    starts = np.cumsum([0, *(len(example.tokens) for example in examples)], dtype=np.int64)
    total, ranks = int(starts[-1]), min(TEACHER_RANKS, vocab_size)

    def array(name: str, dtype: type, width: int) -> NDArray[Any]:
        path = folder / f"{name}.npy"
        if path.exists():
            stored: NDArray[Any] = np.load(path, mmap_mode="r+")
            return stored
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(total, width))

    return TrunkCache(
        tokens=np.fromiter(itertools.chain.from_iterable(e.tokens for e in examples), np.int64, total),
        counts=np.fromiter(itertools.chain.from_iterable(e.counts for e in examples), np.bool_, total),
        starts=starts,
        hidden=array("hidden", np.float16, hidden_width),
        teacher_ids=array("teacher_ids", np.int32, ranks),
        teacher_probs=array("teacher_probs", np.float16, ranks),
    )
