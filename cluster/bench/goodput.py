"""DistServe's goodput: the highest request rate at which at least `target` of the requests meet TTFT and TPOT both; pure.

    BRACKETING ── a rate passed and a higher one failed ──> BISECTING ── (failing − passing) <= resolution ──> FOUND
        ├── nothing passes down to the lowest rate ───────────────────────────────────────────────────────────> BELOW
        ├── nothing fails up to the highest rate ─────────────────────────────────────────────────────────────> ABOVE
        └── nothing fails as far as the workload reaches ─────────────────────────────────────────────────────> TOO_SHORT

`next_probe()` says which rate to try with how many requests; `observe()` takes the outcome. When is one rate decided? When
Wilson's 95 % interval of its attainment lies wholly on one side of the target, or is narrower than ± `half_width` and than half
of what the target leaves (then the share itself decides), or there are no more requests. Until then the same rate is tried
again, from an idle system, with twice the requests. Never fewer than make `min_probe_s` of load: an overloaded server looks
well until its queue has grown. So no rate is tried at which the whole workload is over sooner.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from .errors import WorkloadError
from .report import Attainment

MAX_DOUBLINGS, MAX_HALVINGS = 12, 4   # of the start rate; a probe at a low rate takes long: 40 requests at 1/16 per second 11 minutes


class Phase(Enum):
    BRACKETING = "bracketing"
    BISECTING = "bisecting"
    FOUND = "found"
    BELOW = "below"                     # even the lowest rate tried misses the target
    ABOVE = "above"                     # even the highest rate tried reaches it
    TOO_SHORT = "too_short"             # so does the highest at which the workload lasts `min_probe_s`


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.BRACKETING: frozenset({Phase.BISECTING, Phase.FOUND, Phase.BELOW, Phase.ABOVE, Phase.TOO_SHORT}),
    Phase.BISECTING: frozenset({Phase.FOUND}),
    Phase.FOUND: frozenset(),
    Phase.BELOW: frozenset(),
    Phase.ABOVE: frozenset(),
    Phase.TOO_SHORT: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SearchPlan:
    start_rate: float                   # requests/s, the first one tried, if the workload reaches so far
    max_requests: int                   # of one probe: what the workload has
    target: float = 0.9                 # attainment asked for
    half_width: float = 0.03            # of Wilson's interval, at which a share near the target is taken as it is
    resolution: float = 0.05            # of the rate: FOUND when failing/passing <= 1 + resolution
    min_requests: int = 40              # all of 40 are surely over 0.9, all of 30 are not
    min_probe_s: float = 20.0

    def __post_init__(self) -> None:
        in_order = 0 < self.target < 1 and 0 < self.half_width < 0.5 and self.resolution > 0 and self.min_requests >= 1
        if not (in_order and 0 < self.start_rate < math.inf and self.max_requests >= 1 and 0 <= self.min_probe_s < math.inf):
            raise WorkloadError(f"a goodput search cannot be made with {self}")

    @property
    def highest_rate(self) -> float:
        """At which the workload lasts `min_probe_s`."""
        return self.max_requests / self.min_probe_s if self.min_probe_s else math.inf

    def requests_at(self, rate: float) -> int:
        """Of the shortest probe; more than there are above `highest_rate`."""
        return max(self.min_requests, math.ceil(rate * self.min_probe_s))


@dataclass(frozen=True, slots=True)
class Probe:
    rate: float                         # requests/s
    num_requests: int


@dataclass(frozen=True, slots=True)
class Decided:
    """One rate and what was found there."""

    rate: float
    attainment: Attainment
    passed: bool


@dataclass(frozen=True, slots=True)
class GoodputResult:
    phase: Phase
    rate: float                         # requests/s; the highest that passed, 0 if none did
    rate_low: float                     # the highest rate whose whole interval is at or over the target, 0 if none
    rate_high: float | None             # the lowest rate whose whole interval is under it, None if none
    decided: tuple[Decided, ...]        # by rate
    requests_needed: int | None         # TOO_SHORT: by a probe at twice `rate`


@dataclass
class GoodputSearch:
    plan: SearchPlan
    phase: Phase = Phase.BRACKETING
    _passing: float | None = None       # highest rate that passed
    _failing: float | None = None       # lowest rate that failed
    _start_rate: float = field(init=False)
    _probe: Probe = field(init=False)
    _decided: list[Decided] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start_rate = min(self.plan.start_rate, self.plan.highest_rate)
        self._probe = self._first_probe(self._start_rate)

    def next_probe(self) -> Probe | None:
        """None when the search has ended."""
        return None if not TRANSITIONS[self.phase] else self._probe

    def observe(self, attainment: Attainment) -> None:
        """The outcome of `next_probe()`."""
        assert TRANSITIONS[self.phase], f"observed a probe after the search ended as {self.phase.value}"
        verdict = self._verdict(attainment)
        if verdict is None:
            self._probe = Probe(self._probe.rate, min(2 * self._probe.num_requests, self.plan.max_requests))
            return
        self._decided.append(Decided(self._probe.rate, attainment, verdict))
        if verdict:
            self._passing = self._probe.rate
        else:
            self._failing = self._probe.rate
        self._advance()

    def result(self) -> GoodputResult:
        """Good at any time: what is known so far."""
        target = self.plan.target
        surely_passed = [decided.rate for decided in self._decided if decided.attainment.low >= target]
        surely_failed = [decided.rate for decided in self._decided if decided.attainment.high < target]
        return GoodputResult(
            phase=self.phase,
            rate=self._passing or 0.0,
            rate_low=max(surely_passed, default=0.0),
            rate_high=min(surely_failed, default=None),
            decided=tuple(sorted(self._decided, key=lambda decided: decided.rate)),
            requests_needed=self.plan.requests_at(2 * self._probe.rate) if self.phase is Phase.TOO_SHORT else None,
        )

    def _verdict(self, attainment: Attainment) -> bool | None:
        plan = self.plan
        clear = attainment.low >= plan.target or attainment.high < plan.target
        narrow = attainment.high - attainment.low <= 2 * min(plan.half_width, (1 - plan.target) / 2)
        exhausted = self._probe.num_requests >= plan.max_requests
        return attainment.share >= plan.target if clear or narrow or exhausted else None

    def _advance(self) -> None:
        passing, failing, rate = self._passing, self._failing, self._probe.rate
        if passing is not None and failing is not None:
            self._move(Phase.FOUND if failing <= passing * (1 + self.plan.resolution) else Phase.BISECTING)
            self._probe = self._first_probe((passing + failing) / 2)
        elif failing is not None:
            self._bracket(rate / 2, Phase.BELOW, ended=rate <= self._start_rate / 2**MAX_HALVINGS)
        elif rate >= self.plan.highest_rate:
            self._move(Phase.TOO_SHORT)
        else:
            self._bracket(min(2 * rate, self.plan.highest_rate), Phase.ABOVE, ended=rate >= self._start_rate * 2**MAX_DOUBLINGS)

    def _bracket(self, rate: float, end: Phase, *, ended: bool) -> None:
        if ended:
            self._move(end)
        self._probe = self._first_probe(rate)

    def _move(self, phase: Phase) -> None:
        if phase is not self.phase:
            assert phase in TRANSITIONS[self.phase], f"{self.phase.value} -> {phase.value}"
            self.phase = phase

    def _first_probe(self, rate: float) -> Probe:
        return Probe(rate, min(self.plan.requests_at(rate), self.plan.max_requests))
