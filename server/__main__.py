"""The command line: `medusa-serve`, which is `python -m server`.

Invariants:
- what an operator got wrong is one sentence on stderr and exit code 2;
- commands are imported when they are run: the engine process, too, imports this module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from server import __version__

USAGE = """\
usage: medusa-serve COMMAND ...

  serve [MODEL] [--port 8000] [--heads PATH] ...   serve a model over the OpenAI API
  distill [MODEL] --output FILE --tokens N ...     let a model write the text that its heads learn from
  train heads ...                                  train Medusa heads for a model
  train pretrain --data FILES --output DIR ...     train a multi-token model on text, from scratch
  train experiment NAME --output DIR ...           rerun a claim of multi-token prediction on small models
  export heads HEADS --format FORMAT ...           write heads for FasterDecoding's Medusa, TGI or vLLM
  evaluate heads ...                               what heads bring on held-out text: a report on one or several
  evaluate perplexity ...                          int8 or int4 weights against float32 on a text
  version                                          print the version

Each command explains itself with --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["serve", *flags]:
            return _serve(flags)
        case ["distill", *flags]:
            from server import distill

            return distill.main(flags)
        case ["train", "heads", *flags]:
            from models.train import heads
            from server.step_times import measure_steps

            return heads.main(flags, measure_steps)
        case ["train", "pretrain", *flags]:
            from models.train import pretrain

            return pretrain.main(flags)
        case ["train", "experiment", *flags]:
            from models.train.experiments import command

            return command.main(flags)
        case ["export", "heads", *flags]:
            from models import export

            return export.main(flags)
        case ["evaluate", "heads", *flags]:
            from models.train import evaluate
            from server.step_times import measure_steps

            return evaluate.main(flags, measure_steps)
        case ["evaluate", "perplexity", *flags]:
            from models.train import perplexity

            return perplexity.main(flags)
        case ["version"]:
            sys.stdout.write(f"{__version__}\n")
            return 0
        case ["--help" | "-h"]:
            sys.stdout.write(USAGE)
            return 0
    sys.stderr.write(USAGE)
    return 2


def _serve(flags: list[str]) -> int:
    from models.source import ModelSourceError
    from server.errors import StartupError
    from server.launch import serve
    from server.settings import load

    try:
        return serve(load(flags))
    except (StartupError, ModelSourceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
