"""Masks depend on grammar and path alone; errors stay where they happen; forced text is found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from json_tokens import EOS, VOCAB_SIZE, json_tokenizer
from llguidance import LLMatcher

from models.grammar import GrammarError, Grammars, GrammarState, unpack
from server.text.grammar import of_choices

TOKENIZER = json_tokenizer()
GRAMMARS = Grammars(TOKENIZER.to_str(), [EOS])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "tags": {"enum": ["red", "green"]}},
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "},
}
JSON = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
TOO_COMPLEX = 'start: "a" wide\nwide: ' + " | ".join(f'x{n} "z"' for n in range(3000))
TOO_COMPLEX += "\n" + "\n".join(f'x{n}: "b"' for n in range(3000))


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


def allowed(state: GrammarState, path: tuple[int, ...] = ()) -> set[int]:
    mask = state.mask(path)
    assert mask is not None
    return set(np.nonzero(unpack(mask, VOCAB_SIZE))[0].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_masks_do_not_depend_on_what_was_asked_before(seed: int) -> None:
    """One state wanders through trees; the other has never seen anything but the output."""
    choose = random.Random(seed)
    wandering, output = GRAMMARS.start(JSON), []
    while not wandering.is_complete(()) and len(output) < 60:
        for _ in range(choose.randrange(4)):
            path: tuple[int, ...] = ()
            for _ in range(choose.randrange(5)):
                if wandering.is_complete(path):
                    break
                wandering.forced(path)
                path = (*path, choose.choice(sorted(allowed(wandering, path))))
            assert not wandering.is_complete((*path, VOCAB_SIZE - 1))  # forbidden
        fresh = GRAMMARS.start(JSON)
        fresh.advance(output)
        assert wandering.mask(()) == fresh.mask(())
        output.append(choose.choice(sorted(allowed(fresh))))
        wandering.advance(output)
    assert len(output) > 10


def test_no_token_beyond_the_vocabulary_and_the_end_only_where_it_may_be() -> None:
    state = GRAMMARS.start('start: "a" /[0-9]+/')
    assert allowed(state, tuple(ids("a"))) == {ids(str(digit))[0] for digit in range(10)}
    assert allowed(state, tuple(ids("a1"))) == {ids(str(digit))[0] for digit in range(10)} | {EOS}
    strings = GRAMMARS.start(JSON)
    strings.advance(ids('{"name": "'))
    assert max(allowed(strings)) < TOKENIZER.get_vocab_size()
    assert EOS not in allowed(strings)


def test_complete() -> None:
    state = GRAMMARS.start('start: "red" | "redder"')
    assert not state.is_complete(())
    assert not state.is_complete(tuple(ids("red")))
    assert state.is_complete((*ids("red"), EOS))
    assert state.is_complete(tuple(ids("red") + ids("der")))
    assert not state.is_complete(tuple(ids("blue")))
    assert not state.is_complete((-1,))
    state.advance([*ids("red"), EOS])
    assert state.is_complete(())


def test_forced_text_is_split_into_the_longest_tokens() -> None:
    state, path = GRAMMARS.start(JSON), ()
    while (token := state.forced(path)) is not None:
        path = (*path, token)
    assert [TOKENIZER.decode([token]) for token in path] == ['{"', "name", '": "']
    tags = tuple(ids('{"name": "x", "count": 3, "tags": "'))
    assert state.forced(tags) is None  # red or green
    assert state.forced(tuple(ids('{"name": "x", "count":'))) == ids(" ")[0]  # and not " -"


def test_paths_that_are_forbidden_have_no_mask() -> None:
    state = GRAMMARS.start('start: "a" "b"')
    wrong = tuple(ids("ax"))
    assert state.mask(wrong) is None
    assert state.error(wrong) is None
    assert state.allowed(wrong, [1, 2]) == []
    assert state.allowed(tuple(ids("a")), [*ids("x"), *ids("b")]) == ids("b")


def test_output_that_left_the_grammar_is_an_error() -> None:
    state = GRAMMARS.start('start: "a" "b"')
    state.advance(ids("ax"))
    assert state.mask(()) is None
    assert state.error(()) == "The output has left it."


def test_what_gets_too_complex_fails_its_own_path_only() -> None:
    state = GRAMMARS.start(f"{TOO_COMPLEX}\n".replace('start: "a" wide', 'start: "a" wide | "b" "c"'))
    heavy, light = tuple(ids("a")), tuple(ids("b"))
    assert state.mask(heavy) is None
    assert "items" in (state.error(heavy) or "")
    assert allowed(state, light) == set(ids("c"))
    assert state.error(light) is None
    state.advance(ids("b"))
    assert allowed(state) == set(ids("c"))


def test_grammars_that_do_not_compile_say_why() -> None:
    with pytest.raises(GrammarError, match="unknown name"):
        GRAMMARS.start("start: nobody")


def test_a_tokenizer_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="tokenizer cannot be used"):
        Grammars(tmp_path / "tokenizer.json", [EOS]).start(JSON)


def test_the_tokenizer_can_be_read_before_the_first_grammar(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Grammars(file, [EOS]).prepare()  # there is none: no grammar can be used, and nothing else is wrong
    file.write_text(TOKENIZER.to_str())
    grammars = Grammars(file, [EOS])
    grammars.prepare()
    file.unlink()
    assert grammars.start(JSON).mask(()) is not None


def test_a_byte_level_decoder_is_seen_within_a_sequence(tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.to_str())
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, content["decoder"]]}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    hidden = Grammars(file, [EOS]).start('start: "a b"')
    assert allowed(hidden, tuple(ids("a"))) == allowed(GRAMMARS.start('start: "a b"'), tuple(ids("a")))


def test_thousands_of_choices_are_not_too_complex() -> None:
    choices = [f'"count": {n}' for n in range(4000)]
    state = GRAMMARS.start(of_choices([*choices, '"count": 1 and more']))
    output = ids('"count": 17')
    assert all(state.mask(tuple(output[:n])) is not None for n in range(len(output)))
    state.advance(output)
    assert allowed(state) == {EOS, *(ids(str(n))[0] for n in range(10))}
