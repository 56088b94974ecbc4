"""Where settings come from, and what refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.source import DEFAULT_MODEL as SOURCE_DEFAULT
from server.engine.messages import EngineConfig
from server.errors import StartupError
from server.options import DoorOptions, Limits
from server.settings import DEFAULT_MODEL, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "medusa.yaml"
    path.write_text("port: 1\nhost: yaml\nmodel: yaml/model\nmax_num_seqs: 3\n")
    return path


def test_flags_beat_environment_beats_file_beats_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_PORT", "2")
    monkeypatch.setenv("MEDUSA_HOST", "env")
    monkeypatch.setenv("MEDUSA_HEADS", "")
    settings = load(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.host, settings.model) == (3, "env", "yaml/model")
    assert (settings.max_num_seqs, settings.dtype, settings.heads) == (3, "auto", None)


def test_the_environment_may_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_CONFIG", str(file))
    assert load([]).port == 1


def test_the_model_is_positional_and_names_itself() -> None:
    assert load([]).model_name == DEFAULT_MODEL == SOURCE_DEFAULT
    assert load(["org/name"]).model_name == "org/name"
    assert load(["org/name", "--served-model-name", "mine"]).model_name == "mine"


def test_the_engine_is_told_all_that_concerns_it() -> None:
    flags = "--no-prefix-cache --num-nodes 0 --dtype bfloat16 --device cpu --num-threads 2 --max-num-seqs 5"
    flags += " --static-trees --control-share 0 --enforce-eager --gpu-memory-utilization 0.5"
    more = "--quantization int8 --max-num-batched-rows 99 --kv-cache-tokens 700 --max-model-len 600"
    more += " --no-ngram --ngram-min 3 --ngram-max 7 --ngram-max-nodes 9"
    config = load([*flags.split(), *more.split()]).engine_config(Path("/model"), None)
    copies = (False, 3, 7, 9)
    assert config == EngineConfig(
        "/model", None, "cpu", "bfloat16", "int8", 600, 5, 99, 700, 0.5, False, 0, True, 0.0, True, 2, *copies
    )
    assert load([]).engine_config(Path("/model"), Path("/heads")) == EngineConfig("/model", "/heads")


def test_a_multi_token_model_drafts_with_its_own_heads_unless_told_otherwise() -> None:
    assert load(["/model"]).engine_config(Path("/model"), None).own_heads
    assert not load(["/model", "--heads", "none"]).engine_config(Path("/model"), None).own_heads


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prot", "1"], "unrecognized arguments: --prot"),
        (["--port"], "--port: expected one argument"),
        (["--port", "x"], "port cannot be 'x'"),
        (["--device", "tpu"], "device cannot be 'tpu'"),
        (["--quantization", "int3"], "quantization cannot be 'int3'"),
        (["--num-nodes", "64"], "num_nodes cannot be '64'"),
        (["--config", "/nowhere.yaml"], "Cannot read the configuration /nowhere.yaml"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence) as caught:
        load(flags)
    assert "\n" not in caught.value.message


def test_the_door_is_told_all_that_concerns_it() -> None:
    flags = "--max-num-seqs 5 --max-queued-requests 6 --max-queued-tokens 7 --max-concurrent-requests-per-key 8"
    flags += " --api-key a --api-key b --allowed-origins http://x --allowed-origins http://y"
    flags += " --max-request-bytes 9 --request-timeout-seconds 1.5 --no-access-log"
    options = load(flags.split()).door_options()
    assert options == DoorOptions(("a", "b"), ("http://x", "http://y"), 9, 1.5, False, Limits(5, 6, 7, 8))
    assert load([]).door_options() == DoorOptions(access_log=True, limits=Limits(64, 1024))


def test_keys_come_from_flags_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-c\n\nsk-d\n")
    monkeypatch.setenv("MEDUSA_API_KEYS", "sk-a, sk-b")
    assert load([]).door_options().api_keys == ("sk-a", "sk-b")
    settings = load(["--api-key-file", str(file)])
    assert settings.door_options().api_keys == ("sk-a", "sk-b", "sk-c", "sk-d")
    assert "sk-" not in repr(settings) + repr(settings.door_options())
    assert load(["--api-key", "sk-e", "--api-key-file", str(file)]).door_options().api_keys == ("sk-e", "sk-c", "sk-d")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--api-key", "sécret"], "characters that no header can carry"),
        (["--api-key", ""], "api_keys cannot be what it is: .* empty"),
        (["--api-key", ","], "api_keys cannot be what it is: .* empty"),
        (["--api-key-file", ""], "Cannot read the API keys"),
        (["--api-key-file", "/nowhere"], "Cannot read the API keys /nowhere"),
        (["--api-key-file", "/dev/null"], "/dev/null holds no API key"),
        (["--max-concurrent-requests-per-key", "2"], "needs API keys"),
    ],
)
def test_keys_that_cannot_be(flags: list[str], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence) as caught:
        load(flags).door_options()
    assert "cret" not in caught.value.message


@pytest.mark.parametrize("content", ['api_keys: [""]', 'api_keys: [secret, " "]', 'api_keys: ""'])
def test_empty_keys_in_a_file_open_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "medusa.yaml"
    file.write_text(content)
    with pytest.raises(StartupError, match="empty") as caught:
        load(["--config", str(file)]).door_options()
    assert "secret" not in caught.value.message


def test_an_empty_variable_is_not_set_and_a_like_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_API_KEYS", "")
    monkeypatch.setenv("MEDUSA_API_KEY_FILE", "")
    assert load([]).door_options().api_keys == ()
    with pytest.raises(StartupError, match="empty"):
        load(["--api-key", ""]).door_options()
    monkeypatch.setenv("MEDUSA_API_KEY", "sk-a")
    with pytest.raises(StartupError, match="MEDUSA_API_KEYS"):
        load([])


def test_a_wrong_key_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "medusa.yaml"
    file.write_text("api_keys: [[secret]]")
    with pytest.raises(StartupError, match=r"api_keys.0 cannot be what it is") as caught:
        load(["--config", str(file)])
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prot: 1", "unknown setting 'prot'"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("port: x", "port cannot be 'x'"),
        ("- 1", "must hold settings"),
        ("port: [", "is not valid YAML"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "medusa.yaml"
    file.write_text(content)
    with pytest.raises(StartupError, match=sentence) as caught:
        load(["--config", str(file)])
    assert "\n" not in caught.value.message


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    assert "--max-num-batched-rows" in capsys.readouterr().out
