"""Makes workloads: arrivals from a renewal process, lengths from a log-normal, all from one seed.

Arrivals are drawn at a mean of one request per second and set to a rate by `Workload.at_rate`: the same seed sends the same
requests in the same pattern at every rate, so two rates differ by nothing but the rate.
"""

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from .errors import WorkloadError
from .workload import TimedRequest, Workload


class Arrivals(Enum):
    POISSON = "poisson"
    GAMMA = "gamma"
    WEIBULL = "weibull"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: log-normal of this mean, whose logarithm has standard deviation `sigma`; 0 gives `mean` always. Longer ones
    are cut to `max_tokens`, so the mean of what is sent lies a little below `mean`."""

    mean: float
    sigma: float = 0.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and 0 <= self.sigma < math.inf) or (self.max_tokens is not None and self.max_tokens < 1):
            raise WorkloadError(f"lengths need mean >= 1, sigma >= 0 and max >= 1: {self}")

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = random.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        upper = self.max_tokens if self.max_tokens is not None else np.iinfo(np.int32).max
        return np.clip(np.rint(drawn), 1, upper).astype(np.int64)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Every prompt starts with one of `groups` prefixes of `tokens` tokens, chosen evenly; the drawn length is what follows."""

    tokens: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.groups < 1:
            raise WorkloadError(f"a shared prefix needs tokens >= 1 and groups >= 1: {self}")


@dataclass(frozen=True, slots=True)
class Recipe:
    num_requests: int
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = Arrivals.POISSON
    cv: float = 1.0                     # coefficient of variation of the gaps (standard deviation / mean); Poisson's is 1
    prefix: SharedPrefix | None = None
    seed: int = 0


def generate(recipe: Recipe) -> Workload:
    """Raises WorkloadError for a recipe without requests or with a cv that its process cannot have."""
    if recipe.num_requests < 1:
        raise WorkloadError(f"cannot generate {recipe.num_requests} requests")
    random = np.random.default_rng(recipe.seed)
    gaps_s = _gaps_s(random, recipe.arrivals, recipe.cv, recipe.num_requests - 1)
    at_s = np.concatenate([[0.0], np.cumsum(gaps_s)])
    prompts = recipe.prompt.draw(random, recipe.num_requests)
    outputs = recipe.output.draw(random, recipe.num_requests)
    prefix_tokens, groups = (recipe.prefix.tokens, recipe.prefix.groups) if recipe.prefix else (0, 1)
    group_of = random.integers(groups, size=recipe.num_requests)
    requests = tuple(
        TimedRequest(float(at), prefix_tokens + int(prompt), int(output), (int(group),) if prefix_tokens else ())
        for at, prompt, output, group in zip(at_s, prompts, outputs, group_of, strict=True)
    )
    return Workload(f"{recipe.arrivals.value} arrivals, seed {recipe.seed}", requests, prefix_tokens)


def _gaps_s(random: np.random.Generator, arrivals: Arrivals, cv: float, count: int) -> NDArray[np.float64]:
    """Gaps of mean 1 s."""
    if arrivals is Arrivals.POISSON:
        if cv != 1:
            raise WorkloadError(f"Poisson arrivals have cv 1, not {cv}: take gamma or weibull")
        return random.exponential(1.0, count)
    if not 0.01 <= cv <= 100:
        raise WorkloadError(f"the cv of the gaps must be in [0.01, 100], got {cv}")
    if arrivals is Arrivals.GAMMA:
        return random.gamma(1 / cv**2, cv**2, count)
    shape = weibull_shape(cv)
    return random.weibull(shape, count) / math.gamma(1 + 1 / shape)


def weibull_shape(cv: float) -> float:
    """The k with Γ(1 + 2/k) / Γ(1 + 1/k)² − 1 = cv², which falls as k rises: found by bisection of log k."""

    def log_cv(k: float) -> float:
        ratio = math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k)
        return 0.5 * (ratio if ratio > 50 else math.log(math.expm1(ratio)))

    low, high = 0.05, 1000.0
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if log_cv(middle) > math.log(cv) else (low, middle)
    return math.sqrt(low * high)
