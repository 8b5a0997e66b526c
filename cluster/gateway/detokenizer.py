"""Tokens → text, one at a time, at a cost that does not grow with the text.

A token is a string of bytes, which may end inside a character. So each token is turned into its bytes (a table, filled as tokens are
met) and an incremental UTF-8 decoder holds back what is incomplete: U+FFFD appears only for bytes that can never become a character.

Two kinds of decoder cover the served models: byte-level BPE (Llama 3, Qwen, Mistral's newer), and SentencePiece-like pieces with "▁" for a
space and `<0x0A>` for a byte (Llama 2, Mistral's older). Any other is refused by name.
"""

import codecs
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from ...messages.errors import UnsupportedModel

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, every other byte for a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class _TokenBytes(dict[int, bytes]):
    """A table that is filled as tokens are met."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> bytes:
        known = self[token_id] = self._bytes_of(token_id)
        return known


class Vocabulary:
    """Each token's bytes. `decoder` and `added_tokens` are as tokenizer.json has them. Raises UnsupportedModel."""

    def __init__(self, tokenizer: Tokenizer, decoder: dict[str, Any] | None, added_tokens: list[dict[str, Any]]) -> None:
        self._tokenizer = tokenizer
        self._byte_level = _is_byte_level(decoder)
        added = [(tokenizer.token_to_id(token["content"]), token) for token in added_tokens]     # the file may have other ids
        self._added: dict[int, str] = {number: token["content"] for number, token in added if number is not None}
        self.special_ids = frozenset(number for number, token in added if number is not None and token["special"])
        self.token_bytes: Callable[[int], bytes] = _TokenBytes(self._added_bytes).__getitem__
        """What a token adds to an answer."""

    def _added_bytes(self, token_id: int) -> bytes:
        """Nothing if it is special, or no token at all (a padded row of the embedding)."""
        return b"" if token_id in self.special_ids else self.raw_bytes(token_id)

    def raw_bytes(self, token_id: int) -> bytes:
        """The same, but special tokens have their names."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        return _byte_level_bytes(piece) if self._byte_level else _piece_bytes(piece)

    def text(self, token_ids: tuple[int, ...] | list[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


class Utf8Stream:
    """Bytes in, whole characters out."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""                      # of a character that is not whole

    def feed(self, chunk: bytes) -> str:
        seen = self._held + chunk
        text, num_used = codecs.utf_8_decode(seen, "replace", False)
        self._held = seen[num_used:]
        return text

    def end(self) -> str:
        """What was held back will not become a character any more."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        raise UnsupportedModel("tokenizer.json: a tokenizer without a decoder is not supported")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return True
    if not kinds <= _PIECE_DECODERS or not kinds & {"Replace", "Metaspace"}:
        raise UnsupportedModel(f"tokenizer.json: decoder {' + '.join(sorted(kinds))} is not supported")
    return False


def _byte_level_bytes(piece: str) -> bytes:
    return bytes(BYTE_OF_CHAR[char] for char in piece) if all(char in BYTE_OF_CHAR for char in piece) else piece.encode()


def _piece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
