"""Exit codes and sentences of the training commands."""

import argparse

import pytest
from rich.console import Console

from models.errors import UsageError
from models.train.command import positive, run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("Give more text."), 2, "error: Give more text.\n"),
        (PermissionError(13, "denied", "/x"), 2, "error: Cannot read or write ([Errno 13] denied: '/x')"),
        (KeyboardInterrupt(), 130, "Stopped"),
    ],
)
def test_what_went_wrong_is_one_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: argparse.Namespace, console: Console) -> None:
        raise error

    assert run(fails, argparse.Namespace()) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_bug_is_not_swallowed() -> None:
    def fails(options: argparse.Namespace, console: Console) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(fails, argparse.Namespace())


def test_success_is_zero() -> None:
    assert run(lambda options, console: None, argparse.Namespace()) == 0


@pytest.mark.parametrize("text", ["0", "-3"])
def test_positive_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive(text)


def test_positive_reads() -> None:
    assert positive("7") == 7
