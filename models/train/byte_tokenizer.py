"""A vocabulary of bytes as a tokenizer that transformers, the tokenizers library and our server read.

Invariant: the id of a byte is its value; END, after them, stands between documents.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = 256
END_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's alphabet without merges."""
    inner = Tokenizer(BPE({char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_TEXT, clean_up_tokenization_spaces=False)
