"""`medusa-serve train heads`: from a frozen model and its own text to a folder with heads, accuracies and a model card.

With --joint a second stage follows (`joint`), and the folder is the changed model with its heads in `heads/`.

Invariants:
- the run can be stopped at any time and continued with --resume, with the same result;
- what is written is what was best, of all evaluations, on held-out text, which training never saw;
- OUTPUT holds what may be published and nothing else; what the run needs for itself lies in --work, beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.drafters.resblock import ResBlockHeads
from models.inner import low_and_middle
from models.quantize import Quantization
from models.source import OWN_HEADS, resolve
from models.train.acceptance import Text, measure_accuracies, tau_by_nodes
from models.train.card import model_card
from models.train.command import positive, run
from models.train.data import VALIDATION_FRACTION, DataError, Example, encode_rows, read_rows
from models.train.designs import (
    DESIGNS,
    AnyHeads,
    Sizes,
    check_trainable,
    count_parameters,
    describe,
    in_float,
    inner_layers,
    load,
    rank,
)
from models.train.distill import Distiller, History, Recipe, draft_vocabulary, teachable
from models.train.evaluate import held_out, prompts, time_steps
from models.train.machine import this_machine
from models.train.medusa2 import Joint, train_jointly
from models.train.report import REQUESTS, SIZES, Report, Setting, judge, write_report
from models.train.step_times import Measure, Trial
from models.train.trunk import Frozen, TrunkCache, build_cache, check_device, load_frozen
from models.tree import best_static_choices, expected_tau

_SCORED_NODES = 8
FEATURES = ("last", "low,mid,last")
MAX_LENGTH = 1024  # tokens of one example; longer texts are cut
_JOINT_SETTINGS = ("joint_epochs", "joint_lr", "joint_rows")
_SHAPE = {"design": "sequential", "num_heads": 4, "num_layers": 1, "features": "last", "draft_vocab": 8192}
_SETTINGS = (
    *("name", *_SHAPE, "quantization", "epochs", "batch_size", "lr", "seed", "evaluations", "patience"),
    *("validation_fraction", "all_positions", "dtype", "joint", *_JOINT_SETTINGS),
)
_SECONDS_BETWEEN_SAVES = 120.0


def main(argv: list[str], measure: Measure | None = None) -> int:
    """Entry of `medusa-serve train heads`; returns the exit code. Without `measure` the report times nothing."""
    return run(lambda options, console: train(options, console, measure), _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve train heads", description="Train Medusa heads for a frozen model on text, best its own."
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or GGUF file of the base model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL (chats or text) or plain text files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the heads")
    parser.add_argument("--work", type=Path, help="folder for the trunk's cached states (default: OUTPUT.work)")
    parser.add_argument("--name", help="what to call the base model in the card (default: MODEL)")
    parser.add_argument(
        "--init", type=Path, metavar="HEADS", help="go on from these heads, whose design and sizes stay"
    )
    parser.add_argument("--design", choices=DESIGNS, help="one recursive layer (default), or Medusa's residual blocks")
    parser.add_argument("--num-heads", type=positive, help="tokens guessed ahead (4)")
    parser.add_argument("--num-layers", type=positive, help="residual blocks per head (1)")
    parser.add_argument("--features", choices=FEATURES, help="states of the model that residual heads see (last)")
    parser.add_argument("--draft-vocab", type=int, help="tokens that heads can guess (8192); 0 is all")
    parser.add_argument("--epochs", type=positive, help="by default what suits the design, as the next two")
    parser.add_argument("--batch-size", type=positive, help="positions per step")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--evaluations", type=positive, default=1, help="on held-out text in each epoch")
    parser.add_argument("--patience", type=positive, help="end after so many evaluations that are no better")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation-fraction", type=float, default=VALIDATION_FRACTION)
    parser.add_argument("--all-positions", action="store_true", help="learn from what users and system wrote, too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of trunk and LM head")
    parser.add_argument(
        "--quantization",
        choices=(*get_args(Quantization), "none"),
        default="none",
        help="learn from the model as served on a CPU",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--joint", action="store_true", help="then trunk and heads together (Medusa-2): a new model")
    parser.add_argument("--joint-epochs", type=positive, help="by default the paper's, as the next two, or near it")
    parser.add_argument("--joint-lr", type=float, help="of the trunk; the heads' is four times as large")
    parser.add_argument("--joint-rows", type=positive, help="tokens per step")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parser


def train(options: argparse.Namespace, console: Console, measure: Measure | None = None) -> None:
    """Everything from text to folder; `options` as parsed above. What can be refused without the model, is."""
    _check(options)
    rows = read_rows(options.data)
    work = options.work or Path(f"{options.output.resolve()}.work")
    for folder in (options.output, work):
        folder.mkdir(parents=True, exist_ok=True)
    frozen = _load(options)
    examples = encode_rows(
        rows, frozen.tokenizer, validation_fraction=options.validation_fraction, max_length=MAX_LENGTH
    )
    judged = held_out(examples)
    if not any(any(example.counts[2:]) for example in examples if not example.held_out):
        raise DataError("No text is left to learn from; give more, or a smaller --validation-fraction.")
    heads = _given_heads(frozen, options)
    inner = _inner(options, frozen) if heads is None else inner_layers(heads)
    with _progress(console) as progress:
        bar = _bar(progress, "Running the trunk")
        cache = build_cache(frozen.trunk, examples, work / "trunk", inner_layers=inner, progress=bar)
    training = np.array([not example.held_out for example in examples])
    if heads is None:
        heads = _new_heads(frozen, cache, training, options)
    vocab_size = len(frozen.lm_head)
    del frozen

    learned = replace(cache, counts=np.ones_like(cache.counts)) if options.all_positions else cache
    distiller = DESIGNS[options.design].distiller(heads, learned, training, _recipe(options))
    if options.init is not None:
        before = _score(_rank(heads, cache, judged))
        console.print(f"before: held-out tau at {_SCORED_NODES} nodes {before:.3f}")
    _run(distiller, work / "state.pt", lambda: _score(_rank(heads, cache, judged)), options.resume, console)
    folder, joint = options.output, None
    if options.joint:
        assert isinstance(heads, ResBlockHeads)
        joint = train_jointly(options, heads, examples, work, console)
        examples = [examples[i] for i in judged]
        shutil.rmtree(work / "merged", ignore_errors=True)  # it is named by what both trunks have in common
        with _progress(console) as progress:
            bar = _bar(progress, "Running the new trunk")
            inner = heads.inner_layers
            cache = build_cache(joint.model, examples, work / "merged", inner_layers=inner, progress=bar)
        folder, judged = options.output / OWN_HEADS, list(range(len(examples)))
    texts = _rank(heads, cache, judged)
    own = _own_share(cache, judged)
    _write(options, folder, distiller, joint, texts, vocab_size, own=own)
    console.print(f"{'Model and heads' if joint else 'Heads'} written to {options.output}")
    model = options.output if joint else resolve(options.model)
    _report(options, model, folder, heads, cache, examples, judged, own, measure, console)


def _check(options: argparse.Namespace) -> None:
    """Raise DataError or TrunkError for options that make no sense together or here."""
    if options.init is not None and any(getattr(options, key) is not None for key in _SHAPE):
        raise DataError(f"--init's heads keep their design and sizes: leave {', '.join(map(_flag, _SHAPE))} out.")
    vars(options).update({key: value for key, value in _SHAPE.items() if getattr(options, key) is None})
    if options.init is not None:
        options.design = check_trainable(options.init)
    if options.design == "sequential" and options.num_layers != 1:
        raise DataError("--num-layers is for --design resblock: a sequential drafter has one layer.")
    if options.joint and (options.design != "resblock" or options.quantization != "none"):
        raise DataError("--joint is for --design resblock and --quantization none: Medusa-2 is made of these.")
    if not options.joint and any(getattr(options, key) is not None for key in _JOINT_SETTINGS):
        raise DataError("--joint-epochs, --joint-lr and --joint-rows are for --joint: add it, or leave them out.")
    if options.design == "sequential" and options.features != "last":
        raise DataError("--features is for --design resblock: a sequential drafter sees the last state.")
    if options.quantization != "none" and options.device != "cpu":
        raise DataError(f"--quantization {options.quantization} is for --device cpu: leave one of them out.")
    check_device(options.device)


def _load(options: argparse.Namespace) -> Frozen:
    path, dtype = resolve(options.model), getattr(torch, options.dtype)
    quantization = None if options.quantization == "none" else options.quantization
    return load_frozen(path, dtype, options.device, quantization=quantization, max_length=MAX_LENGTH)


def _recipe(options: argparse.Namespace) -> Recipe:
    keys = ("epochs", "batch_size", "lr", "patience")
    chosen = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    return replace(DESIGNS[options.design].recipe, seed=options.seed, evaluations=options.evaluations, **chosen)


def _given_heads(frozen: Frozen, options: argparse.Namespace) -> AnyHeads | None:
    """Those of --init. Raises CheckpointError."""
    return None if options.init is None else in_float(load(options.init, frozen.embedding, frozen.lm_head))


def _new_heads(frozen: Frozen, cache: TrunkCache, training: NDArray[np.bool_], options: argparse.Namespace) -> AnyHeads:
    positions = teachable(cache) & np.repeat(training, np.diff(cache.starts))
    token_ids = draft_vocabulary(cache, positions, len(frozen.lm_head), options.draft_vocab, frozen.ends)
    torch.manual_seed(options.seed)
    sizes = Sizes(options.num_heads, options.num_layers, _inner(options, frozen))
    return DESIGNS[options.design].new(frozen, token_ids, sizes)


def _inner(options: argparse.Namespace, frozen: Frozen) -> tuple[int, ...]:
    """Raises InnerLayersError if the model has too few layers."""
    return () if options.features == "last" else low_and_middle(int(frozen.config.num_hidden_layers))


def _rank(heads: AnyHeads, cache: TrunkCache, judged: Sequence[int]) -> list[Text]:
    """Ranks of the held-out examples' tokens."""
    texts = []
    for example in judged:
        here = slice(int(cache.starts[example]), int(cache.starts[example + 1]))
        hidden = torch.from_numpy(cache.hidden[here]).to(heads.token_ids.device, torch.float32)
        texts += rank(heads, hidden, cache.tokens[here], cache.counts[here])
    return texts


def _own_share(cache: TrunkCache, judged: Sequence[int]) -> float:
    """How many of the held-out answers' tokens are the model's own greedy choice; the rest caps what heads can do."""
    agreed = []
    for example in judged:
        here = slice(int(cache.starts[example]), int(cache.starts[example + 1]))
        own = cache.teacher_ids[here][:-1, 0] == cache.tokens[here][1:]
        agreed.append(own[cache.counts[here][1:]])
    return float(np.concatenate(agreed).mean())


def _score(texts: Sequence[Text]) -> float:
    """Expected tokens per step with the best tree of `_SCORED_NODES` nodes."""
    accuracies = measure_accuracies(texts)
    return expected_tau(accuracies, best_static_choices(accuracies, _SCORED_NODES))


def _run(distiller: Distiller[Any], state: Path, score: Callable[[], float], resume: bool, console: Console) -> None:
    """Train to the end, saving at each evaluation, every few minutes and when asked to stop."""
    if resume and state.exists():
        distiller.load(state)
    saved, told = time.monotonic(), [""] * len(distiller.history.scores)
    with _progress(console) as progress, _stop_requests() as stopping:
        task = progress.add_task("Training", total=distiller.recipe.epochs * distiller.batches_per_epoch)

        def on_batch() -> None:
            nonlocal saved
            at = distiller.position
            progress.update(task, completed=at.epoch * distiller.batches_per_epoch + at.batch)
            is_new = len(distiller.history.scores) > len(told)
            if is_new:
                told.append(_tell(distiller.history))
                console.print(told[-1])
            if stopping or is_new or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                distiller.save(state)
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt

        distiller.run(score, on_batch)
    if distiller.has_lost_patience:
        console.print(f"Ended early: the last {distiller.recipe.patience} evaluations were no better than the best.")


def _tell(history: History) -> str:
    epoch, loss, tau = history.epochs[-1], history.losses[-1], history.scores[-1]
    return f"epoch {epoch:.3g}: loss {loss:.4f}, held-out tau at {_SCORED_NODES} nodes {tau:.3f}"


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C is pressed, so that a batch in progress ends whole."""
    requests: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: requests.append(number))
    try:
        yield requests
    finally:
        signal.signal(signal.SIGINT, before)


def _write(
    options: argparse.Namespace,
    folder: Path,
    distiller: Distiller[Any],
    joint: Joint | None,
    texts: Sequence[Text],
    vocab_size: int,
    own: float,
) -> None:
    heads = distiller.heads
    heads.accuracies = measure_accuracies(texts)
    facts = {
        **asdict(distiller.recipe),
        "positions": distiller.num_positions,
        "positions_before": _positions_before(options.init),
        "all_positions": options.all_positions,
        "trunk_dtype": _trunk_dtype(options),
        "validation_fraction": options.validation_fraction,
        "best_epoch": round(distiller.history.epochs[distiller.history.best], 3),
        "held_out_own_share": round(own, 4),
        "losses": [round(loss, 4) for loss in distiller.history.losses],
        "held_out_tau_8_nodes": [round(score, 4) for score in distiller.history.scores],
    }
    name = options.name or options.model
    taus = tau_by_nodes(texts, heads.accuracies)
    card = model_card(name, _command(options), _machine(options.device), describe(heads), heads, texts, taus, facts)
    if joint is not None:
        facts, card = facts | {"joint": joint.facts}, card + joint.card()
        joint.save(options.output, card)
    DESIGNS[options.design].save(folder, heads, base_model=name, vocab_size=vocab_size, card=card, facts=facts)


def _report(
    options: argparse.Namespace,
    model: Path,
    folder: Path,
    heads: AnyHeads,
    cache: TrunkCache,
    examples: Sequence[Example],
    judged: Sequence[int],
    own: float,
    measure: Measure | None,
    console: Console,
) -> None:
    """The report on these heads, beside them."""
    texts: dict[str, list[Text]] = defaultdict(list)
    for i in judged:
        texts[examples[i].category] += _rank(heads, cache, [i])
    every = [text for part in texts.values() for text in part]
    trial = Trial(model, [folder], options.device, prompts(examples, judged), REQUESTS, SIZES)
    (times,) = time_steps(measure, trial, console)
    positions = sum(len(text.ranks) for text in every)
    setting = Setting(
        options.name or options.model, _trunk_dtype(options), str(this_machine()), len(every), positions, own
    )
    name, what = options.output.resolve().name, describe(heads)
    found = judge(name, what, count_parameters(heads), texts, heads.accuracies or (), times)
    write_report(folder, Report(setting, [found]))


def _positions_before(init: Path | None) -> int:
    """What the heads that training began with had seen, as far as their config.json says it."""
    try:
        facts = json.loads((init / "config.json").read_text())["training"] if init is not None else {}
        return int(facts.get("positions", 0) + facts.get("positions_before", 0))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return 0


def _trunk_dtype(options: argparse.Namespace) -> str:
    return str(options.dtype if options.quantization == "none" else options.quantization)


def _command(options: argparse.Namespace) -> str:
    """The call that repeats this run, folders aside."""
    files = [file.name for file in options.data]
    words = ["medusa-serve", "train", "heads", options.model, "--data", *files, "--output", "DIR"]
    usual = vars(_parser().parse_args(["x", "--data", "x", "--output", "x"])) | _SHAPE
    if options.init is not None:
        words += ["--init", options.init.resolve().name]
        usual |= {key: getattr(options, key) for key in _SHAPE}  # which --init decides
    for key in _SETTINGS:
        value = getattr(options, key)
        if value is not None and value != usual[key]:
            words += [_flag(key), *([] if value is True else [str(value)])]
    return shlex.join(words)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _machine(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _bar(progress: Progress, description: str) -> Callable[[int, int], None]:
    task = progress.add_task(description)
    return lambda done, total: progress.update(task, completed=done, total=total)
