"""`medusa-serve distill`: a model writes its own training text, through our engine at full batch.

An instruct model gets the head of its chat template, writes a user's turn, and answers it. A base model begins a text
and goes on with it. Or the questions are the user's own (--prompts). Rows are what `models.train.data` reads.

Invariants:
- a text is a function of (model, --seed, its number); a stopped run goes on with --resume, at the next number;
- a row is written whole, once its answer is complete; near-duplicate questions and answers that loop are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text as Label

from models.errors import UsageError
from models.source import DEFAULT_MODEL, resolve
from models.train.command import positive, run
from models.train.data import DataError, Row, read_rows
from models.train.novelty import Novelty, ends_in_loop
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, Submit
from server.errors import MedusaError
from server.settings import Quantization
from server.text.prompt import Tokenizer

MARK = "\ufffc"  # stands for the user's turn in the chat template
QUESTION_TOKENS = 256  # of a user's turn; longer ones are dropped
OPENING_TOKENS = 24  # of a base model's text, before what counts
CHECK_EVERY = 32  # tokens between looks for a loop

Question = list[dict[str, str]] | str  # a chat up to its answer, or the beginning of a text
Writing = Generator[Submit, "Piece", None]  # one text: yields what the engine has to do for it, is sent what came out


@dataclass(slots=True)
class Piece:
    """What the engine has written for one submit so far."""

    writing: Writing
    tokens: list[int] = field(default_factory=list)
    is_whole: bool = False  # it ended by itself


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve distill`; returns the exit code."""
    return run(_distill, _parser().parse_args(argv))


def _distill(options: argparse.Namespace, console: Console) -> None:
    try:
        distill(options, console)
    except MedusaError as error:
        raise UsageError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve distill", description="Let a model write the text that its heads are trained on."
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file")
    parser.add_argument("--tokens", type=positive, required=True, help="answer tokens to write in all")
    parser.add_argument("--prompts", type=Path, nargs="+", help="own questions, in files as training takes them")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.0, 0.7], help="of answers, in turn")
    parser.add_argument("--max-tokens", type=positive, default=512, help="of one answer")
    parser.add_argument("--max-num-seqs", type=positive, default=64, help="texts at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the file of an interrupted run")
    parser.add_argument("--device", default="auto", help="as for serve")
    parser.add_argument("--dtype", default="auto", help="as for serve")
    parser.add_argument("--quantization", choices=get_args(Quantization), help="as for serve")
    return parser


def distill(options: argparse.Namespace, console: Console) -> None:
    """Everything from the model to the file; `options` as parsed above. What can be refused without the model, is."""
    questions = [_question(row) for row in read_rows(options.prompts or ())]
    if options.output.exists() and not options.resume:
        raise DataError(f"{options.output} exists; go on with it by --resume, or give another --output.")
    folder = resolve(options.model)
    tokenizer = Tokenizer.from_folder(folder)
    with options.output.open("a+", encoding="utf-8") as file, _progress(console) as progress:
        writer = Writer(file)
        task = progress.add_task("Writing", total=options.tokens, completed=writer.num_tokens)
        author = Author(_engine(options, folder), tokenizer, writer, options)
        author.run(questions, lambda: progress.update(task, completed=writer.num_tokens))
    console.print(f"{options.output}: {writer.num_rows} rows, {writer.num_tokens} answer tokens")


def _engine(options: argparse.Namespace, folder: Path) -> Engine:
    from server.engine.runner import Runner  # brings torch along

    config = EngineConfig(
        str(folder),
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        max_num_seqs=options.max_num_seqs,
        prefix_cache=False,  # of little use here: it would keep all texts until memory is full
    )
    return Engine(config, Runner.load(config))


def _question(row: Row) -> Question:
    turns = [message["role"] for message in row.messages]
    return list(row.messages[: (*turns, "assistant").index("assistant")]) or row.prompt or row.text


class Writer:
    """Appends rows to a file, and knows what is there already."""

    def __init__(self, file: TextIO) -> None:
        """`file` is open for appending and reading. Raises DataError if it holds anything but our rows."""
        self._file = file
        self.novelty = Novelty()
        self.num_rows = self.num_tokens = self.next_number = 0
        file.seek(0)
        for line in file:
            try:
                row = json.loads(line)
                self.novelty.is_new(_key(row["messages"][:-1] if "messages" in row else row["prompt"]))
                self._count(row)
            except (ValueError, LookupError, TypeError) as error:
                raise DataError(f"{file.name} holds a line that is not ours ({error!r}); give another one.") from error

    def write(self, question: Question, answer: str, *, temperature: float, num_tokens: int, number: int) -> None:
        text = (
            {"prompt": question, "completion": answer}
            if isinstance(question, str)
            else {"messages": [*question, {"role": "assistant", "content": answer}]}
        )
        row = {**text, "temp": temperature, "n": num_tokens, "number": number}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self._count(row)

    def _count(self, row: dict[str, Any]) -> None:
        self.num_rows += 1
        self.num_tokens += row["n"]
        self.next_number = max(self.next_number, row["number"] + 1)


def _key(question: Question) -> str:
    """What makes a question new."""
    return question if isinstance(question, str) else " ".join(message["content"] for message in question)


class Author:
    """Keeps the engine full of texts."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, writer: Writer, options: argparse.Namespace) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._writer = writer
        self._options = options
        self._open: dict[str, Piece] = {}

    def run(self, questions: Sequence[Question], on_step: Callable[[], None]) -> None:
        """Write until there are enough tokens, or no more questions."""
        writings = self._writings(questions)
        while self._writer.num_tokens < self._options.tokens:
            while len(self._open) < self._options.max_num_seqs and (writing := next(writings, None)) is not None:
                self._submit(writing, next(writing, None))
            if not self._open:
                return
            for delta in self._engine.step().deltas:
                self._hear(delta)
            on_step()

    def _writings(self, questions: Sequence[Question]) -> Iterator[Writing]:
        """Every question at every temperature; without questions, texts without end."""
        temperatures = self._options.temperatures
        end = len(questions) * len(temperatures) if questions else sys.maxsize
        for number in range(self._writer.next_number, end):
            question = questions[number // len(temperatures)] if questions else None
            yield self._write(number, question, temperatures[number % len(temperatures)])

    def _write(self, number: int, question: Question | None, temperature: float) -> Writing:
        if question is None:
            piece = yield self._request(number, 0, self._opening(), 1.0)
            question = self._read_question(piece)
            if question is None:
                return
        prompt = (
            self._tokenizer.encode(question) if isinstance(question, str) else self._tokenizer.chat_prompt(question)
        )
        piece = yield self._request(number, 1, prompt, temperature)
        answer = self._tokenizer.decode(piece.tokens)
        if answer.strip() and not ends_in_loop(piece.tokens):
            self._writer.write(question, answer, temperature=temperature, num_tokens=len(piece.tokens), number=number)

    def _request(self, number: int, part: int, prompt: Sequence[int], temperature: float) -> Submit:
        """Part 0 is the question, 1 the answer; they draw from noise of their own."""
        question_tokens = QUESTION_TOKENS if self._tokenizer.has_template else OPENING_TOKENS
        sampling = SamplingParams(
            max_tokens=self._options.max_tokens if part else question_tokens,
            temperature=temperature,
            seed=(self._options.seed << 40) + number,
            choice=part,
        )
        return Submit(f"{number}-{part}", tuple(prompt), sampling)

    def _opening(self) -> list[int]:
        """What comes before a question: the head of the chat template, or whatever begins a text."""
        if not self._tokenizer.has_template:
            return self._tokenizer.encode("") or list(self._engine.runner.info.eos_token_ids[:1])
        chat = self._tokenizer.render([{"role": "user", "content": MARK}], add_generation_prompt=False)
        return self._tokenizer.encode(chat.partition(MARK)[0], add_special_tokens=False)

    def _read_question(self, piece: Piece) -> Question | None:
        """None if it is cut off, empty or nothing new."""
        text = self._tokenizer.decode(piece.tokens)
        if self._tokenizer.has_template and not piece.is_whole:
            return None
        question: Question = [{"role": "user", "content": text.strip()}] if self._tokenizer.has_template else text
        return question if self._writer.novelty.is_new(_key(question)) else None

    def _submit(self, writing: Writing, submit: Submit | None) -> None:
        """Nothing to do if the writing has ended, or the engine refuses what does not fit."""
        if submit is not None and self._engine.submit(submit) is None:
            self._open[submit.request_id] = Piece(writing)

    def _hear(self, delta: Delta) -> None:
        piece = self._open[delta.request_id]
        looked = len(piece.tokens) // CHECK_EVERY
        piece.tokens += delta.token_ids
        if delta.finish is not None:
            del self._open[delta.request_id]
            piece.is_whole = delta.finish == "stop"
            self._submit(piece.writing, _sent(piece))
        elif len(piece.tokens) // CHECK_EVERY > looked and ends_in_loop(piece.tokens):
            del self._open[delta.request_id]
            self._engine.abort(delta.request_id)


def _sent(piece: Piece) -> Submit | None:
    """What the writing wants next, after this."""
    try:
        return piece.writing.send(piece)
    except StopIteration:
        return None


class _Speed(ProgressColumn):
    def render(self, task: Bar) -> Label:
        return Label(f"{task.speed or 0:.0f} tokens/s")


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens")
    return Progress(*columns, _Speed(), TimeRemainingColumn(), console=console, speed_estimate_period=120)
