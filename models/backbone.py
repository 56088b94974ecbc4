"""Any Hugging Face causal LM, unmodified, run one packed step at a time on our pool and tree attention.

Invariants:
- the model's code is transformers' own; only its attention function is ours;
- logits are the model's own, whatever it does after its output embedding (scales, caps, biases);
- a model that could be silently wrong is refused at load (`models.probe`), by a `BackboneError` that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from models.attention import PagedTreeAttention, c_attention, kernel_for
from models.batch import Batch, Segment, build_batch
from models.fused import FusedModel, can_fuse, is_common
from models.inner import InnerLayersError, InnerStates, check_layers
from models.kernels.cpu import PackedLinear, kernels
from models.kernels.gpu import runs_triton
from models.kv_pool import KVPool
from models.mtp import without_extra_heads
from models.probe import (
    BackboneError,
    check_architecture,
    check_logits,
    position_limit,
    read_layers,
    reference_logits,
    refusal,
    set_attention,
)
from models.quantize import Quantization, default_quantization, quantize_linears

if TYPE_CHECKING:
    from models.fused_gpu import FusedOnGpu
    from models.graphs import Graphs, Recorder

__all__ = ["Backbone", "BackboneError"]

logger = logging.getLogger(__name__)

MAX_POSITIONS = 1 << 17  # of a model that names no limit, when they must be counted


class Backbone:
    """A causal LM. `forward` runs one step."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take over a built model, on its device and in its dtype. Raises `BackboneError`."""
        check_architecture(type(model))
        self._model = model.eval()
        self.config = model.config
        head = model.get_output_embeddings()
        if head is None:
            raise refusal(model, "it has no output embedding")
        self.lm_head_weight: Tensor = head.weight.detach()  # [vocab, hidden]
        self.hidden_size: int = self.lm_head_weight.shape[1]
        self.kv_dtype = model.dtype
        self.quantization = "none"
        self._fused: FusedModel | FusedOnGpu | None = None
        self._graphs: Graphs | None = None
        self._table: Tensor | None = None  # a fused model's input embedding in float32
        head.register_forward_pre_hook(self._keep_hidden)
        self._hidden: Tensor | None = None
        self._inner: InnerStates | None = None
        self.inner_layers: tuple[int, ...] = ()
        with _quiet():
            self.kv_shapes = read_layers(model)
            reference = reference_logits(model)
            if self._take_hidden() is None:
                raise refusal(model, "it does not call its output embedding")
            self.vocab_size: int = reference.shape[-1]
            self._attention = PagedTreeAttention(kernel_for(model.device))
            set_attention(model, self._attention.name)
            check_logits(self, model, reference)
        self.num_layers = len(self.kv_shapes)
        self.max_position_embeddings = position_limit(model)
        self.eos_token_ids = tuple(id for id in _eos_token_ids(model) if 0 <= id < self.vocab_size)
        if runs_triton(model.device) and is_common(model, self._attention.scorings):
            self._fuse_on_gpu(reference)

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, device: torch.device, extra_heads: bool = True) -> Backbone:
        """Read a folder (config.json, safetensors); `extra_heads`: those of a multi-token model, too.

        Raises `BackboneError`, before reading weights where it can.
        """
        with _quiet():
            config = _read_config(Path(path))
            _check_config(config, device)
            config = config if extra_heads else without_extra_heads(config)
            return cls(_read_weights(Path(path), config, dtype, device))

    @property
    def unembedding(self) -> nn.Module:
        """The output embedding: [..., hidden] -> [..., vocab]. Of a model that is not fused."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    @property
    def is_packed(self) -> bool:
        """Whether the C kernels run its weights."""
        return self.quantization != "none"

    def default_quantization(self) -> Quantization:
        """See `models.quantize`; only before `quantize`."""
        return default_quantization(self._model)

    def quantize(self, quantization: Quantization = "int8") -> None:
        """Make the weights int8 or int4 and the cache binary16, for the C kernels.

        Raises `KernelError` if they cannot be had. Output embeddings are int8 always, and of a fused model the input's.
        For float32 models on a CPU, once. A model of the common shape becomes one call a step; another keeps its code.
        """
        kernels()
        self.kv_dtype, self.quantization = torch.float16, quantization
        bits = 4 if quantization == "int4" else 8
        if can_fuse(self._model, self._attention.scorings):
            self.max_position_embeddings = self.max_position_embeddings or MAX_POSITIONS
            self._fused = FusedModel(self._model, self._attention.scorings, self.max_position_embeddings, bits)
            self._fused.show(self.inner_layers)
            head, table = self.lm_head_weight, self.embedding_weight
            self.lm_head_weight = head.clone()  # the loaded one may hold a whole file open
            self._table = self.lm_head_weight if head.data_ptr() == table.data_ptr() else table.clone()
            del self._model  # and its float32 weights
            return
        self._attention.kernel = c_attention
        quantize_linears(self._model, bits)
        self._model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)

    def _fuse_on_gpu(self, reference: Tensor) -> None:
        """From now on fewer, larger kernels run the model, if they find the `reference` logits of its check."""
        from models.fused_gpu import FusedOnGpu

        try:
            num_positions = self.max_position_embeddings or MAX_POSITIONS
            self._fused = FusedOnGpu(self._model, self._attention.scorings, num_positions)
            check_logits(self, self._model, reference)
            self.max_position_embeddings = num_positions
        except Exception:
            logger.exception("The fused layers do not run this model here; its own code does, which is slower.")
            self._fused = None

    @torch.inference_mode()
    def run_prompt(self, num_tokens: int) -> None:
        """A step of one text with logits of all rows, on a pool of its own: as much memory as such a step takes."""
        device = self.lm_head_weight.device
        pool = KVPool(self.kv_shapes, num_tokens, dtype=self.kv_dtype, device=device)
        slots = torch.arange(1, num_tokens + 1)
        batch = build_batch([Segment(num_tokens, slots[:0], num_tokens, ())], slots - 1, slots, device)
        self.forward(torch.zeros_like(slots, device=device), batch, pool, torch.arange(num_tokens, device=device))

    def record(self, pool: KVPool, *, most_rows: int, longest: int, record: Recorder | None = None) -> int:
        """From now on steps of at most `most_rows` rows on `pool` are recorded ones. Returns how many are.

        0, and all stays as it is, but on a GPU for a model that is fused there. `longest`: tokens of a sequence;
        `record`: CUDA's if left out.
        """
        if self._fused is None or isinstance(self._fused, FusedModel):
            return 0
        from models.graphs import CudaRecorder, Graphs

        fused, tokens = self._fused, torch.zeros(most_rows, dtype=torch.int64, device=pool.keys[0].device)
        self._graphs = Graphs(
            lambda inputs, *step: fused.forward(*inputs, *step),
            [tokens],
            pool,
            shared=fused.shared,
            longest=longest,
            record=record or CudaRecorder(),
        )
        return self._graphs.num_graphs

    @property
    def embedding_weight(self) -> Tensor:
        """The input embedding, [vocab, hidden]."""
        if self._table is not None:
            return self._table
        weight: Tensor = self._model.get_input_embeddings().weight.detach()
        return weight

    @property
    def packed_embedding(self) -> PackedLinear | None:
        """The input embedding as the kernels of a fused model have it."""
        return self._fused.embedding if isinstance(self._fused, FusedModel) else None

    def forget_embeddings(self) -> None:
        """Give back the float32 embeddings of a fused model, which it only kept for heads to be built from."""
        if isinstance(self._fused, FusedModel):
            self._table = self.lm_head_weight = self.lm_head_weight.new_empty(0, self.hidden_size)

    def show(self, layers: tuple[int, ...]) -> None:
        """From now on hidden has these layers' outputs before the last state. Raises `BackboneError`."""
        try:
            check_layers(layers, self.num_layers)
            num_extra_heads: int = getattr(self.config, "num_extra_heads", 0)
            if layers and num_extra_heads:
                raise InnerLayersError("A multi-token model shows its own heads' states only; use its own heads.")
            if self._fused is not None:
                self._fused.show(layers)
            else:
                if self._inner is not None:
                    self._inner.close()
                self._inner = InnerStates(self._model, self.num_layers, layers)
        except InnerLayersError as error:
            raise BackboneError(str(error)) from error
        self.inner_layers = layers
        self._graphs = None  # of other states

    def forward(
        self, tokens: Tensor, batch: Batch, pool: KVPool, rows: Tensor, scored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run `tokens` and keep `rows` [n]: logits [n, vocab] float32, until the next step, and hidden [n, hidden].

        If `rows` are all, they ascend. With `scored`, indices into `rows`, logits are of those only. Hidden is what
        enters the output embedding, behind what `show` added: [n, (layers + 1) * hidden] then; of a multi-token model
        what its extra heads would put there, one after another. K and V of all rows are in `pool` afterwards, at
        `batch.slots`.
        """
        is_whole = scored is None and rows.shape[0] == tokens.shape[0]
        if self._graphs is not None and is_whole and pool is self._graphs.pool:
            found = self._graphs.run([tokens], batch)
            if found is not None:
                return found
        if self._fused is not None:
            return self._fused.forward(tokens, batch, pool, rows, scored)
        return self._forward(tokens, batch, pool, rows, scored)

    @torch.inference_mode()
    def _forward(
        self, tokens: Tensor, batch: Batch, pool: KVPool, rows: Tensor, scored: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same by transformers' own code, for a model that is not fused."""
        with self._attention.step(batch, pool):
            out = self._model(
                input_ids=tokens[None], position_ids=batch.positions[None], use_cache=False, logits_to_keep=rows
            )
        hidden = self._take_hidden()
        assert hidden is not None
        states: Tensor | None = getattr(out, "head_states", None)  # [1, n, extra heads, hidden]
        logits = out.logits[0] if scored is None else out.logits[0, scored]
        if states is not None:
            return logits.float(), states[0].flatten(1)
        shown = hidden if self._inner is None else self._inner.beside(hidden, rows)
        return logits.float(), shown[0]

    def _keep_hidden(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._hidden = args[0]  # [1, n, hidden]

    def _take_hidden(self) -> Tensor | None:
        hidden, self._hidden = self._hidden, None
        return hidden


def read_sizes(path: str | Path) -> tuple[int, int]:
    """Hidden size and vocabulary that config.json names. Raises `BackboneError`."""
    with _quiet():
        config = _read_config(Path(path)).get_text_config(decoder=True)
    return config.hidden_size, config.vocab_size


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def _read_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise BackboneError(f"{path} is not a model folder: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise BackboneError(f"{path / 'config.json'} describes no model that can be built: {_brief(error)}.") from error


def _check_config(config: PreTrainedConfig, device: torch.device) -> None:
    """Refuse what can be refused without weights."""
    if config.is_encoder_decoder:
        raise BackboneError(f"{config.model_type} is an encoder-decoder model; choose a decoder-only one.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BackboneError(f"{config.model_type} is not a causal language model; choose one that generates text.")
    check_architecture(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        try:
            AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment(device_map={"": device})
        except (ImportError, ValueError, RuntimeError) as error:
            raise BackboneError(
                f"The model's weights are quantized and cannot be read here: {_brief(error)}."
            ) from error


def _read_weights(path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise BackboneError(f"The weights in {path} cannot be read: {_brief(error)}.") from error
    for fault in ("missing_keys", "mismatched_keys"):
        if names := sorted(key if isinstance(key, str) else key[0] for key in report[fault]):
            raise BackboneError(
                f"The weights in {path} do not fit its config.json: {len(names)} {fault.replace('_', ' ')}, "
                f"the first is {names[0]}; get the folder anew."
            )
    return model


def _brief(error: Exception) -> str:
    """The first sentence: transformers' messages go on for paragraphs."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from talking: what matters here is raised."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
