"""Text → tokens by words whose tokens are known: what the library says, in a quarter of the time, for it allocates for each character.

    text ──► parts between added tokens ──► words, cut by the tokenizer's own pattern ──► each word's tokens, asked of the model once

Byte-level BPE does not look beyond a word. Words are cut as `re` cuts them: for ASCII alone, of which all agree what a letter is, and by
PATTERNS alone, whose meaning is known. For a tokenizer of any other kind there are no Words, nor for one that says anything else of PROBES.
"""

import os
import re
from itertools import chain, groupby
from typing import Any

import msgspec
from tokenizers import Tokenizer

from .detokenizer import BYTE_OF_CHAR

MAX_WORDS, MAX_WORD_CHARS = 1 << 16, 32
"""So many are remembered, of so many characters at most: 18 MB of usual words, 50 MB of the worst. With one more it begins anew."""

PATTERNS = {
    # GPT-2's, which is the library's own
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+":
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+",
    # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip
"""As tokenizers have them, and the same of ASCII alone as `re` has it."""

PROBES = ("", "a", " Don't\tstop,  12345\r\n\n x=y ", "".join(map(chr, range(128))))

GPT2_PATTERN = next(iter(PATTERNS))
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


class _Model(msgspec.Struct):
    type: str = ""
    dropout: float | None = None              # a share of merges left out at random


class TokenizerFile(msgspec.Struct):
    """What of tokenizer.json decides how a text is cut."""

    model: _Model = msgspec.field(default_factory=_Model)
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] = []


class _TokensOfWord(dict[str, tuple[int, ...]]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model

    def __missing__(self, word: str) -> tuple[int, ...]:
        token_ids = tuple(token.id for token in self._model.tokenize(word.translate(CHAR_OF_BYTE)))
        if len(word) <= MAX_WORD_CHARS:
            if len(self) == MAX_WORDS:
                self.clear()
            self[word] = token_ids
        return token_ids


class Words:
    def __init__(self, tokenizer: Tokenizer, pattern: str, added: dict[str, int]) -> None:
        self._tokens_of = _TokensOfWord(tokenizer)
        self._words_of = re.compile(PATTERNS[pattern], re.ASCII).findall
        self._added = added
        self._parts_of = re.compile(f"({longest_of(sorted(added)) if added else '(?!)'})").split
        self._first, self._last = _specials(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Of ASCII."""
        part, *others = self._parts_of(text)
        token_ids = self._plain(part)
        for added, part in zip(others[::2], others[1::2], strict=True):
            token_ids += (self._added[added], *self._plain(part))
        return (*self._first, *token_ids, *self._last) if add_special_tokens else tuple(token_ids)

    def _plain(self, part: str) -> list[int]:
        return list(chain.from_iterable(map(self._tokens_of.__getitem__, self._words_of(part))))


def words_of(tokenizer: Tokenizer, file: TokenizerFile) -> Words | None:
    """None: it is of another kind."""
    pattern = _pattern(file.pre_tokenizer or {})
    is_plain_bpe = file.model.type == "BPE" and not file.model.dropout
    keeps_ascii = file.normalizer is None or file.normalizer["type"] == "NFC"
    stand_alone = not any(token.get(key) for token in file.added_tokens for key in ("lstrip", "rstrip", "single_word", "normalized"))
    if not (pattern in PATTERNS and is_plain_bpe and keeps_ascii and stand_alone):
        return None
    contents = [token["content"] for token in file.added_tokens if token["content"]]         # the library may have other ids than the file
    added = {content: number for content in contents if (number := tokenizer.token_to_id(content)) is not None}
    words = Words(tokenizer, pattern, added)
    probes = [(text, add) for text in (*PROBES, " ".join(filter(str.isascii, contents))) for add in (False, True)]
    by_words = [list(words.encode(text, add_special_tokens=add)) for text, add in probes]
    return words if by_words == [tokenizer.encode(text, add_special_tokens=add).ids for text, add in probes] else None


def longest_of(contents: list[str]) -> str:
    """A pattern that finds the longest of them, ascending and distinct, in one pass however many there are."""
    start = os.path.commonprefix(contents)  # noqa: RUF071 - character by character is meant
    tails = [content[len(start) :] for content in contents]
    branches = [longest_of(list(group)) for _, group in groupby(filter(None, tails), key=lambda tail: tail[0])]
    return re.escape(start) + (f"(?:{'|'.join(branches)}){'?' if '' in tails else ''}" if branches else "")


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """Empty: it has none, or does more than to cut by it."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return ""


def _specials(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What comes before any text, and after it; that this can be told at all is for PROBES to say."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:first], whole[first + len(bare) :]
