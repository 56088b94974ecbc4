"""What an operator can get wrong here: every such error is one sentence that says what to do."""

from __future__ import annotations


class UsageError(ValueError):
    """Base of them all; the command line prints the sentence and leaves with exit code 2."""
