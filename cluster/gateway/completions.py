"""The JSON of /v1/completions."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .choice import Piece, TextToken
from .detokenizer import Vocabulary
from .dialects import Part, Usage, finite, logprobs_of, text_of
from .jobs import Job


class _Logprobs(Struct):
    """`top_logprobs` holds the chosen token beside the most likely ones, by text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(Struct):
    index: int
    text: str
    logprobs: _Logprobs | None
    finish_reason: str | None


class _Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    service_tier: str
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class CompletionDialect:
    def __init__(self, job: Job, model_name: str, vocabulary: Vocabulary) -> None:
        self._job = job
        self._model_name = model_name
        self._vocabulary = vocabulary
        self._no_usage_yet: UnsetType | None = None if job.include_usage else UNSET

    def chunk(self, index: int, piece: Piece, *, first: bool) -> bytes:
        return self._encode([_Choice(index, piece.text, self._logprobs(piece.tokens), piece.finish)], self._no_usage_yet)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def part(self, piece: Piece) -> Part[_Logprobs]:
        return Part(piece.text, self._logprobs(piece.tokens), piece.finish)

    def whole(self, choices: Sequence[Sequence[Part[_Logprobs]]], usage: Usage) -> bytes:
        return self._encode([self._choice(index, parts) for index, parts in enumerate(choices)], usage)

    def _encode(self, choices: list[_Choice], usage: Usage | UnsetType | None) -> bytes:
        job = self._job
        return msgspec.json.encode(_Completion(job.response_id, job.created, self._model_name, choices, job.service_tier, usage))

    def _choice(self, index: int, parts: Sequence[Part[_Logprobs]]) -> _Choice:
        return _Choice(index, text_of(parts), _joined(logprobs_of(parts)), parts[-1].finish)

    def _logprobs(self, tokens: Sequence[TextToken]) -> _Logprobs | None:
        if self._job.sampling.logprobs is None:
            return None
        return _Logprobs(
            tokens=[self._text(token.token_id) for token in tokens],
            token_logprobs=[None if token.logprobs is None else finite(token.logprobs.logprob) for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )

    def _top(self, token: TextToken) -> dict[str, float] | None:
        if token.logprobs is None:
            return None
        top = {self._text(token_id): finite(logprob) for token_id, logprob in reversed(token.logprobs.top)}      # of equal texts the best
        top.setdefault(self._text(token.token_id), finite(token.logprobs.logprob))
        return dict(sorted(top.items(), key=lambda each: -each[1]))

    def _text(self, token_id: int) -> str:
        return self._vocabulary.raw_bytes(token_id).decode(errors="replace")


def _joined(logprobs: Sequence[_Logprobs]) -> _Logprobs | None:
    if len(logprobs) <= 1:
        return logprobs[0] if logprobs else None
    return _Logprobs(
        tokens=[each for one in logprobs for each in one.tokens],
        token_logprobs=[each for one in logprobs for each in one.token_logprobs],
        top_logprobs=[each for one in logprobs for each in one.top_logprobs],
        text_offset=[each for one in logprobs for each in one.text_offset],
    )
