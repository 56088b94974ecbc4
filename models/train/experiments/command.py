"""`medusa-serve train experiment NAME`: one of the paper's claims, rerun at a size that fits.

What was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from models.errors import UsageError
from models.train.command import positive, run
from models.train.experiments.bytes import Bytes
from models.train.experiments.cell import Scale
from models.train.experiments.experiment import Experiment
from models.train.experiments.induction import Induction
from models.train.experiments.polynomial import Polynomial
from models.train.experiments.runner import run_cells
from models.train.experiments.scales import SCALES
from models.train.trunk import check_device

EXPERIMENTS: dict[str, type[Experiment]] = {kind.name: kind for kind in (Bytes, Induction, Polynomial)}


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve train experiment`; returns the exit code."""
    return run(experiment, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve train experiment",
        description="Rerun a claim of Meta's multi-token prediction on small models. Goes on where it was stopped.",
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--output", type=Path, required=True, help="folder for tables, plot and what is half done")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="cpu",
        help="tiny: seconds, learns nothing; small: a quarter of an hour on a core or two; "
        "cpu: an hour on two cores; gpu: sized for 20 minutes on an H100",
    )
    parser.add_argument("--models", nargs="+", help="only those of these sizes, such as 1M")
    parser.add_argument("--seeds", type=positive, help="models of each kind, instead of the scale's")
    parser.add_argument("--steps", type=positive, help="training steps of each model, instead of the scale's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def experiment(options: argparse.Namespace, console: Console) -> None:
    """All cells, and the report; `options` as parsed above."""
    check_device(options.device)
    kind = EXPERIMENTS[options.name]
    run_cells(kind(_scale(options)), options.output, options.device, _command(options), console)


def _scale(options: argparse.Namespace) -> Scale:
    """Raises UsageError for models that the scale does not have."""
    scale = SCALES[options.scale][options.name]
    if unknown := set(options.models or ()) - set(scale.shapes):
        known = ", ".join(scale.shapes)
        raise UsageError(
            f"--models {' '.join(sorted(unknown))}: at --scale {options.scale}, {options.name} has {known}."
        )
    shapes = {name: shape for name, shape in scale.shapes.items() if name in (options.models or scale.shapes)}
    return replace(scale, shapes=shapes, seeds=options.seeds or scale.seeds, steps=options.steps or scale.steps)


def _command(options: argparse.Namespace) -> str:
    """The call that repeats this run."""
    words = ["medusa-serve", "train", "experiment", options.name, "--scale", options.scale, "--output", "DIR"]
    words += ["--models", *options.models] if options.models else []
    for key in ("seeds", "steps"):
        if getattr(options, key):
            words += [f"--{key}", str(getattr(options, key))]
    return shlex.join(words)
