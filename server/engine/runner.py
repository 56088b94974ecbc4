"""The one door to `models/`: loads the model, its heads and its pool, and turns `Work` into `Outcome`.

Invariants:
- a request's hidden state is that of its last accepted row, so drafts start right after its root;
- logits are computed for roots, nodes and asked-for prompt rows only;
- nothing here decides who runs, and nothing in `models` knows of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from models import memory, sampling, verify
from models.backbone import Backbone, read_sizes
from models.batch import Segment, build_batch, integers
from models.checkpoint import CheckpointError, build_heads, check_heads, read_heads
from models.drafters.calibration import Kind
from models.drafters.combined import Wish, combine
from models.drafters.copied import Copies, NgramOptions
from models.drafters.drafter import Ask, Drafter
from models.drafters.medusa import DraftRow, Heads
from models.drafters.mtp import own_heads
from models.drafters.packed import PackedHeads
from models.drafters.parallel import ParallelDrafter
from models.drafters.resblock import ResBlockHeads
from models.drafters.sequential import SequentialHeads
from models.drafters.sequential_drafter import SequentialDrafter, TorchGuesser, scratch_slots
from models.fused import FusedSequential, can_fuse_drafter
from models.grammar import GrammarError, Grammars, GrammarState
from models.kernels.cpu import PackedLinear, take_seconds
from models.kv_pool import KVPool
from models.kv_pool import Shape as KVShape
from models.masks import Mask
from models.probe import BackboneError
from models.sampling import History, Row
from models.sequential_checkpoint import build_sequential, check_sequential, is_sequential, read_sequential
from models.tree import Guess, Tree
from server.engine.controller import Bound
from server.engine.messages import CalibrationCell, EngineConfig, ModelInfo, Submit, TokenLogprobs
from server.engine.request import Draft, Outcome, Request, Work
from server.engine.scores import score
from server.engine.weights import quantize
from server.errors import StartupError

logger = logging.getLogger(__name__)


class Runner:
    """Implements `core.ModelRunner` with tensors."""

    def __init__(self, backbone: Backbone, heads: Heads | SequentialHeads | None, config: EngineConfig) -> None:
        """Take a loaded model and make its pool. Raises `StartupError` if the limits cannot be met."""
        self.backbone = backbone
        self._forward_seconds = 0.0  # since they were last asked for
        backbone.show(heads.inner_layers if isinstance(heads, ResBlockHeads | PackedHeads) else ())
        dtype, self.device = backbone.lm_head_weight.dtype, backbone.lm_head_weight.device
        layers = [*backbone.kv_shapes, *([heads.shape.kv] if isinstance(heads, SequentialHeads) else [])]
        kv_cache_tokens, max_model_len = _limits(config, backbone, layers)
        self.drafter: Drafter | None = None
        if isinstance(heads, SequentialHeads):
            self.drafter = _sequential(heads, backbone, kv_cache_tokens, max_model_len, config.max_num_seqs)
        elif heads is not None:
            self.drafter = ParallelDrafter(heads, is_static=config.static_trees)
        self.pool = KVPool(backbone.kv_shapes, kv_cache_tokens, dtype=backbone.kv_dtype, device=self.device)
        self.info = ModelInfo(
            path=config.model,
            vocab_size=backbone.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=backbone.eos_token_ids,
            num_heads=0 if heads is None else heads.num_heads,
            kv_cache_tokens=kv_cache_tokens,
            device=str(self.device),
            dtype=str(dtype).removeprefix("torch."),
            quantization=backbone.quantization,
        )
        self._histories: dict[str, History] = {}
        self._masks: dict[str, Mask] = {}
        self._copies: dict[str, Copies] = {}
        self._ngram = NgramOptions(config.ngram_min, config.ngram_max, config.ngram_max_nodes) if config.ngram else None
        self.grammars = Grammars(Path(config.model) / "tokenizer.json", backbone.eos_token_ids)
        self._grammar_states: dict[str, GrammarState] = {}

    @classmethod
    def load(cls, config: EngineConfig) -> Runner:
        """Load model and heads. Raises `StartupError` with one sentence."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = _device(config.device)
        dtype = _dtype(config.dtype, device)
        try:
            build = None if config.heads is None else _read_heads(Path(config.heads), config.model)
            extra_heads = build is None and config.own_heads
            backbone = Backbone.load(config.model, dtype=dtype, device=device, extra_heads=extra_heads)
            quantize(backbone, config.quantization)
            built = None if build is None else build(backbone)
            heads = PackedHeads(built) if backbone.is_packed and isinstance(built, ResBlockHeads) else built
            own = None if heads is not None else own_heads(backbone)
            backbone.forget_embeddings()
            runner = cls(backbone, heads or own, config)
        except (BackboneError, CheckpointError) as error:
            raise StartupError(str(error)) from error
        runner.grammars.prepare()
        runner.record(config)
        return runner

    def record(self, config: EngineConfig) -> None:
        """Make CUDA graphs of steps, where that is possible and wanted."""
        if config.enforce_eager:
            return
        most_rows, longest = config.max_num_batched_rows, self.info.max_model_len
        try:
            num_graphs = self.backbone.record(self.pool, most_rows=most_rows, longest=longest)
            if num_graphs:
                logger.info("%d CUDA graphs of the model's steps were recorded.", num_graphs)
            if num_graphs and isinstance(self.drafter, SequentialDrafter):
                self.drafter.record()
        except Exception:
            logger.exception("Not all steps can be recorded here; the others are launched kernel by kernel.")

    def refusal(self, submit: Submit) -> str | None:
        """Why this request cannot run: its grammar does not compile. What compiles stays compiled for a while."""
        if submit.sampling.grammar is not None:
            try:
                self.grammars.start(submit.sampling.grammar)
            except GrammarError as error:
                return str(error)
        return None

    def can_draft(self, request: Request, *, heads: bool, copies: bool) -> bool:
        if self._max_depth(request) <= 0:
            return False
        has_guesses = (heads and self._has_heads(request)) or (copies and bool(self._copied(request)))
        return has_guesses or _is_constrained(request)

    def room_for_heads(self, request: Request) -> float:
        if not self._has_heads(request):
            return 0.0
        return max(1.0 - sum([guess.value for guess in self._copied(request) if guess.parent < 0]), 0.0)

    def calibration(self) -> tuple[tuple[CalibrationCell, ...], float | None]:
        if self.drafter is None:
            return (), None
        table = self.drafter.calibration
        return tuple(CalibrationCell(*cell) for cell in table.summary()), table.error

    def kernel_seconds(self) -> float:
        """Seconds spent in C kernels since this was last asked."""
        return take_seconds()

    def forward_seconds(self) -> float:
        seconds, self._forward_seconds = self._forward_seconds, 0.0
        return seconds

    def check(self) -> None:
        """Raises if the device is lost: it then fails on everything."""
        torch.ones(1, device=self.device).item()

    def forget(self, request: Request) -> None:
        self._histories.pop(request.id, None)
        self._masks.pop(request.id, None)
        self._copies.pop(request.id, None)
        self._grammar_states.pop(request.id, None)
        if self.drafter is not None:
            self.drafter.forget(request.id)

    @torch.inference_mode()
    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        """The best tree within its bound for each request, of copied tokens and of the heads' for those that ask.

        Under a grammar: of what it forces, and of the heads' guesses that it allows.
        """
        wishes = list(map(self._wish, requests, bounds, asks))
        starts = [self._copies[r.id].prediction_start if r.id in self._copies else 0 for r in requests]
        return list(map(_draft, combine(self.drafter, wishes), starts))

    def _wish(self, request: Request, bound: Bound, least_value: float | None) -> Wish:
        grammar, depth, ask = self._grammar(request), self._max_depth(request), None
        if least_value is not None:
            row = DraftRow(request.submit.sampling, len(request.tokens), self._mask(request))
            ask = Ask(request.id, request.tokens, request.slots, row, _kind(request), bound.guesses, depth, least_value)
        return Wish(bound.guesses, depth, self._copied(request), ask, grammar, bound.forced)

    def _has_heads(self, request: Request) -> bool:
        return self.drafter is not None and self.drafter.knows(request.id, len(request.tokens) - 1)

    def _copied(self, request: Request) -> list[Guess]:
        """What can be copied below the request's root. Under a grammar nothing is: its own tokens are surer."""
        submit = request.submit
        if submit.speculation.mode == "off" or submit.sampling.grammar is not None:
            return []
        copies = self._copies.get(request.id)
        if copies is None:
            copies = self._copies[request.id] = Copies(request.num_prompt, submit.prediction, self._ngram)
        return copies.draft(request.tokens, self._max_depth(request))

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """One forward pass over all rows, then each request's verification."""
        starts = [0, *accumulate(work.num_chain + len(work.node_tokens) for work in works)]
        scored = [_scored_rows(work, start) for work, start in zip(works, starts, strict=False)]
        kept = [self._kept_rows(*each) for each in zip(works, starts, scored, strict=False)]
        logits, hidden = self._forward(works, kept, scored)
        states = hidden.split_with_sizes(list(map(len, kept)))
        firsts = [0, *accumulate(map(len, scored))]
        rows = [self._rows(work) for work in works]
        # a prompt's own rows come first among its scored rows; those sampled from are the last of them
        sampled_from = [
            index for mine, last in zip(rows, firsts[1:], strict=True) for index in range(last - len(mine), last)
        ]
        is_all = len(sampled_from) == logits.shape[0]  # the usual case: spare a copy of all logits
        chosen = logits if is_all else logits[integers(sampled_from, self.device)]
        sampled: list[int] = []
        if sampled_from:
            flat = [row for mine in rows for row in mine]
            sampled = sampling.sample(chosen, flat, in_c=self.backbone.is_packed).tolist()
        outcomes: list[Outcome] = []
        used = 0
        for work, mine, first, last, state in zip(works, rows, firsts, firsts[1:], states, strict=False):
            drawn = sampled[used : used + len(mine)]
            used += len(mine)
            outcomes.append(self._outcome(work, mine, drawn, logits[first:last], state))
        return outcomes

    def _kept_rows(self, work: Work, start: int, scored: list[int]) -> list[int]:
        """Packed rows whose states are needed."""
        if self.drafter is None or not self.drafter.sees_all or not _speculates(work.request):
            return scored
        return list(range(start, start + work.num_chain + len(work.node_tokens)))

    def _forward(
        self, works: Sequence[Work], kept: Sequence[list[int]], scored: Sequence[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Pack the rows of all works and run the backbone. Returns logits of `scored` and states of `kept` rows."""
        device = self.device
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        for work in works:
            tree = Tree(work.node_tokens, work.node_parents)
            root = work.start + work.num_chain - 1
            tokens += [*work.chain_tokens, *work.node_tokens]
            positions += [*range(work.start, root + 1), *(root + depth for depth in tree.depths)]
            slots += [*work.chain_slots, *work.node_slots]
            context = integers(work.request.slots)
            segments.append(Segment(work.num_chain + len(tree), context, work.num_chain, work.node_parents))
        if self.drafter is not None:
            self.drafter.overwrite(slots)
        batch = build_batch(segments, integers(positions), integers(slots), device)
        rows, asked = list(chain.from_iterable(kept)), list(chain.from_iterable(scored))
        is_same = len(rows) == len(asked)
        places = {row: place for place, row in enumerate(rows)} if not is_same else {}
        started = perf_counter()
        found = self.backbone.forward(
            integers(tokens, device),
            batch,
            self.pool,
            integers(rows, device),
            None if is_same else integers([places[row] for row in asked], device),
        )
        self._forward_seconds += perf_counter() - started
        return found

    def _rows(self, work: Work) -> list[Row]:
        """The rows to sample from: the root and every node, or none for an unfinished prompt."""
        request = work.request
        if not work.reaches_end:
            return []
        tree = Tree(work.node_tokens, work.node_parents)
        params, history, mask = request.submit.sampling, self._history(request), self._mask(request)
        said = (
            () if mask is None else tuple(request.tokens[max(request.num_prompt, len(request.tokens) - mask.reach) :])
        )
        banned = (*self.backbone.eos_token_ids, *params.stop_token_ids)
        paths = [(), *(tuple(tree.tokens[i] for i in tree.path(node)) for node in range(len(tree)))]
        grammar_masks = self._grammar_masks(request, paths)
        return [
            Row(
                params,
                len(request.tokens) + len(path),
                request.num_output + len(path),
                path,
                banned,
                history,
                mask,
                said,
                grammar_mask,
            )
            for path, grammar_mask in zip(paths, grammar_masks, strict=True)
        ]

    def _grammar_masks(self, request: Request, paths: Sequence[tuple[int, ...]]) -> list[bytes | None]:
        state = self._grammar(request)
        return [None if state is None else state.mask(path) for path in paths]

    def _grammar(self, request: Request) -> GrammarState | None:
        """Where the request's output stands in its grammar. After a preemption it is read again."""
        grammar = request.submit.sampling.grammar
        if grammar is None:
            return None
        state = self._grammar_states.get(request.id)
        if state is None:
            state = self._grammar_states[request.id] = self.grammars.start(grammar)
        state.advance(request.tokens[request.num_prompt :])
        return state

    def _history(self, request: Request) -> History | None:
        if not sampling.needs_history(request.submit.sampling):
            return None
        history = self._histories.get(request.id)
        if history is None:
            history = History(self.backbone.vocab_size, request.num_prompt, self.device)
            self._histories[request.id] = history
        history.extend(request.tokens)
        return history

    def _mask(self, request: Request) -> Mask | None:
        params = request.submit.sampling
        if params.allowed_token_ids is None and not params.bad_words:
            return None
        mask = self._masks.get(request.id)
        if mask is None:
            mask = Mask(self.backbone.vocab_size, params.allowed_token_ids, params.bad_words, self.device)
            self._masks[request.id] = mask
        return mask

    def _outcome(
        self, work: Work, rows: Sequence[Row], sampled: Sequence[int], logits: Tensor, hidden: Tensor
    ) -> Outcome:
        """logits: this work's scored rows, [scored, vocab]; hidden: its kept rows, [kept, hidden]."""
        request = work.request
        prompt_logprobs = self._prompt_logprobs(work, logits)
        if not rows:
            self._remember(work, hidden, ())
            return Outcome(prompt_logprobs=prompt_logprobs)
        logits = logits[-len(rows) :]
        path = self._accept(work, rows, sampled, logits)
        kept = [0, *(node + 1 for node in path)]
        self._remember(work, hidden, path)
        nodes, bonus = tuple([work.node_tokens[node] for node in path]), sampled[kept[-1]]
        is_over = bonus == sampling.NO_TOKEN
        emitted = nodes if is_over else (*nodes, bonus)
        state = self._grammar(request)
        is_complete = False
        if state is not None:
            if (error := state.failure((*nodes, bonus))) is not None:
                return Outcome(error=f"The grammar could not be followed: {error}")
            emitted = state.until_complete(emitted)
            path, kept = path[: len(emitted)], kept[: len(emitted)]
            is_complete = bool(emitted) and state.is_complete(emitted)
        count = request.submit.sampling.logprobs
        logprobs = () if count is None else score(logits[kept[: len(emitted)]], emitted, count)
        return Outcome(emitted, path, logprobs, prompt_logprobs, is_over, is_complete)

    def _remember(self, work: Work, hidden: Tensor, path: tuple[int, ...]) -> None:
        """Keep what the drafter will look at. hidden: the work's kept rows, those of its chain's end among them."""
        num_chain = hidden.shape[0] - len(work.node_tokens)
        if self.drafter is None or not num_chain or not _speculates(work.request):
            return
        states = hidden
        if work.node_tokens:
            chosen = [*range(num_chain), *(num_chain + node for node in path)]
            is_start = chosen[-1] == len(chosen) - 1
            states = hidden[: len(chosen)] if is_start else hidden[chosen]
        self.drafter.remember(work.request.id, work.start + work.num_chain - num_chain, states)

    def _accept(self, work: Work, rows: Sequence[Row], sampled: Sequence[int], logits: Tensor) -> tuple[int, ...]:
        """The surviving nodes, by the request's own rule."""
        tree = Tree(work.node_tokens, work.node_parents)
        speculation = work.request.submit.speculation
        if speculation.mode != "typical" or not len(tree) or work.request.submit.sampling.temperature == 0:
            return verify.sample_and_match(tree, sampled)
        distribution = sampling.log_distribution(logits, rows)
        parents = torch.tensor(tree.parents, device=self.device) + 1
        nodes = torch.tensor(tree.tokens, device=self.device)
        return verify.typical(
            tree,
            distribution[parents, nodes].tolist(),
            sampling.entropy(distribution).tolist(),
            speculation.epsilon,
            speculation.delta,
        )

    def _prompt_logprobs(self, work: Work, logits: Tensor) -> tuple[TokenLogprobs, ...]:
        request, count = work.request, work.request.submit.sampling.prompt_logprobs
        if request.prompt_logprobs is None or count is None:
            return ()
        ahead = request.tokens[work.start + 1 : min(work.start + work.num_chain + 1, request.num_prompt)]
        return score(logits[: len(ahead)], ahead, count, ranked=True)

    def _max_depth(self, request: Request) -> int:
        """Nodes deeper than this could not be emitted, and might lie beyond the model's context."""
        return request.submit.sampling.max_tokens - request.num_output - 1


def _speculates(request: Request) -> bool:
    return request.submit.speculation.mode != "off"


def _kind(request: Request) -> Kind:
    if request.submit.sampling.temperature == 0:
        return "greedy"
    return "typical" if request.submit.speculation.mode == "typical" else "sampled"


def _is_constrained(request: Request) -> bool:
    """Decodes under a grammar, whose forced tokens need no heads."""
    decodes = request.num_remaining == 1 and request.num_computed >= request.num_prompt
    return decodes and request.submit.sampling.grammar is not None


def _read_heads(path: Path, model: str) -> Callable[[Backbone], ResBlockHeads | SequentialHeads]:
    """Read heads and check them against the model's sizes; what is returned puts them on the loaded model."""
    hidden_size, vocab_size = read_sizes(model)
    if is_sequential(path):
        found = read_sequential(path)
        check_sequential(found, hidden_size=hidden_size, vocab_size=vocab_size)
        return lambda backbone: build_sequential(found, backbone.embedding_weight, backbone.lm_head_weight)
    tensors = read_heads(path)
    check_heads(tensors, hidden_size=hidden_size, vocab_size=vocab_size)
    return lambda backbone: build_heads(tensors, backbone.lm_head_weight)


def _sequential(
    heads: SequentialHeads, backbone: Backbone, num_slots: int, num_positions: int, max_num_seqs: int
) -> SequentialDrafter:
    """The drafter with memory of its own, in C if the model is."""
    total = num_slots + scratch_slots(max_num_seqs, heads.num_heads)
    pool = KVPool([heads.shape.kv], total, dtype=backbone.kv_dtype, device=heads.device)
    is_fused = backbone.is_packed and can_fuse_drafter(heads)
    if not is_fused:
        return SequentialDrafter(heads, TorchGuesser(heads), pool, num_slots)
    embedding = backbone.packed_embedding or PackedLinear(heads.embedding)
    return SequentialDrafter(heads, FusedSequential(heads, embedding, num_positions), pool, num_slots)


def _limits(config: EngineConfig, backbone: Backbone, layers: Sequence[KVShape]) -> tuple[int, int]:
    """KV tokens of the pool, and the longest prompt + completion."""
    limit = backbone.max_position_embeddings or 2**31
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise StartupError(f"--max-model-len {max_model_len} exceeds the model's own {limit} positions: lower it.")
    weight = backbone.lm_head_weight
    largest = partial(backbone.run_prompt, min(config.max_num_batched_rows, max_model_len))
    needed = 2 * memory.needed_bytes(weight.device, largest)  # by a step, and by those that are recorded
    free = memory.free_bytes(weight.device, config.gpu_memory_utilization) - needed
    fitting = max(free, 0) // KVPool.bytes_per_token(layers, backbone.kv_dtype)
    kv_cache_tokens = config.kv_cache_tokens or min(fitting, config.max_num_seqs * max_model_len)
    if not 0 < kv_cache_tokens <= fitting:
        raise StartupError(
            f"--kv-cache-tokens {kv_cache_tokens} does not fit: {weight.device} has memory for {fitting} tokens"
            f"{', or more with a higher --gpu-memory-utilization' if weight.device.type == 'cuda' else ''}."
        )
    if config.max_model_len is not None and config.max_model_len > kv_cache_tokens:
        raise StartupError(
            f"--max-model-len {max_model_len} does not fit into {kv_cache_tokens} KV cache tokens: "
            "lower it, or raise --kv-cache-tokens."
        )
    return kv_cache_tokens, min(max_model_len, kv_cache_tokens)


def _draft(guesses: Sequence[Guess], prediction_start: int) -> Draft:
    return Draft(
        tuple([guess.token for guess in guesses]),
        tuple([guess.parent for guess in guesses]),
        tuple([guess.source for guess in guesses]),
        tuple([guess.value for guess in guesses]),
        prediction_start,
    )


def _scored_rows(work: Work, start: int) -> list[int]:
    """Packed rows whose logits are needed: prompt rows with log-probabilities due, the root, the nodes."""
    end = start + work.num_chain
    first = start if work.request.prompt_logprobs is not None else end - work.reaches_end
    return list(range(first, end + len(work.node_tokens)))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(
            "--device cuda: torch sees no CUDA device; install a CUDA build of torch or use --device cpu."
        )
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise StartupError(f"--dtype {name} is not known: use auto, float32, bfloat16 or float16.")
    return dtype
