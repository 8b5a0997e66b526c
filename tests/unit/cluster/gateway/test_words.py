"""Words must say what the library says, of any ASCII text, or not be there."""

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from diptych.cluster.gateway import words
from diptych.cluster.gateway.words import GPT2_PATTERN, PATTERNS, TokenizerFile, Words, longest_of, words_of
from diptych.models.embedded.path import embedded_model_path

EMBEDDED: dict[str, Any] = json.loads((embedded_model_path() / "tokenizer.json").read_text())
TAGS = [token["content"] for token in EMBEDDED["added_tokens"]]
CODE = "def f(x):\r\n\t\treturn x+1  # isn't it 12345 or\x0b\x1c WE'LL?\n\n   \n<|user|> a<s><s>b</s >"
PIECES = st.one_of(
    st.text(st.characters(max_codepoint=127)),
    st.sampled_from([*TAGS, "'s", "'LL", " ", "\n", "\r\n", "  x", "1234", "<", "<|"]),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def cut_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


def load(**changes: Any) -> tuple[Tokenizer, Words | None]:
    text = json.dumps(EMBEDDED | changes)
    tokenizer = Tokenizer.from_str(text)
    return tokenizer, words_of(tokenizer, msgspec.json.decode(text, type=TokenizerFile))


@pytest.fixture(scope="module", params=["as it is", "NFC", *PATTERNS])
def both(request) -> tuple[Tokenizer, Words]:
    changes = {"as it is": {}, "NFC": {"normalizer": {"type": "NFC"}}}
    tokenizer, known = load(**changes.get(request.param) or ({} if request.param in changes else cut_by(request.param)))
    assert known is not None
    return tokenizer, known


@given(text=TEXTS, add_special_tokens=st.booleans())
def test_they_are_the_librarys(both, text, add_special_tokens):
    tokenizer, known = both
    of_library = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    assert list(known.encode(text, add_special_tokens=add_special_tokens)) == of_library


def test_of_code_and_the_second_time_too(both):
    tokenizer, known = both
    for _ in range(2):
        assert list(known.encode(CODE, add_special_tokens=True)) == tokenizer.encode(CODE).ids


def test_every_ascii_character_is_of_its_kind(both):
    tokenizer, known = both
    text = "".join(f"a{chr(i)}b {chr(i)}1{chr(i)}{chr(i)}\n" for i in range(128))
    assert list(known.encode(text, add_special_tokens=False)) == tokenizer.encode(text, add_special_tokens=False).ids


def test_what_is_added_at_the_end_is_too():
    after = {"type": "TemplateProcessing", "pair": EMBEDDED["post_processor"]["pair"]}
    after |= {"single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}]}
    tokenizer, known = load(post_processor=after | {"special_tokens": EMBEDDED["post_processor"]["special_tokens"]})
    assert known is not None
    assert list(known.encode("so", add_special_tokens=True)) == tokenizer.encode("so").ids


def test_without_added_tokens():
    tokenizer, known = load(added_tokens=[], post_processor=None)
    assert known is not None
    assert list(known.encode("<s> so", add_special_tokens=True)) == tokenizer.encode("<s> so").ids


NESTED = ["<|a|>", "<|a|>b", "<|a", "a|>", "<s", "s>", "[PAD]"]


def test_added_tokens_within_each_other_and_others_than_the_file_says():
    """The library gives ids of its own where the file's are taken, or the vocabulary has the token."""
    like = EMBEDDED["added_tokens"][0]
    added = [*EMBEDDED["added_tokens"], *(like | {"id": 9000 - i, "content": content} for i, content in enumerate(NESTED))]
    tokenizer, known = load(added_tokens=added)
    assert known is not None

    @given(st.lists(st.sampled_from([*NESTED, *TAGS, "<", "a", "|>", " "]), max_size=8).map("".join))
    def check(text):
        assert list(known.encode(text, add_special_tokens=True)) == tokenizer.encode(text).ids

    check()


def test_what_says_anything_else_of_a_probe_is_left_to_the_library():
    """Without a token for `a` it cannot be told what is put before a text, and what after it."""
    model = EMBEDDED["model"]
    merges = [merge for merge in model["merges"] if "a" not in "".join(merge)]
    vocab = {token: number for token, number in model["vocab"].items() if "a" not in token}
    assert load(model=model | {"vocab": vocab, "merges": merges})[1] is None


@given(st.sets(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=12), st.text("ab<|", max_size=20))
def test_the_longest_of_many_is_found_first(contents, text):
    naive = "|".join(map(re.escape, sorted(contents, key=len, reverse=True)))
    assert re.split(f"({longest_of(sorted(contents))})", text) == re.split(f"({naive})", text)


def test_full_it_begins_anew_and_long_words_are_not_kept(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 3)
    monkeypatch.setattr(words, "MAX_WORD_CHARS", 4)
    tokenizer, known = load()
    assert known is not None
    for text in ("one two six ten ace", "a longer one two"):
        assert list(known.encode(text, add_special_tokens=False)) == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(known._tokens_of) <= 3
    assert " longer" not in known._tokens_of


def changed(token: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"added_tokens": [token | changes, *EMBEDDED["added_tokens"][1:]]}


@pytest.mark.parametrize(
    "changes",
    [
        cut_by(r"\s+"),
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": EMBEDDED["model"] | {"dropout": 0.1}},
        *(changed(EMBEDDED["added_tokens"][0], **{key: True}) for key in ("lstrip", "rstrip", "single_word", "normalized")),
    ],
)
def test_of_another_kind_there_are_none(changes):
    assert load(**changes)[1] is None


def test_the_librarys_own_pattern_is_gpt2s():
    assert load()[1] is not None
    assert GPT2_PATTERN in PATTERNS
