"""Which policy keeps most promises? Attainment over rate, and the highest rate at which enough of them are kept.

    Case (workload, objectives, rates) × Contender (plant, policy) ──► Point at each rate, rising, until attainment is hopeless
                                                                        └──► goodput: where the curve crosses the target

The same requests in the same order at every rate and for every contender: what differs is the contender.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ..cluster.bench.report import Attainment
from ..cluster.bench.workload import Workload
from ..cluster.router.policy import Objectives
from .cluster import Simulation
from .outcome import Outcome
from .settings import Plant

TARGET = 0.9
HOPELESS = 0.6
NUM_BATCHES = 10


@dataclass(frozen=True)
class Case:
    name: str
    workload: Workload
    objectives: Objectives
    rates: tuple[float, ...]                  # requests/s of the whole cluster, rising
    warm_s: float = 2.0                       # requests that arrive before are served and not counted


@dataclass(frozen=True)
class Contender:
    num_prefill: int
    num_decode: int
    policy: str
    decode_step_tokens: int = 2048            # what a decode worker's steps hold: its own decodes, then chunks of prompts
    num_gateways: int = 4
    machine: str = "vllm-h200"

    @property
    def name(self) -> str:
        plant = f"{self.num_prefill}P+{self.num_decode}D" if self.num_prefill else f"{self.num_decode} colocated"
        return f"{self.policy}, {plant}"


class Point(msgspec.Struct, frozen=True):
    """One run."""

    case: str
    contender: str
    rate: float
    attainment: Attainment                    # its interval takes batches of arrivals as independent, not requests
    refused: float                            # shares of the counted requests
    late_ttft: float
    late_tpot: float
    local: float
    ttft_ms: tuple[float, float]              # p50, p90 of what was served
    tpot_ms: tuple[float, float]
    decided_ms: float                         # the slowest refusal, after its arrival

    @property
    def good_rate(self) -> float:
        """Requests per second that kept both promises."""
        return self.rate * self.attainment.share


class Goodput(msgspec.Struct, frozen=True):
    """Requests/s at which attainment falls through TARGET, and where the ends of its interval do."""

    rate: float
    low: float
    high: float


def run(case: Case, contender: Contender, rate: float) -> Point:
    plant = Plant(
        contender.num_prefill,
        contender.num_decode,
        contender.policy,
        case.objectives,
        contender.num_gateways,
        decode_step_tokens=contender.decode_step_tokens,
    )
    outcomes = Simulation(plant.on(contender.machine), case.workload.at_rate(rate)).run()
    return summarize(case, contender, rate, [outcome for outcome in outcomes if outcome.arrived_s >= case.warm_s])


def curve(case: Case, contender: Contender, observe: Callable[[Point], None]) -> list[Point]:
    """Rates beyond the first hopeless one are left out."""
    points = []
    for rate in case.rates:
        points.append(run(case, contender, rate))
        observe(points[-1])
        if points[-1].attainment.share < HOPELESS:
            break
    return points


def summarize(case: Case, contender: Contender, rate: float, outcomes: Sequence[Outcome]) -> Point:
    slo, total = case.objectives, max(1, len(outcomes))
    ttft_s = sorted(outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None)
    tpot_s = sorted(outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None)
    refusals_s = [(outcome.decided_s or 0.0) - outcome.arrived_s for outcome in outcomes if outcome.refused]
    return Point(
        case=case.name,
        contender=contender.name,
        rate=rate,
        attainment=batch_attainment([outcome.meets(slo) for outcome in outcomes]),
        refused=len(refusals_s) / total,
        late_ttft=sum(slo.ttft_s is not None and each > slo.ttft_s for each in ttft_s) / total,
        late_tpot=sum(slo.tpot_s is not None and each > slo.tpot_s for each in tpot_s) / total,
        local=sum(outcome.local for outcome in outcomes) / total,
        ttft_ms=(_quantile(ttft_s, 0.5) * 1e3, _quantile(ttft_s, 0.9) * 1e3),
        tpot_ms=(_quantile(tpot_s, 0.5) * 1e3, _quantile(tpot_s, 0.9) * 1e3),
        decided_ms=max(refusals_s, default=0.0) * 1e3,
    )


def batch_attainment(met: Sequence[bool]) -> Attainment:
    """The method of batch means: requests that come together fare alike, so batches of neighbours are what is independent."""
    size = max(1, len(met) // NUM_BATCHES)
    shares = [sum(met[i : i + size]) / size for i in range(0, size * (len(met) // size), size)]
    share = sum(met) / max(1, len(met))
    if len(shares) < 2:
        return Attainment.of(sum(met), len(met))
    spread = math.sqrt(sum((each - share) ** 2 for each in shares) / (len(shares) - 1) / len(shares))
    reach = max(STUDENT_T_95 * spread, share - Attainment.of(sum(met), len(met)).low if share in (0.0, 1.0) else 0.0)
    return Attainment(sum(met), len(met), share, max(0.0, share - reach), min(1.0, share + reach))


STUDENT_T_95 = 2.262
"""Of NUM_BATCHES − 1 = 9 degrees of freedom."""


def goodput_of(points: Sequence[Point]) -> Goodput:
    def crossing(share: Callable[[Attainment], float]) -> float:
        return crossing_rate([(point.rate, share(point.attainment)) for point in points])

    return Goodput(crossing(lambda each: each.share), crossing(lambda each: each.low), crossing(lambda each: each.high))


def crossing_rate(points: Iterable[tuple[float, float]], target: float = TARGET) -> float:
    """Linear between the last rate that keeps the target and the next; 0 if none keeps it, the highest tried if all do."""
    before: tuple[float, float] | None = None
    for rate, share in points:
        if share < target:
            if before is None:
                return 0.0
            return before[0] + (rate - before[0]) * (before[1] - target) / (before[1] - share)
        before = rate, share
    return before[0] if before else 0.0


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
