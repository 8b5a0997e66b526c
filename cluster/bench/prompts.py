"""Prompts of an exact token length that hold nothing but seeded noise.

    TimedRequest ─> PromptMaker.token_ids(index, request) ─> [ids]          mode token_ids: sent as they are
                                                       └──> Words.text()    modes text and chat: one word per id

Block b of the workload is the same tokens in every request that names it, and nowhere else; what follows the blocks belongs to
the request alone. Ids come from the middle of the vocabulary: special tokens sit at its ends.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .errors import PromptError
from .workload import TimedRequest

MAX_WORDS = 4096
_OWN_STREAM, _BLOCK_STREAM = 0, 1       # keep the noise of request 3 apart from that of block 3
_WORD = re.compile(r"^[Ġ▁][A-Za-z]{2,}$")


class PromptMaker:
    def __init__(self, vocab_size: int, block_tokens: int, seed: tuple[int, ...], *, keep_ends: bool = False) -> None:
        """`keep_ends`: every id of [0, vocab_size) may come (they number words, not tokens of a model)."""
        margin = 0 if keep_ends else vocab_size // 10
        self._low, self._high = margin, vocab_size - margin
        if self._high - self._low < 2:
            raise PromptError(f"a vocabulary of {vocab_size} leaves {self._high - self._low} ids to make prompts of")
        self._block_tokens, self._seed = block_tokens, seed
        self._block = lru_cache(maxsize=4096)(lambda block_id: self._noise(_BLOCK_STREAM, block_id, self._block_tokens))

    def token_ids(self, index: int, request: TimedRequest) -> list[int]:
        """Exactly `request.prompt_tokens` ids; `index` numbers the request within its workload."""
        ids = [token for block_id in request.block_ids for token in self._block(block_id)]
        missing = request.prompt_tokens - len(ids)
        return ids + self._noise(_OWN_STREAM, index, missing) if missing > 0 else ids[: request.prompt_tokens]

    def _noise(self, stream: int, number: int, count: int) -> list[int]:
        random = np.random.default_rng((*self._seed, stream, number))
        return random.integers(self._low, self._high, count).tolist()   # type: ignore[no-any-return]


class Words:
    """The words of a tokenizer that are one token each wherever they stand, so that a text has as many tokens as we say."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._num_special = len(tokenizer.encode("").ids)           # what the server will add, such as a BOS token
        candidates = (" " + token[1:] for token in sorted(tokenizer.get_vocab()) if _WORD.match(token))
        whole = (word for word in candidates if self._count(word * 6) - self._count(word * 3) == 3)
        self._words = list(islice(whole, MAX_WORDS))
        if len(self._words) < 2:
            raise PromptError(f"{source}: {len(self._words)} words that are one token each, too few to make texts of")

    def __len__(self) -> int:
        return len(self._words)

    @classmethod
    def from_folder(cls, folder: Path) -> "Words":
        return cls(load_tokenizer(folder), str(folder))

    def text(self, word_ids: Sequence[int]) -> str:
        """A text of len(word_ids) tokens, the tokenizer's own special tokens included; never shorter than one word."""
        words = [self._words[number] for number in word_ids]
        wanted = max(1, len(words) - self._num_special)
        text = "".join(words[:wanted])
        if (surplus := self._count(text) - wanted) > 0:             # a tokenizer that makes a token of the first space
            text = "".join(words[: wanted - surplus]) or words[0]
        if self._count(text) != wanted and wanted > 1:
            raise PromptError(f"{self._source}: a text of {wanted} tokens came out as {self._count(text)}")
        return text

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:          # the binding raises bare Exception for a missing and for a broken file
        raise PromptError(f"{path}: cannot be read as a tokenizer: {error}") from error
