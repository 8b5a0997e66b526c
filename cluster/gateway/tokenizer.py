"""The text side of a model folder: tokenizer.json, tokenizer_config.json, config.json, generation_config.json. No weights, no torch."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from ...messages.errors import ModelError
from .chat_template import ChatTemplate, load_template
from .detokenizer import Vocabulary
from .words import TokenizerFile, words_of

S = TypeVar("S")

INLINE_CHARS = 4096
"""Of all texts together: about 1 ms of the library's time. More leave the event loop."""

INLINE_WORDS_CHARS = 3 * INLINE_CHARS
"""The same by words that are known; those that are not take what the library takes."""


class _ModelFile(msgspec.Struct):
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int | list[int] | None = None


class _GenerationFile(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class TextModel:
    """Raises ModelError, UnsupportedModel for a folder it cannot use."""

    def __init__(self, folder: Path) -> None:
        config = _read(folder / "config.json", _ModelFile)
        file = _read(folder / "tokenizer.json", TokenizerFile)
        settings = folder / "tokenizer_config.json"
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self._words = words_of(self._tokenizer, file)
        self.vocabulary = Vocabulary(self._tokenizer, file.decoder, file.added_tokens)
        self.template: ChatTemplate | None = load_template(folder, _read(settings, dict[str, Any]) if settings.is_file() else {})
        self.vocab_size = config.vocab_size
        self.num_tokens = 1 + max([*self._tokenizer.get_vocab().values(), *_added_ids(self._tokenizer)], default=-1)     # maybe more
        self.max_position_embeddings = config.max_position_embeddings
        self.eos_token_ids = _eos_token_ids(folder / "generation_config.json", config)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        num_chars = sum(map(len, texts))
        if self._words is not None and num_chars <= INLINE_WORDS_CHARS and all(map(str.isascii, texts)):
            return [self._words.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        if num_chars <= INLINE_CHARS:
            return self._by_library(texts, add_special_tokens)
        return await asyncio.to_thread(self._by_library, texts, add_special_tokens)

    def _by_library(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)     # releases the GIL
        return [tuple(encoding.ids) for encoding in encodings]


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:                # the library raises plain Exception
        raise ModelError(f"{path}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _added_ids(tokenizer: Tokenizer) -> list[int]:
    """What is put around a text, by ids that need not be in the vocabulary."""
    return list(tokenizer.encode("", add_special_tokens=True).ids)


def _eos_token_ids(generation_config: Path, config: _ModelFile) -> tuple[int, ...]:
    ids = _read(generation_config, _GenerationFile).eos_token_id if generation_config.is_file() else None
    ids = config.eos_token_id if ids is None else ids
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(each for each in ids if each < config.vocab_size)           # what the model cannot sample cannot end an answer


def _read(path: Path, into: type[S]) -> S:
    try:
        return msgspec.json.decode(path.read_bytes(), type=into)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: {error}") from None
