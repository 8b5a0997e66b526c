"""What the two APIs share: usage, and the interface between an answer (which knows tokens) and its form (which knows JSON)."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from .choice import Piece

LOWEST_LOGPROB = -9999.0


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Dialect(Protocol):
    """Everything is JSON bytes. A chunk is one object of a stream; a whole is the answer that is not streamed."""

    def chunk(self, index: int, piece: Piece, *, first: bool) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """`pieces[i]` is all of choice i."""
        ...


def finite(logprob: float) -> float:
    """JSON has no −∞."""
    return max(LOWEST_LOGPROB, logprob)
