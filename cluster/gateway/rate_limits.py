"""So many requests and tokens a minute for each API key. Pure, with a clock.

    admit(key, tokens) ──► both buckets hold enough: taken, and what is left is told
                           one does not: nothing is taken, RateLimited with the time until it would
    give_back ───────────► when the request has ended: what it did not use; where it used more than was taken, the key owes

A bucket holds one minute's worth and fills evenly (a token bucket). Tokens are counted when they are asked for: the prompt's, and the most
that may come. Where the client leaves that open, `guess` says how many are taken until it is known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import Struct

from .errors import RateLimited
from .response_head import Headers

MINUTE_S = 60.0
OPEN_SHARE = 0.25
"""Of a minute's tokens: so many, beside the prompt, are taken at most for a choice whose length the client leaves open. If more come, the
key owes them: on the mean it gets what it may, though not in each minute."""


class RateLimits(Struct, frozen=True):
    """Of one key in one gateway; None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


@dataclass
class Bucket:
    per_minute: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / MINUTE_S)
        self.at = now

    @property
    def left(self) -> int:
        """0 where the key owes."""
        return max(0, int(self.level))

    def wait_s(self, amount: float) -> float:
        """Until it holds `amount`; infinite if it never does."""
        if amount > self.per_minute:
            return math.inf
        return max(0.0, amount - self.level) * MINUTE_S / self.per_minute

    def headers(self, name: str) -> Headers:
        reset_s = (self.per_minute - self.level) * MINUTE_S / self.per_minute
        return (
            (f"x-ratelimit-limit-{name}", str(int(self.per_minute))),
            (f"x-ratelimit-remaining-{name}", str(self.left)),
            (f"x-ratelimit-reset-{name}", f"{reset_s:.3f}s"),
        )


class RateLimiter:
    """Keys are known: there are as many buckets as the deployment has keys."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float]) -> None:
        rates = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._rates = {name: rate for name, rate in rates.items() if rate is not None}
        self._clock = clock
        self._buckets: dict[bytes, dict[str, Bucket]] = {}

    def guess(self, least: int, most: int, num_choices: int) -> int:
        """How many tokens to take for a request that will use `least` (its prompts) to `most` of them."""
        rate = self._rates.get("tokens", math.inf)
        room = min(most - least, num_choices * OPEN_SHARE * rate, rate - least)
        return least + max(0, int(room))

    def admit(self, key: bytes, num_requests: int, num_tokens: int) -> Headers:
        """For the answer. Raises RateLimited."""
        if not self._rates:
            return ()
        now = self._clock()
        buckets = self._buckets.setdefault(key, {name: Bucket(rate, rate, now) for name, rate in self._rates.items()})
        wanted = {"requests": num_requests, "tokens": num_tokens}
        for bucket in buckets.values():
            bucket.refill(now)
        waits_s = {name: bucket.wait_s(wanted[name]) for name, bucket in buckets.items()}
        worst = max(waits_s, key=lambda name: waits_s[name], default=None)
        if worst is not None and waits_s[worst] > 0:
            raise RateLimited(_text(worst, wanted[worst], buckets[worst]), waits_s[worst], _headers(buckets))
        for name, bucket in buckets.items():
            bucket.level -= wanted[name]
        return _headers(buckets)

    def give_back(self, key: bytes, num_requests: int, num_tokens: int) -> None:
        """Of what was admitted. Fewer than no tokens: so many more were used."""
        for name, bucket in self._buckets.get(key, {}).items():
            bucket.refill(self._clock())
            bucket.level = min(bucket.per_minute, bucket.level + {"requests": num_requests, "tokens": num_tokens}[name])

    def headers(self, key: bytes) -> Headers:
        """For an answer, as of the last that was taken or given back."""
        return _headers(self._buckets.get(key, {}))


def _headers(buckets: dict[str, Bucket]) -> Headers:
    return tuple(header for name, bucket in buckets.items() for header in bucket.headers(name))


def _text(name: str, wanted: int, bucket: Bucket) -> str:
    return f"{wanted} {name} are asked for, {bucket.left} of {bucket.per_minute:g} a minute are left to this key"
