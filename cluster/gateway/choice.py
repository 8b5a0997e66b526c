"""The text of one choice: token deltas in, pieces of text out, each with the tokens it is made of.

    TokenDelta ── bytes ──► Utf8Stream ── characters ──► StopMatcher ── what may go out ──► Piece

A token's log-probabilities go out with its text: what a stop string cuts off, it cuts off there too.
"""

from collections import deque
from itertools import zip_longest
from typing import Protocol

from msgspec import Struct

from ...messages.requests import FinishReason, TokenDelta, TokenLogprobs
from .detokenizer import Utf8Stream, Vocabulary
from .jobs import Job, JobPrompt
from .stops import StopMatcher


class TextToken(Struct, frozen=True):
    offset: int                               # of its text in the choice's text, characters
    token_id: int
    logprobs: TokenLogprobs | None


class Piece(Struct, frozen=True):
    text: str
    tokens: tuple[TextToken, ...]
    finish: FinishReason | None


class Choice(Protocol):
    num_tokens: int
    finish: FinishReason | None

    def push(self, deltas: list[TokenDelta]) -> Piece:
        """After the end, nothing more comes out."""
        ...


def make_choice(job: Job, prompt: JobPrompt, vocabulary: Vocabulary) -> Choice:
    is_plain = not (job.stops or job.echo or job.sampling.logprobs is not None)
    return PlainChoice(job.include_stop, vocabulary) if is_plain else FullChoice(job, prompt, vocabulary)


class PlainChoice:
    """Nothing can end the text but its last token: all bytes are decoded at once."""

    __slots__ = ("_include_stop", "_token_bytes", "_utf8", "finish", "num_tokens")

    def __init__(self, include_stop: bool, vocabulary: Vocabulary) -> None:
        self._include_stop = include_stop
        self._token_bytes = vocabulary.token_bytes
        self._utf8 = Utf8Stream()
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def push(self, deltas: list[TokenDelta]) -> Piece:
        if self.finish is not None or not deltas:
            return Piece("", (), self.finish)
        token_ids = deltas[0].token_ids if len(deltas) == 1 else tuple([each for delta in deltas for each in delta.token_ids])
        self.num_tokens += len(token_ids)
        finish = deltas[-1].finish
        if finish is None:
            return Piece(self._utf8.feed(b"".join(map(self._token_bytes, token_ids))), (), None)
        self.finish = finish
        if finish is FinishReason.STOP and not self._include_stop and deltas[-1].token_ids:
            token_ids = token_ids[:-1]
        return Piece(self._utf8.feed(b"".join(map(self._token_bytes, token_ids))) + self._utf8.end(), (), finish)


class FullChoice:
    def __init__(self, job: Job, prompt: JobPrompt, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._wants_tokens = job.sampling.logprobs is not None
        self._min_tokens = job.sampling.min_tokens
        self._include_stop = job.include_stop
        self._echo = prompt if job.echo else None
        self._utf8 = Utf8Stream()
        self._stops = StopMatcher(job.stops, include=job.include_stop)
        self._waiting: deque[TextToken] = deque()
        self._num_decoded = 0                 # characters, of which
        self._num_released = 0                # are out
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def push(self, deltas: list[TokenDelta]) -> Piece:
        text = "".join(self._push(delta) for delta in deltas)
        self._num_released += len(text)
        tokens = []
        while self._waiting and (self._waiting[0].offset < self._num_released or self._all_out()):
            tokens.append(self._waiting.popleft())
        return Piece(text, tuple(tokens), self.finish)

    def _all_out(self) -> bool:
        return self.finish is not None and not self._stops.matched

    def _push(self, delta: TokenDelta) -> str:
        text = self._echoed(delta.prompt_logprobs)
        for i, token_id in enumerate(delta.token_ids):
            if self.finish is not None:
                return text
            is_stop_token = delta.finish is FinishReason.STOP and i == len(delta.token_ids) - 1
            text += self._push_token(token_id, delta.logprobs[i] if delta.logprobs else None, is_stop_token)
        if delta.finish is not None and self.finish is None:
            text += self._end(delta.finish)
        return text

    def _echoed(self, logprobs: tuple[TokenLogprobs, ...]) -> str:
        """The prompt, once, before all else. Its first token has no log-probability: nothing came before it."""
        prompt, self._echo = self._echo, None
        if prompt is None:
            return ""
        text = self._vocabulary.text(prompt.token_ids) if prompt.text is None else prompt.text
        if self._wants_tokens:
            utf8, end = Utf8Stream(), 0
            for token_id, each in zip_longest(prompt.token_ids, (None, *logprobs)):
                self._waiting.append(TextToken(min(end, len(text)), token_id, each))
                end += len(utf8.feed(self._vocabulary.token_bytes(token_id)))
        self._num_decoded = len(text)
        return text

    def _push_token(self, token_id: int, logprobs: TokenLogprobs | None, is_stop_token: bool) -> str:
        self.num_tokens += 1
        if is_stop_token and not self._include_stop:
            return ""
        if self._wants_tokens:
            self._waiting.append(TextToken(self._num_decoded, token_id, logprobs))
        return self._decoded(self._utf8.feed(self._vocabulary.token_bytes(token_id)))

    def _end(self, finish: FinishReason) -> str:
        text = self._decoded(self._utf8.end())
        if self.finish is None:               # the last characters may complete a stop string
            self.finish = finish
            text += self._stops.end()
        return text

    def _decoded(self, text: str) -> str:
        self._num_decoded += len(text)
        released = self._stops.feed(text, may_match=self.num_tokens > self._min_tokens)
        if self._stops.matched:
            self.finish = FinishReason.STOP
        return released
