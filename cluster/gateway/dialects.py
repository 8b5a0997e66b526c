"""What the two APIs share: usage, and the interface between an answer (which knows tokens) and its form (which knows JSON)."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from ...messages.requests import FinishReason
from .choice import Piece

L = TypeVar("L")

LOWEST_LOGPROB = -9999.0


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Part(NamedTuple, Generic[L]):
    """A piece of an answer that is not streamed. Its log-probabilities take their form when it comes: those of a whole answer at its end
    would hold up all other clients."""

    text: str
    logprobs: L | None                        # as the dialect has them; None: not asked for
    finish: FinishReason | None


class Dialect(Protocol[L]):
    """Everything is JSON bytes. A chunk is one object of a stream; a whole is the answer that is not streamed."""

    def chunk(self, index: int, piece: Piece, *, first: bool) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def part(self, piece: Piece) -> Part[L]: ...

    def whole(self, choices: Sequence[Sequence[Part[L]]], usage: Usage) -> bytes:
        """`choices[i]` is all of choice i."""
        ...


def text_of(parts: Sequence[Part[L]]) -> str:
    return "".join(part.text for part in parts)


def logprobs_of(parts: Sequence[Part[L]]) -> list[L]:
    return [part.logprobs for part in parts if part.logprobs is not None]


def finite(logprob: float) -> float:
    """JSON has no −∞."""
    return max(LOWEST_LOGPROB, logprob)
