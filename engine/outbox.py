"""Tokens on their way out: one message per step and gateway."""

from collections import defaultdict

from ..messages.ids import Address
from ..messages.post import Post
from ..messages.requests import LoadReport, StepTokens, TokenDelta, WorkerRef


class TokenOutbox:
    def __init__(self, worker: WorkerRef, post: Post) -> None:
        self._worker = worker
        self._post = post
        self._deltas: dict[Address, list[TokenDelta]] = defaultdict(list)

    @property
    def has_tokens(self) -> bool:
        return bool(self._deltas)

    def add(self, gateway: Address, delta: TokenDelta) -> None:
        self._deltas[gateway].append(delta)

    def flush(self, load: LoadReport) -> None:
        for gateway, deltas in self._deltas.items():
            self._post.send(gateway, StepTokens(self._worker, tuple(deltas), load))
        self._deltas.clear()
