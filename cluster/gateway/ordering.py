"""Token deltas of one attempt, in whatever order and number they come → each token once, in order.

Token 1, from the decode worker, may overtake token 0, from the prefill worker; a message may be doubled or overlap another.
"""

from collections.abc import Iterator

from ...messages.errors import Malformed
from ...messages.requests import TokenDelta

MAX_GAP_DELTAS = 256
"""Deltas held for one that is missing. Only token 0 can be overtaken for long, by as many steps as a message may be late."""


class InOrder:
    __slots__ = ("_early", "_ended", "_next")

    def __init__(self, next_index: int) -> None:
        self._next = next_index
        self._early: dict[int, TokenDelta] = {}       # by index
        self._ended = False

    @property
    def next_index(self) -> int:
        return self._next

    def push(self, delta: TokenDelta) -> list[TokenDelta]:
        """What can be delivered now. Raises Malformed for a gap that will not close."""
        index, token_ids, finish = delta.index, delta.token_ids, delta.finish
        if index == self._next and not self._early and not self._ended:         # nearly always
            self._next, self._ended = index + len(token_ids), finish is not None
            return [delta] if token_ids or finish is not None else []
        held = self._early.get(delta.index)
        if held is None or len(held.token_ids) <= len(delta.token_ids):
            self._early[delta.index] = delta
        ready = list(self._ready())
        if len(self._early) > MAX_GAP_DELTAS:
            raise Malformed(f"token {self._next} is missing while {len(self._early)} later deltas are here")
        return ready

    def _ready(self) -> Iterator[TokenDelta]:
        for index in sorted(self._early):
            if index > self._next:
                return
            delta = self._early.pop(index)
            num_repeated = self._next - index
            if self._ended or num_repeated > len(delta.token_ids) or (num_repeated == len(delta.token_ids) and delta.finish is None):
                continue
            self._accept(delta)
            yield _without_head(delta, num_repeated)

    def _accept(self, delta: TokenDelta) -> None:
        self._ended = delta.finish is not None
        self._next = delta.index + len(delta.token_ids)


def _without_head(delta: TokenDelta, num_repeated: int) -> TokenDelta:
    if num_repeated == 0:
        return delta
    return TokenDelta(
        request_id=delta.request_id,
        index=delta.index + num_repeated,
        token_ids=delta.token_ids[num_repeated:],
        finish=delta.finish,
        logprobs=delta.logprobs[num_repeated:],
    )
