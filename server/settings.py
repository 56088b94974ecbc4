"""The only configuration: flags over `MEDUSA_*` environment over a YAML file over defaults; one frozen tree.

Invariants:
- a key that is not a field, or a value that does not fit, is one sentence (StartupError), wherever it came from;
- an empty variable of the environment is not set; an empty flag is a value like any other, and seldom one that fits, so
  that `--api-key "$KEY"` without a KEY does not open the server;
- nothing else in the house reads flags or files of configuration.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from models.source import DEFAULT_MODEL
from server.engine.messages import EngineConfig
from server.errors import StartupError
from server.options import DoorOptions, Limits

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "none"]
ToolCallParser = Literal["auto", "hermes", "llama3_json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _listed(value: Any) -> Any:
    """A text is a list, with commas or spaces between; an empty one is most likely somebody's unset variable."""
    if not isinstance(value, str):
        return value
    if not (found := tuple(value.replace(",", " ").split())):
        raise ValueError("it is empty; leave it out")
    return found


class Settings(BaseSettings):
    """Serve a model over the OpenAI API. A flag is also a variable (MEDUSA_PORT) and a key of the YAML file (port)."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="MEDUSA_",
        protected_namespaces=(),
        cli_prog_name="medusa-serve serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_shortcuts={"api-keys": "api-key"},
    )

    model: CliPositionalArg[str] = Field(
        DEFAULT_MODEL, description="a folder, a GGUF file, a hub id (org/name), or the built-in model's name"
    )
    heads: str | None = Field(
        None, description="Medusa heads: file, folder or 'none'; built-in for the default model and multi-token models"
    )
    config: Path | None = Field(None, description="YAML file with any of these settings")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 is any free one")
    served_model_name: str | None = Field(None, description="the model's name in the API; by default as given")
    device: Device = Field("auto", description="where the model runs")
    dtype: Dtype = Field("auto", description="type of the weights")
    quantization: Quantization | None = Field(
        None,
        description="int8 or int4 weights, or none; by default, on a CPU with a C compiler, int4 if four bits hold the "
        "model's weights as they are, else int8",
    )
    max_model_len: int | None = Field(None, ge=1, description="tokens of prompt and completion; by default the model's")
    max_num_seqs: int = Field(64, ge=1, description="requests in one batch")
    max_num_batched_rows: int = Field(512, ge=64, description="token positions in one forward pass")
    kv_cache_tokens: int | None = Field(None, ge=1, description="tokens in the KV cache; by default from free memory")
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory that weights and KV cache may fill, other programs' included",
    )
    prefix_cache: bool = Field(True, description="reuse the KV of common prompt beginnings")
    num_nodes: int = Field(
        32, ge=0, le=63, description="guessed tokens verified per request and step, at most; 0 is plain decoding"
    )
    static_trees: bool = Field(
        False, description="always verify --num-nodes guesses in one shape, whatever they cost and win; for comparison"
    )
    control_share: float = Field(
        0.01, ge=0, lt=1, description="share of steps that decode plainly on purpose, to measure the speedup"
    )
    ngram: bool = Field(True, description="guess that the text repeats itself or its prompt, beside the heads' guesses")
    ngram_min: int = Field(2, ge=1, le=16, description="tokens that must match before a repeat is guessed")
    ngram_max: int = Field(4, ge=1, le=16, description="a match of so many tokens is long enough; the latest is taken")
    ngram_max_nodes: int = Field(8, ge=1, le=63, description="tokens of a repeat guessed per request and step")
    enforce_eager: bool = Field(False, description="on a GPU: launch every kernel by itself, without CUDA graphs")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the engine; by default all cores")
    trust_request_chat_template: bool = Field(
        False, description="allow requests to bring a chat_template, which can keep a core busy"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="keys that clients must bring, one of them; others on this machine can read flags, not a file"
    )
    api_key_file: Path | None = Field(None, description="file with more API keys, one a line")
    max_concurrent_requests_per_key: int | None = Field(
        None, ge=1, description="open requests of one API key; more get 429"
    )
    max_queued_requests: int = Field(
        1024, ge=0, description="choices that may wait for a place in the batch; more get 429"
    )
    max_queued_tokens: int | None = Field(
        None, ge=1, description="prompt tokens that may wait to be begun with; more get 429; by default any number"
    )
    max_request_bytes: int = Field(4 * 2**20, ge=1, description="bytes of a request's body; more get 413")
    request_timeout_seconds: float | None = Field(
        None, gt=0, description="seconds that a request may take, its stream included; by default any number"
    )
    engine_timeout_seconds: float = Field(
        300, gt=0, description="seconds without a step, though there is work, after which the engine is started again"
    )
    drain_seconds: float = Field(30, ge=0, description="seconds that open requests have to end after a SIGTERM")
    keep_alive_seconds: int = Field(
        75, ge=0, description="seconds that an idle connection is kept open, better more than clients do"
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="origins of web pages that may call the API (CORS); * is any"
    )
    ssl_certfile: Path | None = Field(None, description="PEM file with the certificate; makes it https")
    ssl_keyfile: Path | None = Field(None, description="PEM file with its key, unless that is in the certificate's")
    access_log: bool = Field(True, description="one line of JSON on stdout for each request")
    tool_call_parser: ToolCallParser = Field(
        "auto", description="how the model calls tools; by default as its template says"
    )
    log_level: LogLevel = Field("info", description="how much is logged")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """First wins; the flags come before all of these."""
        return init_settings, EnvSettingsSource(settings_cls, env_ignore_empty=True), _YamlFile(settings_cls)

    @property
    def model_name(self) -> str:
        """What the API calls the model."""
        return self.served_model_name or self.model

    def engine_config(self, model: Path, heads: Path | None) -> EngineConfig:
        """What the engine process is told, with `model` and `heads` resolved to local paths."""
        return EngineConfig(
            model=str(model),
            heads=None if heads is None else str(heads),
            own_heads=self.heads is None,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_rows=self.max_num_batched_rows,
            kv_cache_tokens=self.kv_cache_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            prefix_cache=self.prefix_cache,
            num_nodes=self.num_nodes,
            static_trees=self.static_trees,
            control_share=self.control_share,
            ngram=self.ngram,
            ngram_min=self.ngram_min,
            ngram_max=self.ngram_max,
            ngram_max_nodes=self.ngram_max_nodes,
            enforce_eager=self.enforce_eager,
            num_threads=self.num_threads,
        )

    def door_options(self) -> DoorOptions:
        """What the API process is told. Reads the file of keys; raises StartupError."""
        given = tuple(key.get_secret_value() for key in self.api_keys)
        keys = given + (() if self.api_key_file is None else _read_keys(self.api_key_file))
        if self.max_concurrent_requests_per_key is not None and not keys:
            raise StartupError("--max-concurrent-requests-per-key needs API keys: pass --api-key or --api-key-file.")
        if not all(key.strip() for key in keys):
            raise StartupError("An API key is empty: give each its letters and digits, or leave it out.")
        if not all(key.isascii() and key.isprintable() for key in keys):
            raise StartupError("An API key has characters that no header can carry: use letters and digits.")
        return DoorOptions(
            api_keys=keys,
            allowed_origins=self.allowed_origins,
            max_request_bytes=self.max_request_bytes,
            request_timeout_seconds=self.request_timeout_seconds,
            access_log=self.access_log,
            limits=Limits(
                max_num_seqs=min(self.max_num_seqs, self.max_num_batched_rows),
                max_queued_requests=self.max_queued_requests,
                max_queued_tokens=self.max_queued_tokens,
                max_concurrent_requests_per_key=self.max_concurrent_requests_per_key,
            ),
        )


class _YamlFile(YamlConfigSettingsSource):
    """The file that flags or environment name as `config`."""

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        return {} if path is None else _read_yaml(Path(path))


def load(argv: Sequence[str]) -> Settings:
    """Settings from flags, environment and file. `--help` prints and leaves. Raises StartupError."""
    if os.environ.get("MEDUSA_API_KEY"):
        raise StartupError("MEDUSA_API_KEY is not read, and the server would be open: set MEDUSA_API_KEYS.")
    try:
        return CliApp.run(Settings, cli_args=list(argv))
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise StartupError(f"Cannot understand the command line: {reason}; see medusa-serve serve --help.") from error
    except ValidationError as error:
        raise StartupError(_sentence(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise StartupError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} must hold settings, one `name: value` a line.")
    if unknown := [str(key) for key in content if key not in Settings.model_fields or key == "config"]:
        raise StartupError(f"{path} has the unknown setting {unknown[0]!r}; see medusa-serve serve --help.")
    return content


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        keys = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"Cannot read the API keys {path}: {error}.") from error
    if not keys:
        raise StartupError(f"{path} holds no API key: write one a line, or leave --api-key-file out.")
    return keys


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name, value = ".".join(str(part) for part in first["loc"]), first["input"]
    if name.startswith("api_keys"):
        return f"The setting {name} cannot be what it is: {first['msg']}."
    return f"The setting {name} cannot be {value!r}: {first['msg']}."
