"""Small checkpoints written in every known format, loaded, and compared with the formula; and the wrong ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from models.checkpoint import WEIGHTS_NAME, CheckpointError, check_heads, load_heads, read_heads, save_heads
from models.drafters.resblock import ResBlockHeads

HIDDEN, VOCAB, HEADS, LAYERS = 8, 24, 3, 2
MAP = [1, 4, 5, 11, 23]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) * 7 + rand_calls()))


_count = iter(range(1_000_000))


def rand_calls() -> int:
    return next(_count)


@pytest.fixture
def lm_head() -> Tensor:
    return rand(VOCAB, HIDDEN)


Blocks = list[list[tuple[Tensor, Tensor]]]


@pytest.fixture
def blocks() -> Blocks:
    """[head][layer] -> weight, bias."""
    return [[(rand(HIDDEN, HIDDEN) * 0.3, rand(HIDDEN) * 0.3) for _ in range(LAYERS)] for _ in range(HEADS)]


def medusa_names(blocks: Blocks, *, bias: bool = True) -> dict[str, Tensor]:
    named = {f"{h}.{n}.linear.weight": w for h, head in enumerate(blocks) for n, (w, _) in enumerate(head)}
    biases = {f"{h}.{n}.linear.bias": b for h, head in enumerate(blocks) for n, (_, b) in enumerate(head)}
    return named | (biases if bias else {})


def vllm_names(blocks: Blocks, *, bias: bool) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in medusa_names(blocks, bias=bias).items():
        renamed[re.sub(r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)] = tensor
    return renamed


def expected(hidden: Tensor, blocks: Blocks, lm_heads: list[Tensor], *, bias: bool = True) -> Tensor:
    logits = []
    for head, rows in zip(blocks, lm_heads, strict=True):
        x = hidden
        for weight, b in head:
            x = x + silu(x @ weight.T + (b if bias else 0))
        logits.append(x @ rows.T)
    return torch.stack(logits, dim=1)


def assert_same(heads: ResBlockHeads, blocks: Blocks, lm_heads: list[Tensor], *, bias: bool = True) -> None:
    hidden = rand(4, HIDDEN)
    torch.testing.assert_close(heads(hidden), expected(hidden, blocks, lm_heads, bias=bias))


def write_config(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def test_fasterdecoding_pickle_with_own_lm_heads(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    own = [rand(VOCAB, HIDDEN) for _ in range(HEADS)]
    state = medusa_names(blocks) | {f"{h}.{LAYERS}.weight": rows for h, rows in enumerate(own)}
    torch.save(state, tmp_path / "medusa_lm_head.pt")
    write_config(tmp_path, medusa_num_heads=2, medusa_num_layers=1, base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    heads = load_heads(tmp_path, lm_head)
    assert (heads.num_heads, heads.num_layers, heads.accuracies) == (HEADS, LAYERS, None)
    assert_same(heads, blocks, own)


def test_fasterdecoding_safetensors_as_a_file(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    own = [rand(VOCAB, HIDDEN) for _ in range(HEADS)]
    state = medusa_names(blocks) | {f"{h}.{LAYERS}.weight": rows for h, rows in enumerate(own)}
    save_file(state, tmp_path / "anything.safetensors")
    assert_same(load_heads(tmp_path / "anything.safetensors", lm_head), blocks, own)


def test_version_2_and_tgi_share_the_base_lm_head(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    write_config(tmp_path, medusa_num_heads=HEADS, medusa_num_layers=LAYERS, base_model_name_or_path="google/gemma-7b")
    assert_same(load_heads(tmp_path, lm_head), blocks, [lm_head] * HEADS)


def test_lm_head_may_be_a_module(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    module = nn.Linear(HIDDEN, VOCAB, bias=False)
    module.weight.data = lm_head
    assert_same(load_heads(tmp_path, module), blocks, [lm_head] * HEADS)


def test_missing_bias_is_zero(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    save_file(medusa_names(blocks, bias=False), tmp_path / WEIGHTS_NAME)
    assert_same(load_heads(tmp_path, lm_head), blocks, [lm_head] * HEADS, bias=False)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_full_models_shards_yield_only_their_heads(
    tmp_path: Path, lm_head: Tensor, blocks: Blocks, suffix: str
) -> None:
    write: Callable[[dict[str, Tensor], Path], None] = save_file if suffix == "safetensors" else torch.save
    prefixed = {f"medusa_head.{name}": tensor for name, tensor in medusa_names(blocks).items()}
    names = sorted(prefixed)
    first = {name: prefixed[name] for name in names[:5]} | {"model.layers.0.mlp.up_proj.weight": rand(4, 4)}
    second = {name: prefixed[name] for name in names[5:]} | {"model.norm.weight": rand(4), "lm_head.weight": rand(9, 9)}
    write(first, tmp_path / f"model-00001-of-00003.{suffix}")
    write(second, tmp_path / f"model-00002-of-00003.{suffix}")
    write({"model.embed_tokens.weight": rand(3, 3)}, tmp_path / f"model-00003-of-00003.{suffix}")
    assert_same(load_heads(tmp_path, lm_head), blocks, [lm_head] * HEADS)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [True, False])
def test_vllm_with_own_lm_heads(tmp_path: Path, lm_head: Tensor, blocks: Blocks, prefix: str, bias: bool) -> None:
    own = [rand(VOCAB, HIDDEN) for _ in range(HEADS)]
    state = vllm_names(blocks, bias=bias) | {f"lm_heads.{h}.weight": rows for h, rows in enumerate(own)}
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_same(load_heads(tmp_path, lm_head), blocks, own, bias=bias)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_one_lm_head_for_all(tmp_path: Path, lm_head: Tensor, blocks: Blocks, name: str) -> None:
    shared = rand(VOCAB, HIDDEN)
    save_file(vllm_names(blocks, bias=False) | {name: shared}, tmp_path / "model.safetensors")
    assert_same(load_heads(tmp_path, lm_head), blocks, [shared] * HEADS, bias=False)


@pytest.mark.parametrize("cut", [True, False])
def test_vllm_token_map_takes_rows_of_the_lm_head(tmp_path: Path, lm_head: Tensor, blocks: Blocks, cut: bool) -> None:
    shared = rand(VOCAB, HIDDEN)
    stored = shared[MAP] if cut else shared
    extra = {"lm_head.weight": stored, "token_map": torch.tensor(MAP)}
    save_file(vllm_names(blocks, bias=False) | extra, tmp_path / "model.safetensors")
    heads = load_heads(tmp_path, lm_head)
    assert heads.token_ids.tolist() == MAP
    assert_same(heads, blocks, [shared[MAP]] * HEADS, bias=False)


def test_own_format_comes_back_as_it_was_saved(tmp_path: Path, lm_head: Tensor) -> None:
    accuracies = ((0.5, 0.25), (0.25, 0.125))
    saved = ResBlockHeads(
        lm_head[MAP], num_heads=2, num_layers=LAYERS, token_ids=torch.tensor(MAP), accuracies=accuracies
    )
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.copy_(rand(*parameter.shape).half().float())
    save_heads(tmp_path, saved, base_model="base", vocab_size=VOCAB, card="# Card\n", facts={"epochs": 3})

    heads = load_heads(tmp_path, lm_head)
    hidden = rand(4, HIDDEN)
    torch.testing.assert_close(heads(hidden), saved(hidden))
    assert heads.accuracies == accuracies
    assert heads.token_ids.tolist() == MAP
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["draft_vocab_size"] == len(MAP)
    assert config["training"] == {"epochs": 3}
    assert (tmp_path / "README.md").read_text() == "# Card\n"
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float16, torch.int32}


def test_heads_that_see_inner_layers_come_back_as_they_were_saved(tmp_path: Path, lm_head: Tensor) -> None:
    saved = ResBlockHeads(lm_head, num_heads=2, inner_layers=(1, 0))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.copy_(rand(*parameter.shape).half().float())
    save_heads(tmp_path, saved, base_model="base", vocab_size=VOCAB, card="")
    heads = load_heads(tmp_path, lm_head)
    assert heads.inner_layers == (1, 0)
    hidden = rand(4, 3 * HIDDEN)
    torch.testing.assert_close(heads(hidden), saved(hidden))

    for layers in ([1], [], [1, 0, 2]):
        write_config(tmp_path, inner_layers=layers)
        with pytest.raises(CheckpointError, match=rf"does not fit the {len(layers)} inner_layers"):
            load_heads(tmp_path, lm_head)
    save_file({"0.0.linear.weight": rand(HIDDEN, HIDDEN)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"fusion\.weight .* is missing"):
        load_heads(tmp_path, lm_head)
    write_config(tmp_path, inner_layers="all")
    with pytest.raises(CheckpointError, match="no list of layers"):
        load_heads(tmp_path, lm_head)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, lm_head: Tensor, blocks: Blocks, content: str) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_heads(tmp_path, lm_head)


def test_whole_vocabulary_is_saved_without_a_map(tmp_path: Path, lm_head: Tensor) -> None:
    save_heads(tmp_path, ResBlockHeads(lm_head, num_heads=1), base_model="b", vocab_size=VOCAB, card="")
    assert read_heads(tmp_path).token_map is None
    assert load_heads(tmp_path, lm_head).token_ids.tolist() == list(range(VOCAB))


def test_heads_with_own_lm_heads_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep their original files"):
        save_heads(
            tmp_path, ResBlockHeads(rand(2, VOCAB, HIDDEN), num_heads=2), base_model="b", vocab_size=VOCAB, card=""
        )


def test_dtype_is_the_lm_heads_unless_asked_otherwise(tmp_path: Path, lm_head: Tensor, blocks: Blocks) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    assert load_heads(tmp_path, lm_head).weight.dtype == torch.float32
    heads = load_heads(tmp_path, lm_head, dtype=torch.bfloat16)
    assert heads.weight.dtype == heads.lm_head.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def broken(blocks: Blocks) -> dict[str, tuple[dict[str, Tensor], str]]:
    names = medusa_names(blocks)
    without = {name: tensor for name, tensor in names.items() if not name.startswith("1.0.")}
    return {
        "hidden": ({"0.0.linear.weight": rand(5, 5)}, "hidden size"),
        "bias": ({**names, "0.0.linear.bias": rand(5)}, "bias of the wrong size"),
        "orphan bias": ({**names, "3.0.linear.bias": rand(HIDDEN), "3.1.linear.bias": rand(HIDDEN)}, "no weight"),
        "vocabulary": (names | {f"{h}.2.weight": rand(VOCAB + 1, HIDDEN) for h in range(HEADS)}, "LM head"),
        "some lm heads": (names | {f"{h}.2.weight": rand(VOCAB, HIDDEN) for h in (0, 1)}, "some not"),
        "missing layer": (without, "incomplete"),
        "map": (names | {"token_map": torch.tensor([0, VOCAB])}, "token_map"),
        "repeated map": (names | {"token_map": torch.tensor([3, 3])}, "token_map"),
        "negative map": (names | {"token_map": torch.tensor([-1, 3])}, "token_map"),
        "unknown": (names | {"hydra.0.weight": rand(2)}, "hydra.0.weight"),
        "no heads": ({"lm_head.weight": rand(VOCAB, HIDDEN)}, "no Medusa heads"),
        "base model": ({"model.norm.weight": rand(HIDDEN)}, "no Medusa heads"),
    }


@pytest.mark.parametrize("case", sorted(broken([])))
def test_what_does_not_fit_is_refused(tmp_path: Path, lm_head: Tensor, blocks: Blocks, case: str) -> None:
    state, message = broken(blocks)[case]
    save_file(state, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=message):
        load_heads(tmp_path, lm_head)


def test_check_needs_no_model(tmp_path: Path, blocks: Blocks) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    check_heads(read_heads(tmp_path), hidden_size=HIDDEN, vocab_size=VOCAB)
    with pytest.raises(CheckpointError, match="hidden size"):
        check_heads(read_heads(tmp_path), hidden_size=HIDDEN + 1, vocab_size=VOCAB)


def test_unreadable_files(tmp_path: Path, lm_head: Tensor) -> None:
    with pytest.raises(CheckpointError, match="nothing at"):
        load_heads(tmp_path / "absent", lm_head)
    with pytest.raises(CheckpointError, match="no weights in"):
        load_heads(tmp_path, lm_head)
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"not tensors at all")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_heads(tmp_path / name, lm_head)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, lm_head: Tensor) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_heads(tmp_path, lm_head)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("accuracies", [[[0.5]], "x", [["a"], [1], [1]]])
def test_wrong_accuracies_are_refused(tmp_path: Path, lm_head: Tensor, blocks: Blocks, accuracies: object) -> None:
    save_file(medusa_names(blocks), tmp_path / WEIGHTS_NAME)
    write_config(tmp_path, accuracies=accuracies)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_heads(tmp_path, lm_head)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"0.0.linear.weight": 1}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, lm_head: Tensor, content: object) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match="no named tensors"):
        load_heads(tmp_path, lm_head)
