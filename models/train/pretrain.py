"""`medusa-serve train pretrain`: from text files to a multi-token model that the server loads and drafts with.

Invariants:
- the run can be stopped at any time and continued with --resume, with the same result;
- OUTPUT is a model folder; what the run needs for itself lies in OUTPUT.work.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from models.drafters.resblock import Accuracies
from models.mtp import MTPConfig, MTPForCausalLM
from models.train.byte_tokenizer import byte_tokenizer
from models.train.command import positive, run
from models.train.corpus import Corpus, Windows, encode_corpus, read_documents, spread_windows
from models.train.data import DataError
from models.train.long_run import finish
from models.train.multi_token import Pretrainer, Recipe, held_out_losses
from models.train.own_text import rank_continuations, write_text
from models.train.pretrain_card import Drafting, pretrain_card
from models.train.trunk import check_device

_HELD_OUT_WINDOWS = 64
_MEASURED = (128, 64, 32)  # prompts, their tokens, tokens written: few, for small models soon repeat themselves


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve train pretrain`; returns the exit code."""
    return run(pretrain, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe(steps=2000)
    parser = argparse.ArgumentParser(
        prog="medusa-serve train pretrain", description="Train a multi-token model on text, from scratch."
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text files, and folders of them")
    parser.add_argument("--pattern", default="*", help="which files of folders, such as '*.py'")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--tokenizer", help="model folder whose vocabulary to use; bytes if left out")
    parser.add_argument("--num-heads", type=positive, default=4, help="tokens guessed at once, the next one included")
    parser.add_argument("--layers", type=positive, default=6, help="of trunk and heads together")
    parser.add_argument("--hidden-size", type=positive, default=256)
    parser.add_argument("--intermediate-size", type=positive, help="default: 8/3 of the hidden size")
    parser.add_argument("--attention-heads", type=positive, default=4)
    parser.add_argument("--kv-heads", type=positive, help="default: as many as --attention-heads")
    parser.add_argument("--tie-embeddings", action="store_true", help="one matrix for embedding and unembedding")
    parser.add_argument("--context", type=positive, default=256, help="tokens of a window; the model's longest text")
    parser.add_argument("--batch-size", type=positive, default=16, help="windows per step")
    parser.add_argument("--steps", type=positive, default=recipe.steps)
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation-fraction", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parser


def pretrain(options: argparse.Namespace, console: Console) -> None:
    """Everything from text to folder; `options` as parsed above. What can be refused without training, is."""
    check_device(options.device)
    tokenizer = _tokenizer(options.tokenizer)
    config = _config(options, tokenizer)
    documents = read_documents(options.data, options.pattern)
    corpus = encode_corpus(
        documents, tokenizer if options.tokenizer else None, validation_fraction=options.validation_fraction
    )
    length = options.context + options.num_heads
    held_out = spread_windows(corpus.held_out, length, _HELD_OUT_WINDOWS)
    spread_windows(corpus.training, length, 1)  # is there a window at all?
    work = Path(f"{options.output.resolve()}.work")
    for folder in (options.output, work):
        folder.mkdir(parents=True, exist_ok=True)

    model = new_model(config, options.seed, options.device)
    batches = Windows(corpus.training, options.batch_size, length, options.seed)
    recipe = Recipe(steps=options.steps, lr=options.lr)
    about = repr((corpus.digest(), options.batch_size, options.seed, config.to_json_string()))
    trainer = Pretrainer(model, batches, recipe, about)
    if options.resume and (work / "state.pt").exists():
        trainer.load(work / "state.pt")
    console.print(_in_words(model, corpus, trainer))
    finish(
        trainer,
        work / "state.pt",
        lambda: held_out_losses(model, held_out, options.batch_size),
        max(1, options.steps // 10),
        "Training",
        console,
    )
    _write(options, trainer, corpus, tokenizer)
    console.print(f"Model written to {options.output}")


def new_model(config: MTPConfig, seed: int, device: str) -> MTPForCausalLM:
    """A random model, the same for the same seed on every device."""
    torch.manual_seed(seed)
    model: MTPForCausalLM = MTPForCausalLM(config).to(device)
    return model


def _tokenizer(folder: str | None) -> Any:
    if folder is None:
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise DataError(f"--tokenizer {folder} cannot be loaded ({reason}); give a model's folder.") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"--tokenizer {folder} has no end-of-text token; give another.")
    return tokenizer


def _config(options: argparse.Namespace, tokenizer: Any) -> MTPConfig:
    """Raises DataError for sizes that fit no model."""
    intermediate = options.intermediate_size or -(-options.hidden_size * 8 // 3 // 32) * 32
    kv_heads = options.kv_heads or options.attention_heads
    if options.hidden_size % (2 * options.attention_heads) or options.attention_heads % kv_heads:
        raise DataError(
            "--hidden-size must be a multiple of twice --attention-heads, and that a multiple of --kv-heads."
        )
    if options.num_heads > options.layers:
        raise DataError("--num-heads must not exceed --layers: each head is one of the layers.")
    return MTPConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.attention_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=options.context,
        num_future_tokens=options.num_heads,
        tie_word_embeddings=options.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _in_words(model: MTPForCausalLM, corpus: Corpus, trainer: Pretrainer) -> str:
    return (
        f"{model.num_parameters() / 1e6:.2f} M parameters; {corpus.num_documents} documents, "
        f"{len(corpus.training)} tokens to learn from and {len(corpus.held_out)} held out; "
        f"step {trainer.step} of {trainer.recipe.steps}."
    )


def _write(options: argparse.Namespace, trainer: Pretrainer, corpus: Corpus, tokenizer: Any) -> None:
    model = trainer.model
    drafting = measure_drafting(model, corpus)
    save_model(model, tokenizer, drafting.accuracies, options.output)
    facts = {
        "command": _command(options),
        "recipe": asdict(trainer.recipe),
        "documents": corpus.num_documents,
        "training_tokens_seen": trainer.recipe.steps * options.batch_size * options.context,
        "held_out_losses": trainer.losses,
    }
    (options.output / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (options.output / "README.md").write_text(pretrain_card(model, facts, drafting), encoding="utf-8")


def save_model(model: MTPForCausalLM, tokenizer: Any, accuracies: Accuracies, folder: Path) -> None:
    """As the server loads it; `accuracies` of the extra heads shape its trees."""
    model.config.head_accuracies = [_without_zeros(row) for row in accuracies] or None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_drafting(model: MTPForCausalLM, corpus: Corpus) -> Drafting:
    """On continuations of held-out prompts: the model's own, and those of the text."""
    count, prompt, written = _MEASURED
    prompt = min(prompt, model.config.max_position_embeddings // 2)
    written = min(written, model.config.max_position_embeddings - prompt)
    windows = spread_windows(corpus.held_out, prompt + written, count)
    prompts = windows[:, :prompt].tolist()
    own = write_text(model, prompts, written)
    return Drafting(
        own.tokens_per_pass,
        rank_continuations(model, prompts, own.tokens),
        rank_continuations(model, prompts, windows[:, prompt:].tolist()),
    )


def _without_zeros(row: Sequence[float]) -> list[float]:
    """At least one rank."""
    return [share for rank, share in enumerate(row) if share > 0 or rank == 0]


def _command(options: argparse.Namespace) -> str:
    """The call that repeats this run, folders aside."""
    words = ["medusa-serve", "train", "pretrain", "--data", *(path.name for path in options.data), "--output", "DIR"]
    defaults = vars(_parser().parse_args(["--data", "x", "--output", "x"]))
    for key, value in vars(options).items():
        if value != defaults[key] and key not in ("data", "output", "device", "resume"):
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
