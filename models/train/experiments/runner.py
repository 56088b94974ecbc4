"""Runs the cells of an experiment one after another, and writes what is known after each.

OUTPUT has `README.md` (the table), `results.json`, `plot.svg`, `settings.json`, `cells/` and, where an experiment keeps
its models, `models/`.

Invariants:
- a cell whose file is there is finished and never run again; one that was stopped goes on where it was saved;
- all cells of a folder have the same settings; more seeds may be added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.errors import UsageError
from models.mtp import MTPForCausalLM
from models.train.experiments.cell import Cell, Measured
from models.train.experiments.experiment import Experiment
from models.train.long_run import finish
from models.train.multi_token import Pretrainer, Recipe
from models.train.plot import svg
from models.train.pretrain import new_model
from models.train.saved import ResumeError

_HEAD = """\
# {name}

    {command}

{sizes}

"""


def run_cells(experiment: Experiment, output: Path, device: str, command: str, console: Console) -> None:
    """All cells that are not there yet, seed by seed. Raises UsageError if `output` holds another run."""
    for folder in (output / "cells", output / "models"):
        folder.mkdir(parents=True, exist_ok=True)
    _check_settings(experiment, output)
    for cell in cells(experiment):
        done = output / "cells" / f"{cell}.json"
        if not done.exists():
            _write_json(done, _run(experiment, cell, output, device, console))
            done.with_suffix(".pt").unlink()
        write_report(experiment, output, command)
    console.print(f"Tables and plot written to {output}")


def cells(experiment: Experiment) -> Iterator[Cell]:
    """Every model once before any of them a second time."""
    scale = experiment.scale
    for seed in range(scale.seeds):
        yield from (Cell(shape, count, seed) for shape in scale.shapes for count in scale.heads)


def _check_settings(experiment: Experiment, output: Path) -> None:
    scale = asdict(replace(experiment.scale, seeds=0))
    wanted = json.loads(json.dumps({"experiment": experiment.name, "data": experiment.data, "scale": scale}))
    path = output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise UsageError(f"{output} holds an experiment with other settings or data; give another --output.")
    _write_json(path, wanted)


def _run(experiment: Experiment, cell: Cell, output: Path, device: str, console: Console) -> dict[str, Any]:
    model = new_model(experiment.config(cell), cell.seed, device)
    recipe = Recipe(steps=experiment.scale.steps, lr=experiment.scale.lr)
    about = repr((experiment.name, experiment.data, cell, experiment.scale.batch_size, experiment.scale.context))
    trainer = Pretrainer(model, experiment.batches(cell), recipe, about)
    state = output / "cells" / f"{cell}.pt"
    if state.exists():
        _load(trainer, state)
    every = max(1, recipe.steps // experiment.scale.checks)
    finish(trainer, state, lambda: experiment.judge(model), every, str(cell), console, experiment.looked_at)
    return _facts(model, trainer) | experiment.measure(cell, model, output / "models" / str(cell))


def _load(trainer: Pretrainer, state: Path) -> None:
    try:
        trainer.load(state)
    except ResumeError as error:
        raise UsageError(f"{state} is no saved state of this run that can be read; delete it.") from error


def _facts(model: MTPForCausalLM, trainer: Pretrainer) -> dict[str, Any]:
    return {
        "parameters": model.num_parameters(),
        "without_embeddings": model.num_parameters(exclude_embeddings=True) - model.lm_head.weight.numel(),
        "curve": trainer.losses,
        "threads": torch.get_num_threads(),
    }


def read_results(experiment: Experiment, output: Path) -> dict[Cell, Measured]:
    """Of the cells that are finished."""
    paths = {cell: output / "cells" / f"{cell}.json" for cell in cells(experiment)}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.exists()}


def write_report(experiment: Experiment, output: Path, command: str) -> None:
    results = read_results(experiment, output)
    report = experiment.report(results)
    head = _HEAD.format(name=experiment.name, command=command, sizes=_sizes(experiment, results))
    (output / "README.md").write_text(head + report.text, encoding="utf-8")
    (output / "plot.svg").write_text(svg(report.title, report.x_name, report.lines), encoding="utf-8")
    _write_json(output / "results.json", {str(cell): measured for cell, measured in results.items()})


def _sizes(experiment: Experiment, results: dict[Cell, Measured]) -> str:
    scale = experiment.scale
    models = {cell.shape: (scale.shapes[cell.shape], measured) for cell, measured in results.items()}
    shapes = "; ".join(
        f"{name}: {shape.layers} layers of {shape.hidden}, {measured['parameters'] / 1e6:.2f} M parameters "
        f"({measured['without_embeddings'] / 1e6:.2f} M without embeddings)"
        for name, (shape, measured) in models.items()
    )
    return (
        f"{shapes}. {scale.steps} steps of {scale.batch_size} x {scale.context} tokens "
        f"({scale.steps * scale.batch_size * scale.context / 1e6:.2f} M), learning rate {scale.lr:g}. "
        "Mean ± standard deviation over seeds."
    )


def _write_json(path: Path, content: Any) -> None:
    """Replaced in one move."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
