"""Building: once, again when anything that matters changes, and one sentence where it is not possible."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from targets import TARGETS, flags

from models.kernels import build, cpu
from models.kernels.build import KernelError, find_compiler, library

MARK = "medusa test compiler"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CC: notes each call, and for compiling and linking writes a file of its own."""
    monkeypatch.setenv("CC", str(fake(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo built > "$2"')))
    return tmp_path


def fake(folder: Path, then: str) -> Path:
    path = folder / "mycc"
    version = f'if [ "$1" = --version ]; then echo {MARK}; exit; fi'
    path.write_text(f'#!/bin/sh\n{version}\necho "$@" >> {folder}/calls\n{then}\n')
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[str]:
    log = folder / "calls"
    return log.read_text().splitlines() if log.exists() else []


def test_it_is_built_once_and_found_again(compiler: Path) -> None:
    first = library(compiler / "cache")
    assert first.read_text() == "built\n"
    assert [call.split()[-2:] == ["-o", call.split()[-1]] for call in calls(compiler)] == [True, True]
    assert library(compiler / "cache") == first
    assert len(calls(compiler)) == 2
    assert [path.name for path in (compiler / "cache").iterdir()] == [first.parent.name]


def test_the_flags_reach_the_compiler(compiler: Path) -> None:
    library(compiler / "cache")
    assert all(flag in calls(compiler)[0].split() for flag in build.FLAGS)


def test_other_flags_sources_processors_and_compilers_are_other_libraries(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, found = compiler / "cache", [library(compiler / "cache")]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    found.append(library(cache))
    sources = compiler / "sources"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert library(cache) == found[-1]  # where they lie does not matter
    (sources / "vec.h").write_text((sources / "vec.h").read_text() + "\n")
    found.append(library(cache))
    monkeypatch.setattr(build, "_processor", lambda: ("another",))
    found.append(library(cache))
    (compiler / "mycc").write_text((compiler / "mycc").read_text().replace(MARK, "version 2"))
    found.append(library(cache))
    assert len(set(found)) == len(found) == 5
    assert len(calls(compiler)) == 10


def test_no_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelError, match=r"^There is no C compiler \(cc, gcc, clang\): install gcc, or .*\.$"):
        library(tmp_path)
    monkeypatch.setenv("CC", "nonesuch")
    with pytest.raises(KernelError, match=r"no C compiler \(nonesuch\)"):
        library(tmp_path)


def test_the_first_that_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("clang", "gcc", "cc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert find_compiler() == str(tmp_path / name)
    monkeypatch.setenv("CC", str(tmp_path / "clang"))
    assert find_compiler() == str(tmp_path / "clang")


def test_a_compiler_that_fails_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(fake(tmp_path, "echo cpu.c:1: no such luck >&2; echo more >&2; exit 3")))
    sentence = r"mycc cannot build the CPU kernels \(cpu\.c:1: no such luck\): install gcc, or set CC\.$"
    with pytest.raises(KernelError, match=sentence):
        library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_hangs_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(fake(tmp_path, "exec sleep 60")))
    monkeypatch.setattr(build, "SECONDS", 0.3)
    with pytest.raises(KernelError, match=r"did not build the CPU kernels in 0\.3 s: set CC to another\.$"):
        library(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_sentence(compiler: Path) -> None:
    (compiler / "file").touch()
    with pytest.raises(KernelError, match="set MEDUSA_CACHE"):
        library(compiler / "file")


def test_a_library_that_cannot_be_loaded_is_one_sentence(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As clang's, whose OpenMP is not the one that torch has loaded."""
    monkeypatch.setenv("MEDUSA_CACHE", str(compiler / "cache"))
    cpu.kernels.cache_clear()
    with pytest.raises(KernelError, match=r"^The CPU kernels cannot be loaded \(.*\): set CC to gcc\.$"):
        cpu.kernels()


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_has_a_warning(target: str, tmp_path: Path) -> None:
    command = [
        find_compiler(),
        *flags(target),
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-c",
        str(build.SOURCES / "cpu.c"),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "cpu.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
