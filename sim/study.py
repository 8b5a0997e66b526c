"""Which policy keeps most promises? Attainment over rate, and the highest rate at which enough of them are kept.

    Case (stretches, objectives, rates) × Contender (plant, policy) ──► Point at each rate, rising, until attainment is hopeless
                                                                        └──► goodput: where the curve crosses the target

The same requests in the same order at every rate and for every contender: what differs is the contender. So two are compared batch by
batch (`lead`): how hard a stretch of the workload is for both drops out.
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
    stretches: tuple[Workload, ...]           # each on a cluster of its own, counted together
    objectives: Objectives
    rates: tuple[float, ...]                  # requests/s of the whole cluster, rising
    warm_s: float = 2.0                       # of each stretch: requests that arrive before are served and not counted


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
    """One rate."""

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
    batches: tuple[float, ...] = ()           # shares that kept both, of NUM_BATCHES of neighbouring arrivals

    @property
    def good_rate(self) -> float:
        """Requests per second that kept both promises."""
        return self.rate * self.attainment.share


class Lead(msgspec.Struct, frozen=True):
    """Of one point over another in the share that kept both, with its 95 % interval: batches in pairs."""

    share: float
    low: float
    high: float


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
    outcomes: list[Outcome] = []
    for stretch in case.stretches:
        of_all = Simulation(plant.on(contender.machine), stretch.at_rate(rate)).run()
        outcomes += [outcome for outcome in of_all if outcome.arrived_s >= case.warm_s]
    return summarize(case, contender, rate, outcomes)


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
    met = [outcome.meets(slo) for outcome in outcomes]
    return Point(
        case=case.name,
        contender=contender.name,
        rate=rate,
        attainment=batch_attainment(met),
        refused=len(refusals_s) / total,
        late_ttft=sum(slo.ttft_s is not None and each > slo.ttft_s for each in ttft_s) / total,
        late_tpot=sum(slo.tpot_s is not None and each > slo.tpot_s for each in tpot_s) / total,
        local=sum(outcome.local for outcome in outcomes) / total,
        ttft_ms=(_quantile(ttft_s, 0.5) * 1e3, _quantile(ttft_s, 0.9) * 1e3),
        tpot_ms=(_quantile(tpot_s, 0.5) * 1e3, _quantile(tpot_s, 0.9) * 1e3),
        decided_ms=max(refusals_s, default=0.0) * 1e3,
        batches=tuple(batch_shares(met)),
    )


def batch_attainment(met: Sequence[bool]) -> Attainment:
    """The method of batch means: requests that come together fare alike, so batches of neighbours are what is independent."""
    share, shares = sum(met) / max(1, len(met)), batch_shares(met)
    if len(shares) < 2:
        return Attainment.of(sum(met), len(met))
    reach = max(_reach(shares, share), share - Attainment.of(sum(met), len(met)).low if share in (0.0, 1.0) else 0.0)
    return Attainment(sum(met), len(met), share, max(0.0, share - reach), min(1.0, share + reach))


def batch_shares(met: Sequence[bool]) -> list[float]:
    """What is left at the end when all are of one size is left out."""
    size = max(1, len(met) // NUM_BATCHES)
    return [sum(met[i : i + size]) / size for i in range(0, size * (len(met) // size), size)]


def lead(one: Point, other: Point) -> Lead:
    """Raises ValueError if they are not of the same requests at the same rate."""
    if (one.case, one.rate, len(one.batches)) != (other.case, other.rate, len(other.batches)):
        raise ValueError(f"{one.contender} at {one.rate:g}/s and {other.contender} at {other.rate:g}/s had different requests")
    differences = [ours - theirs for ours, theirs in zip(one.batches, other.batches, strict=True)]
    mean = sum(differences) / max(1, len(differences))
    reach = _reach(differences, mean) if len(differences) > 1 else 1.0
    return Lead(mean, max(-1.0, mean - reach), min(1.0, mean + reach))


def _reach(values: Sequence[float], mean: float) -> float:
    """Of the mean's 95 % interval, to either side."""
    return STUDENT_T_95 * math.sqrt(sum((each - mean) ** 2 for each in values) / (len(values) - 1) / len(values))


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
