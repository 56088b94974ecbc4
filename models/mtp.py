"""Meta's multi-token model (Gloeckle et al., arXiv 2404.19737) as a transformers class. Importing this registers it.

    z = trunk(tokens);  state_i = norm(layer_i(z));  logits_i = unembedding(state_i)

Head 0 guesses the next token and is the last of `layers`; head i is `extra_heads[i - 1]`, sees the same trunk state and
guesses the token i places further. Norm and unembedding are shared.

Invariants:
- `num_hidden_layers` counts trunk and heads: more heads are fewer trunk layers and the same parameters;
- every layer has its own `layer_idx`, those of the extra heads behind the others, so a cache or pool of
  `num_hidden_layers` layers holds the K and V of all;
- the logits are head 0's alone: without its extra heads the model says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple

from models.source import MTP_MODEL_TYPE


@strict
class MTPConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's, and how many heads there are. The tree is shaped by `head_accuracies`: [extra heads][rank], measured."""

    model_type = MTP_MODEL_TYPE
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {
        name.replace("layers.", "extra_heads."): plan for name, plan in LlamaConfig.base_model_tp_plan.items()
    }

    num_future_tokens: int = 1  # heads, that of the next token included
    head_accuracies: list[Any] | None = None

    @property
    def num_extra_heads(self) -> int:
        return self.num_future_tokens - 1

    def validate_architecture(self) -> None:
        """Called by `strict`. Raises ValueError."""
        super().validate_architecture()
        if not 1 <= self.num_future_tokens <= self.num_hidden_layers:
            raise ValueError(
                f"num_future_tokens is {self.num_future_tokens}, but each head is one of the "
                f"{self.num_hidden_layers} layers and there must be at least one."
            )


def without_extra_heads(config: Any) -> Any:
    """The configuration of the same model without its extra heads: their weights are then not read."""
    if isinstance(config, MTPConfig):
        config.num_hidden_layers -= config.num_extra_heads
        config.num_future_tokens, config.head_accuracies = 1, None
    return config


@dataclass
class MTPOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """`head_states` is what the extra heads would put into the unembedding: [batch, kept rows, extra heads, hidden]."""

    head_states: Tensor | None = None


class MTPModel(LlamaPreTrainedModel):  # type: ignore[misc]
    """Everything but the unembedding, in two parts, so that training can run the heads one after another."""

    config: MTPConfig

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        count = config.num_hidden_layers - config.num_extra_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(count))
        self.extra_heads = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(count, config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def trunk(
        self,
        input_ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The state that all heads see, [batch, tokens, hidden], and what each head must be told besides."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        state = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(state.shape[1], device=state.device) + start)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=state,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        told = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(state, position_ids=position_ids),
            "past_key_values": past_key_values,
            **kwargs,
        }
        for layer in self.layers[:-1]:
            state = layer(state, **told)
        return state, told

    def head(self, index: int, state: Tensor, told: dict[str, Any]) -> Tensor:
        """What head `index` puts into the unembedding: [batch, tokens, hidden], from what `trunk` returned."""
        layer = self.layers[-1] if index == 0 else self.extra_heads[index - 1]
        normed: Tensor = self.norm(layer(state, **told))
        return normed


class MTPForCausalLM(LlamaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model as transformers and our engine run it: next-token logits, with the extra heads' states beside them."""

    config: MTPConfig
    config_class = MTPConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        self.model = MTPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MTPOutput:
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        state, told = self.model.trunk(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = [self.model.head(index, state, told)[:, kept] for index in range(self.config.num_future_tokens)]
        return MTPOutput(
            logits=self.lm_head(states[0]),
            past_key_values=past_key_values,
            head_states=torch.stack(states[1:], dim=2) if states[1:] else None,
        )


AutoConfig.register(MTP_MODEL_TYPE, MTPConfig)
AutoModelForCausalLM.register(MTPConfig, MTPForCausalLM)
