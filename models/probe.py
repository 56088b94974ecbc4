"""What a loaded model really does, found by running it: what its attention layers are, and whether ours may stand in.

`read_layers` runs the model once with a function that only takes notes and refuses what could not work. `check_logits`
then decodes two short sequences through pool, chunks and a tree, and compares them with the untouched model: whatever
keeps state outside of attention (convolutions, recurrences) or mixes rows differs there.

Every refusal is a `BackboneError`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from models.batch import Segment, build_batch
from models.errors import UsageError
from models.kv_pool import KVPool, Shape

if TYPE_CHECKING:
    from models.backbone import Backbone

NUM_TOKENS = 8
MAX_CONTEXT = 1 << 17  # positions whose visibility is looked at
MAX_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux"}
WITHOUT_EFFECT = {"position_ids", "use_cache", "output_router_logits", "output_attentions", "output_hidden_states"}
_serials = itertools.count()


class BackboneError(UsageError):
    """This model cannot be served. The message is one sentence or two: what is wrong, and what to do."""


def refusal(model: PreTrainedModel | type[PreTrainedModel], reason: str) -> BackboneError:
    name = (model if isinstance(model, type) else type(model)).__name__
    return BackboneError(
        f"{name} cannot be served: {reason}. Choose a decoder whose layers all use ordinary causal "
        "attention through transformers' attention interface (Llama, Qwen, Mistral, Gemma 2, Phi-3, GPT-2 and so on)."
    )


def check_architecture(architecture: type[PreTrainedModel]) -> None:
    """Refuse what its code tells without weights."""
    if "logits_to_keep" not in inspect.signature(architecture.forward).parameters:
        raise refusal(architecture, "it does not compute logits for chosen rows only")
    if not architecture._can_set_attn_implementation():
        raise refusal(architecture, "its attention is its own code and cannot be replaced")


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Make `model` use the registered attention function `name`; transformers only warns if it cannot."""
    model.set_attn_implementation(name)
    if model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise refusal(model, f"it keeps its own attention when told to use {name}")


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the attention function, as the model made it."""

    layer: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


class _Notes:
    """An attention function that notes its calls and answers with zeros."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: object,
    ) -> tuple[Tensor, None]:
        layer = cast("int | None", getattr(module, "layer_idx", None))
        self.calls.append(_Call(layer, query, key, value, attention_mask, options))
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _mask_with_rule(*, mask_function: Callable[..., Tensor], **options: Any) -> Tensor:
    """The mask that a model asks transformers for, and the rule (query, key) -> bool behind it as an attribute."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(mask_function=mask_function, **options)
    mask.rule = mask_function  # type: ignore[attr-defined]
    return mask


@torch.inference_mode()
def read_layers(model: PreTrainedModel) -> list[Shape]:
    """Per layer (kv_heads, k_dim, v_dim). Raises `BackboneError`. Leaves the model with the note-taking attention."""
    notes, name = _Notes(), f"medusa_probe_{next(_serials)}"
    AttentionInterface.register(name, notes.attend)
    AttentionMaskInterface.register(name, _mask_with_rule)
    set_attention(model, name)
    _forward(model, 1, 3)
    calls, notes.calls = notes.calls, []
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(call.layer for call in calls if call.layer is not None) != list(range(num_layers)):
        times = len(calls)
        raise refusal(model, f"its {num_layers} layers call the attention function {times} times, and each must once")
    if len({call.key.data_ptr() for call in calls}) < num_layers:
        raise refusal(model, "some of its layers share keys and values")
    for call in calls:
        _check_call(model, call)
    shapes = {call.layer: (call.key.shape[1], call.key.shape[3], call.value.shape[3]) for call in calls}
    return [shapes[layer] for layer in range(num_layers)]


def _forward(model: PreTrainedModel, num_sequences: int, num_tokens: int) -> Tensor:
    """Logits of the first tokens of the check's sequences: [num_sequences, num_tokens, vocab] float32."""
    tokens = _sequences(model)[:num_sequences, :num_tokens]
    positions = torch.arange(num_tokens, device=model.device).expand(num_sequences, num_tokens)
    try:
        logits: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    except Exception as error:
        raise refusal(model, f"it fails on {num_tokens} tokens without a cache ({error!r:.100})") from error
    return logits.float()


def _check_call(model: PreTrainedModel, call: _Call) -> None:
    given = {name for name, value in call.options.items() if value is not None}
    if call.options.get("is_causal", True) is not True:
        raise refusal(model, "its attention is not causal")
    if unknown := given - UNDERSTOOD - WITHOUT_EFFECT - {"is_causal", "dropout"}:
        raise refusal(model, f"its attention takes {', '.join(sorted(unknown))}, which is not known here")
    if call.options.get("dropout"):
        raise refusal(model, "it drops out attention weights even when it is not trained")
    if call.query.shape[2] != call.key.shape[2] or call.query.shape[1] % call.key.shape[1]:
        raise refusal(model, f"its queries {tuple(call.query.shape)} do not fit its keys {tuple(call.key.shape)}")
    if not _is_window(call.mask, call.options.get("sliding_window"), model):
        raise refusal(model, "which tokens see each other is not causal with at most a sliding window")


def _is_window(mask: Tensor | None, window: int | None, model: PreTrainedModel) -> bool:
    """Whether the mask means just: a key is visible iff it is not after the query and less than `window` before it."""
    rule: Callable[..., Tensor] | None = getattr(mask, "rule", None)
    if rule is None:
        return False
    keys = torch.arange(min(position_limit(model) or MAX_CONTEXT, MAX_CONTEXT), device=model.device)
    queries = keys[[len(keys) // 2, -1]][:, None]
    visible = rule(keys[:1], keys[:1], queries, keys).expand(2, -1)
    return torch.equal(visible, (keys <= queries) & (keys > queries - (window or len(keys))))


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens a sequence may have, so that no position's embedding depends on how long the other sequences are.

    Dynamic and LongRoPE embeddings are recomputed for the longest sequence of a batch once it passes a bound; below
    it they are constant (source: transformers' `dynamic_rope_update`).
    """
    config = model.config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = parameters.get("original_max_position_embeddings", limit)
    return limit


def _sequences(model: PreTrainedModel) -> Tensor:
    """Two sequences of NUM_TOKENS token ids: [2, NUM_TOKENS]."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(2 * NUM_TOKENS, device=model.device).view(2, NUM_TOKENS) * 37 + 11
    return ids.remainder(vocab_size)


@torch.inference_mode()
def reference_logits(model: PreTrainedModel) -> Tensor:
    """The untouched model's logits of the check's sequences: [2, NUM_TOKENS, vocab]. Leaves it with eager attention."""
    set_attention(model, "eager")
    return _forward(model, 2, NUM_TOKENS)


def check_logits(backbone: Backbone, model: PreTrainedModel, reference: Tensor) -> None:
    """Raise `BackboneError` unless two packed sequences in two steps, one with a tree, agree with `reference`."""
    first, second = _sequences(model)
    slots = torch.arange(31, 0, -1)
    pool = KVPool(backbone.kv_shapes, 31, dtype=model.dtype, device=model.device)

    def step(segments: list[Segment], tokens: list[Tensor], positions: list[int], its_slots: Tensor) -> Tensor:
        batch = build_batch(segments, torch.tensor(positions), its_slots, model.device)
        return backbone.forward(torch.cat(tokens), batch, pool, torch.arange(len(positions), device=model.device))[0]

    prompts = [Segment(5, slots[:0], 5, ()), Segment(4, slots[:0], 4, ())]
    chunks = step(prompts, [first[:5], second[:4]], [0, 1, 2, 3, 4, 0, 1, 2, 3], slots[:9])
    trees = [Segment(4, slots[:5], 1, (-1, -1, 1)), Segment(4, slots[5:9], 4, ())]  # the first node is a wrong guess
    rows = step(trees, [first[5:6], first[5:], second[4:]], [5, 6, 6, 7, 4, 5, 6, 7], slots[9:17])
    error = max(
        _error(chunks, torch.cat([reference[0, :5], reference[1, :4]])),
        _error(torch.cat([rows[:1], rows[2:]]), torch.cat([reference[0, 5:], reference[1, 4:]])),
    )
    if not error <= MAX_ERROR[model.dtype]:
        raise refusal(model, f"run in steps its logits differ from those of one run by {error:.1%}")


def _error(logits: Tensor, expected: Tensor) -> float:
    """Relative error of the median row, [rows, vocab] both: rounding may send a row to another expert, but not most."""
    spread = expected - expected.mean(-1, keepdim=True)
    return float(((logits - expected).norm(dim=-1) / spread.norm(dim=-1)).median())
