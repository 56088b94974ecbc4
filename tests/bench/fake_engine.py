"""`medusa-serve` around an engine without tensors: scheduler, slots, processes and pipes are the real ones.

python -m tests.bench.fake_engine serve FOLDER ...     like `medusa-serve serve`; `write_model` makes the folder
"""

from __future__ import annotations

import functools
import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from server.engine import worker
from server.engine.core import Engine
from server.engine.messages import EngineConfig, Ready
from server.engine.request import Outcome, Work
from tests.server.engine.fakes import FakeRunner

VOCAB = 256
MAX_MODEL_LEN = 1000
STEP_SECONDS = 0.002
KV_CACHE_TOKENS = 4000  # scarce, so that requests wait and are preempted


class SlowRunner(FakeRunner):
    """Takes its time, and knows a byte for each token."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots, max_model_len=MAX_MODEL_LEN)
        self.info = replace(self.info, vocab_size=VOCAB)

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        time.sleep(STEP_SECONDS)
        self.num_rows.clear()
        return super().run(works)


def run_engine(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """As `worker.run_worker`."""
    engine = Engine(config, SlowRunner(config.kv_cache_tokens or KV_CACHE_TOKENS))
    messages: worker.Inbox = queue.SimpleQueue()
    threading.Thread(target=worker._read, args=(inbox, messages), daemon=True).start()
    outbox.send(Ready(engine.runner.info))
    worker.serve(engine, messages, outbox)


def write_model(folder: Path) -> None:
    """What `serve` looks at before it starts the engine: a configuration, weights, a tokenizer of bytes."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "hidden_size": 8, "vocab_size": VOCAB}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE({char: id for id, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def main(argv: Sequence[str]) -> int:
    from server import __main__, launch

    launch.EngineClient = functools.partial(launch.EngineClient, target=run_engine)  # type: ignore[assignment, misc]
    return __main__.main(argv)


if __name__ == "__main__":
    from tests.bench import fake_engine  # by its name, which the engine process can import

    sys.exit(fake_engine.main(sys.argv[1:]))
