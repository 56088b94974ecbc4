"""A tiny random llama with a tokenizer of 64 words, as a folder, and text to train on."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SPECIAL = ["<unk>", "</s>", "<user>", "<assistant>", "<system>"]
WORDS = [f"w{i}" for i in range(64 - len(SPECIAL))]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats whose answers count on from a random word: easy to guess ahead once the state shows where they are."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "chats.jsonl"
    rows = []
    for _ in range(80):
        start, length = draw.randrange(59), draw.randrange(6, 20)
        answer = " ".join(WORDS[(start + i) % 59] for i in range(length))
        rows.append({"q": " ".join(draw.choices(WORDS, k=4)), "a": answer, "temp": draw.choice([0.0, 0.7])})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
