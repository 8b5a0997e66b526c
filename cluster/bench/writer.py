"""Turns a workload into the bytes of its HTTP requests, all before the clock starts.

    Workload ─> PromptMaker (ids) ─> [Words (text)] ─> CompletionBody | ChatBody ─> bytes

Each run has its own salt and so new prompts of the same lengths: had a server's prefix cache seen them in the run before, the
second rate of a sweep would look better than the first. Another command has another seed, for the same reason.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import msgspec

from .client import Address
from .endpoint import ModelCard
from .errors import PromptError, WorkloadError
from .prompts import PromptMaker, Words, load_tokenizer
from .workload import Workload


class PromptMode(Enum):
    TOKEN_IDS = "token_ids"             # /v1/completions, prompt: [ids]
    TEXT = "text"                       # /v1/completions, prompt: text; needs the tokenizer
    CHAT = "chat"                       # /v1/chat/completions; the model's template adds tokens to the text


@dataclass(frozen=True, slots=True)
class PromptSource:
    mode: PromptMode = PromptMode.TOKEN_IDS
    vocab_size: int | None = None       # None: from /v1/models, else the tokenizer's
    tokenizer: Path | None = None       # folder with tokenizer.json
    seed: int = 0


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = True


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True             # vLLM's and SGLang's extension, and ours: the answer has max_tokens tokens exactly
    stream: bool = True
    stream_options: StreamOptions = StreamOptions()


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    prompt: list[int] | str


class ChatMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "user"


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    messages: list[ChatMessage]


class RequestWriter:
    def __init__(self, address: Address, card: ModelCard, source: PromptSource, headers: tuple[str, ...] = ()) -> None:
        """`headers` are whole lines. Raises PromptError where neither the options nor the endpoint tell what prompts can be made of."""
        self._address, self._card, self._source, self._headers = address, card, source, headers
        self._words = _words(source)
        self._vocab_size = len(self._words) if self._words is not None else _vocab_size(card, source)
        self._path = "/v1/chat/completions" if source.mode is PromptMode.CHAT else "/v1/completions"

    def write(self, workload: Workload, salt: int) -> list[bytes]:
        """One HTTP request per request. Raises WorkloadError where the model's context is too small."""
        self.check_context(workload)
        seed, is_text = (self._source.seed, salt), self._words is not None
        prompts = PromptMaker(self._vocab_size, workload.block_tokens, seed, keep_ends=is_text)
        bodies = (self._body(prompts.token_ids(index, timed), timed.output_tokens) for index, timed in enumerate(workload.requests))
        return [self._address.request("POST", self._path, msgspec.json.encode(body), self._headers) for body in bodies]

    def _body(self, ids: list[int], max_tokens: int) -> GenerateBody:
        if self._words is None:
            return CompletionBody(model=self._card.id, max_tokens=max_tokens, prompt=ids)
        text = self._words.text(ids)
        if self._source.mode is PromptMode.CHAT:
            return ChatBody(model=self._card.id, max_tokens=max_tokens, messages=[ChatMessage(text)])
        return CompletionBody(model=self._card.id, max_tokens=max_tokens, prompt=text)

    def check_context(self, workload: Workload) -> None:
        """Raises WorkloadError."""
        longest, context = workload.longest.total_tokens, self._card.max_model_len
        if context is not None and longest > context:
            raise WorkloadError(
                f"{workload.source}: the longest request has {longest} tokens, {self._card.id!r} takes {context}: "
                f"give --max-context {context} to cut what is longer, and --scale-lengths to shrink all in proportion instead"
            )


def _words(source: PromptSource) -> Words | None:
    if source.mode is PromptMode.TOKEN_IDS:
        return None
    if source.tokenizer is None:
        raise PromptError(f"prompts as {source.mode.value} need --tokenizer FOLDER, to be of the right length")
    return Words.from_folder(source.tokenizer)


def _vocab_size(card: ModelCard, source: PromptSource) -> int:
    size = source.vocab_size or card.vocab_size
    if size is not None:
        return size
    if source.tokenizer is None:
        raise PromptError(f"/v1/models tells no vocab_size of {card.id!r}: give --vocab-size or --tokenizer")
    return load_tokenizer(source.tokenizer).get_vocab_size()
