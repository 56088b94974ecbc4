"""`medusa-serve evaluate heads`: a report (models/train/report.py) on one or several heads, judged on held-out text.

Invariants: the held-out rows are those that training kept aside (models/train/data.py); the trunk runs in float32.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from models.drafters.resblock import DEFAULT_ACCURACIES
from models.errors import UsageError
from models.source import resolve
from models.train.acceptance import Text
from models.train.command import run
from models.train.data import VALIDATION_FRACTION, DataError, Example, encode_rows, read_rows
from models.train.designs import AnyHeads, count_parameters, describe, inner_layers, load, rank
from models.train.machine import this_machine
from models.train.report import REQUESTS, SIZES, Design, Report, Setting, judge, markdown, write_report
from models.train.step_times import Measure, StepTimes, Trial
from models.train.trunk import check_device, forward_with_hidden, load_trunk


def held_out(examples: Sequence[Example]) -> list[int]:
    """Numbers of the held-out examples that the model wrote greedily; of all held-out ones if none says so.

    Raises DataError if nothing is held out.
    """
    kept = [i for i, example in enumerate(examples) if example.held_out and any(example.counts)]
    if not kept:
        raise DataError("No row is held out for validation; give more text or a larger --validation-fraction.")
    return [i for i in kept if examples[i].greedy] or kept


def main(argv: list[str], measure: Measure | None = None) -> int:
    """Entry of `medusa-serve evaluate heads`; returns the exit code. Without `measure` nothing is timed."""
    return run(lambda options, console: _evaluate(options, console, measure), _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve evaluate heads", description="How well heads guess held-out text, and how fast that is here."
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or GGUF file of the base model")
    parser.add_argument("--heads", type=Path, nargs="+", required=True, help="files or folders of trained heads")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the files given to training")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="where to write report.md, .json and .svg, too")
    parser.add_argument("--validation-fraction", type=float, default=VALIDATION_FRACTION, help="as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _evaluate(options: argparse.Namespace, console: Console, measure: Measure | None) -> None:
    check_device(options.device)
    rows, folder = read_rows(options.data), resolve(options.model)
    model, tokenizer = load_trunk(folder, torch.float32, options.device)
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    designs = [load(path, embedding, lm_head) for path in options.heads]
    examples = encode_rows(rows, tokenizer, validation_fraction=options.validation_fraction)
    texts: list[dict[str, list[Text]]] = [defaultdict(list) for _ in designs]
    own: list[NDArray[np.bool_]] = []
    judged = held_out(examples)
    for i in track(judged, "Reading held-out text", console=console, transient=True):
        found, agreed = rank_example(model, designs, examples[i])
        for mine, ranked in zip(texts, found, strict=True):
            mine[examples[i].category] += ranked
        own.append(agreed)
    del model
    trial = Trial(folder, options.heads, options.device, prompts(examples, judged), REQUESTS, SIZES)
    times = time_steps(measure, trial, console)
    names = _names(options.heads)
    every = [text for part in texts[0].values() for text in part]
    setting = Setting(
        options.model,
        "float32",
        str(this_machine()),
        len(every),
        sum(len(text.ranks) for text in every),
        float(np.concatenate(own).mean()),
    )
    found_of = zip(names, designs, texts, times, strict=True)
    report = Report(setting, [_judge(*each) for each in found_of])
    console.print(markdown(report), markup=False, highlight=False, soft_wrap=True)
    if options.report is not None:
        write_report(options.report, report)


def _judge(name: str, heads: AnyHeads, texts: Mapping[str, Sequence[Text]], times: StepTimes | None) -> Design:
    accuracies = heads.accuracies or DEFAULT_ACCURACIES[: heads.num_heads]
    return judge(name, describe(heads), count_parameters(heads), texts, accuracies, times)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError("--heads names the same heads twice; leave one of them out.")


def prompts(examples: Sequence[Example], judged: Sequence[int]) -> list[tuple[int, ...]]:
    """What comes before the first answer of each of these examples, the first token at least."""
    return [examples[i].tokens[: max(examples[i].counts.index(True), 1)] for i in judged]


def time_steps(measure: Measure | None, trial: Trial, console: Console) -> Sequence[StepTimes | None]:
    """Of each of the heads. Says so if the model cannot be served, which is no reason to lose what else was found."""
    if measure is None:
        return [None] * len(trial.heads)
    try:
        with console.status("Measuring step times"):
            return measure(trial)
    except UsageError as error:
        console.print(f"Step times were not measured: {error}", markup=False)
        return [None] * len(trial.heads)


@torch.inference_mode()
def rank_example(
    model: Any, designs: Sequence[AnyHeads], example: Example
) -> tuple[list[list[Text]], NDArray[np.bool_]]:
    """Ranks of one example by each design, and of each counted token whether it is the model's own greedy choice."""
    tokens, counts = np.array(example.tokens), np.array(example.counts)
    shown = sorted({layer for heads in designs for layer in inner_layers(heads)})
    states, logits = forward_with_hidden(model, torch.from_numpy(tokens)[None].to(model.device), shown)
    greedy = logits[0].argmax(-1).cpu().numpy()
    agreed = (greedy[:-1] == tokens[1:])[counts[1:]]
    parts = states[0].view(len(tokens), len(shown) + 1, -1)  # [positions, layers shown and the last, hidden]
    hidden = [parts[:, [*map(shown.index, inner_layers(heads)), -1]].flatten(1) for heads in designs]
    return [rank(heads, own, tokens, counts) for heads, own in zip(designs, hidden, strict=True)], agreed
