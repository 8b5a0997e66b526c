"""The JSON of /v1/chat/completions."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .choice import Piece, TextToken
from .detokenizer import Vocabulary
from .dialects import Part, Usage, finite, logprobs_of, text_of
from .jobs import Job


class _TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class _TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_TopLogprob]


class _Logprobs(Struct):
    content: list[_TokenLogprob]
    refusal: None = None


class _Message(Struct):
    role: str
    content: str
    refusal: None = None


class _Delta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _Choice(Struct):
    index: int
    message: _Message
    logprobs: _Logprobs | None
    finish_reason: str | None


class _ChunkChoice(Struct):
    index: int
    delta: _Delta
    logprobs: _Logprobs | None
    finish_reason: str | None


class _Chat(Struct):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    service_tier: str
    usage: Usage
    object: str = "chat.completion"


class _Chunk(Struct):
    id: str
    created: int
    model: str
    choices: list[_ChunkChoice]
    service_tier: str
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class ChatDialect:
    def __init__(self, job: Job, model_name: str, vocabulary: Vocabulary) -> None:
        self._job = job
        self._model_name = model_name
        self._vocabulary = vocabulary
        self._no_usage_yet: UnsetType | None = None if job.include_usage else UNSET

    def chunk(self, index: int, piece: Piece, *, first: bool) -> bytes:
        delta = _Delta("assistant" if first else None, piece.text if first or piece.text else None)
        choice = _ChunkChoice(index, delta, self._logprobs(piece.tokens), piece.finish)
        return self._encode_chunk([choice], self._no_usage_yet)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._encode_chunk([], usage)

    def part(self, piece: Piece) -> Part[_Logprobs]:
        return Part(piece.text, self._logprobs(piece.tokens), piece.finish)

    def whole(self, choices: Sequence[Sequence[Part[_Logprobs]]], usage: Usage) -> bytes:
        job = self._job
        told = [
            _Choice(index, _Message("assistant", text_of(parts)), _joined(logprobs_of(parts)), parts[-1].finish)
            for index, parts in enumerate(choices)
        ]
        return msgspec.json.encode(_Chat(job.response_id, job.created, self._model_name, told, job.service_tier, usage))

    def _encode_chunk(self, choices: list[_ChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        job = self._job
        return msgspec.json.encode(_Chunk(job.response_id, job.created, self._model_name, choices, job.service_tier, usage))

    def _logprobs(self, tokens: Sequence[TextToken]) -> _Logprobs | None:
        if self._job.sampling.logprobs is None:
            return None
        return _Logprobs([self._token(token) for token in tokens])

    def _token(self, token: TextToken) -> _TokenLogprob:
        assert token.logprobs is not None, f"no log-probability for output token {token.token_id}"
        top = [_TopLogprob(*self._entry(token_id, logprob)) for token_id, logprob in token.logprobs.top]
        return _TokenLogprob(*self._entry(token.token_id, token.logprobs.logprob), top)

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        raw = self._vocabulary.raw_bytes(token_id)
        return raw.decode(errors="replace"), finite(logprob), list(raw)


def _joined(logprobs: Sequence[_Logprobs]) -> _Logprobs | None:
    return _Logprobs([each for one in logprobs for each in one.content]) if logprobs else None
