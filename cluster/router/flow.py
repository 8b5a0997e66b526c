"""How much is sent to a pool lately, as one gateway sees it of itself."""

import math

HORIZON_S = 1.0


class Flow:
    """Tokens of prompts over the last second, forgotten exponentially."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._squares = 0.0                   # the same of their squares
        self._at = 0.0

    def add(self, num_tokens: int, now: float) -> None:
        kept = self._kept(now)
        self._rate = self._rate * kept + num_tokens / HORIZON_S
        self._squares = self._squares * kept + num_tokens * num_tokens / HORIZON_S
        self._at = now

    def per_s(self, now: float) -> float:
        return self._rate * self._kept(now)

    @property
    def tokens_each(self) -> float:
        """Mean of squares by mean."""
        return self._squares / self._rate if self._rate else 0.0

    def _kept(self, now: float) -> float:
        return math.exp((self._at - now) / HORIZON_S) if now > self._at else 1.0
