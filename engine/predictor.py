"""How long will a step take? Learned from the worker's own steps; pure.

    observe(features, seconds) ──► clip what is far off ──► least squares with forgetting, coefficients >= 0 ──► model: StepModel

Recursive least squares in information form: A ← λA + x·xᵀ + (1 − λ)A₀, B ← λB + x·y + (1 − λ)A₀θ₀, with x = regressors / seconds and
y = 1, so that relative errors are what is squared (of a step that was clipped: relative to the longer of both times). The standing term
(A₀, θ₀) is what the fit falls back to where no step has gone for long (a prefill worker seldom decodes): plain forgetting would let those
coefficients run away.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..messages.steps import FIRST_BEND, SECOND_BEND, StepFeatures, StepModel, attended_pairs
from .scheduler import Chunk, StepPlan

PRIOR = StepModel(
    base_s=5e-3, prefill_token_s=7e-6, prefill_pair_s=8e-10, decode_sequence_s=1e-5, decode_context_s=3e-8,
    past_first_s=13e-6, past_second_s=5e-6,
)  # fmt: skip
"""An 8B model in bf16 on one GPU of 4 TB/s: what is believed of a worker that has not measured anything."""

FORGET = 0.995
"""λ: the last 200 steps count."""

SCALES: NDArray[np.float64] = np.array([1.0, 1e3, 1e6, 1e2, 1e5, 1e3, 1e3])
"""A typical step's features, so that the normal equations are well conditioned."""

SHORTEST_S = 1e-7                             # no step is shorter
STEP_NOISE = 0.05                             # relative, of one observation; weighs the steps against the standing term
MIN_CLIP = 0.25                               # relative: an observation is never clipped closer to its prediction
CLIP_ERRORS = 4.0                             # mean errors that an observation may be off
ERROR_MEMORY = 0.97
REFIT_EVERY = 8                               # steps, once there are as many as CAREFUL_UNTIL
CAREFUL_UNTIL = 64


def features_of(plan: StepPlan) -> StepFeatures:
    prompts: list[Chunk] = []
    decodes: list[Chunk] = []
    for chunk in plan.chunks:
        (decodes if chunk.sequence.is_decoding else prompts).append(chunk)
    return StepFeatures(
        prefill_tokens=sum(chunk.count for chunk in prompts),
        prefill_pairs=sum(attended_pairs(chunk.start, chunk.count) for chunk in prompts),
        num_decoding=len(decodes),
        decode_context=sum(chunk.end for chunk in decodes),
    )


class StepPredictor:
    def __init__(self, prior: StepModel = PRIOR) -> None:
        theta = np.array(coefficients(prior)) * SCALES
        theta = np.maximum(theta, 0.01 * theta.max())           # a coefficient of 0 would never be left again
        self._prior_a = np.diag((STEP_NOISE / theta) ** 2)
        self._prior_b = self._prior_a @ (np.array(coefficients(prior)) * SCALES)
        self._a, self._b = self._prior_a.copy(), self._prior_b.copy()
        self._error = prior.error
        self._num_observed = prior.num_observed
        self._model = prior

    @property
    def model(self) -> StepModel:
        return self._model

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """A step of `features` took `seconds`; a clock that stood still, or nearly so, teaches nothing."""
        if not seconds >= SHORTEST_S:
            return
        predicted = self._model.step_s(features)
        off = seconds / predicted - 1 if predicted > 0 else math.inf
        self._error = ERROR_MEMORY * self._error + (1 - ERROR_MEMORY) * min(abs(off), 10.0)
        self._num_observed += 1
        self._learn(features, seconds, self._clipped(seconds, predicted))
        if self._num_observed <= CAREFUL_UNTIL or self._num_observed % REFIT_EVERY == 0:
            self._refit()

    def _clipped(self, seconds: float, predicted: float) -> float:
        """A step that something else held up pulls only so far; if all steps are slow, the error grows and lets them."""
        reach = 1 + max(MIN_CLIP, CLIP_ERRORS * self._error)
        return min(max(seconds, predicted / reach), predicted * reach) if predicted > 0 else seconds

    def _learn(self, features: StepFeatures, seconds: float, clipped: float) -> None:
        """Errors relative to the longer one: to what was clipped down, a model that is wrong by far would be bound for good."""
        longer = max(seconds, clipped)
        x = regressors(features) / SCALES / longer
        self._a = FORGET * self._a + np.outer(x, x) + (1 - FORGET) * self._prior_a
        self._b = FORGET * self._b + x * clipped / longer + (1 - FORGET) * self._prior_b

    def _refit(self) -> None:
        self._model = model_with(solve_non_negative(self._a, self._b) / SCALES, self._error, self._num_observed)


def regressors(features: StepFeatures) -> NDArray[np.float64]:
    """What the coefficients are multiplied by, in the order of `coefficients`."""
    tokens, decoding = features.prefill_tokens, features.num_decoding
    past = (max(0, tokens + decoding - bend) for bend in (FIRST_BEND, SECOND_BEND))
    return np.array((1, tokens, features.prefill_pairs, decoding, features.decode_context, *past), dtype=np.float64)


def coefficients(model: StepModel) -> tuple[float, ...]:
    return (
        model.base_s,
        model.prefill_token_s,
        model.prefill_pair_s,
        model.decode_sequence_s,
        model.decode_context_s,
        model.past_first_s,
        model.past_second_s,
    )


def model_with(coefficients: Iterable[float], error: float, num_observed: int) -> StepModel:
    """In the order of `coefficients`."""
    a, b, c, d, e, f, g = map(float, coefficients)
    return StepModel(a, b, c, d, e, error, num_observed, f, g)


def solve_non_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least xᵀAx − 2bᵀx, for A positive definite. Coordinates at 0 are freed one by one, the steepest first; those that
    then want to be negative stop at 0. (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23, on the normal equations.)"""
    x: NDArray[np.float64] = np.linalg.solve(a, b).astype(np.float64)
    if x.min() >= 0:
        return x
    x, free, flat = np.zeros(len(b)), np.zeros(len(b), dtype=bool), 1e-12 * np.abs(b).max()
    for _ in range(3 * len(b)):
        slope = np.where(free, 0.0, b - a @ x)
        if slope.max() <= flat:
            break
        free[slope.argmax()] = True
        while free.any():
            wanted = np.zeros(len(b))
            wanted[free] = np.linalg.solve(a[np.ix_(free, free)], b[free])
            if wanted[free].min() >= 0:
                x = wanted
                break
            stopped = free & (wanted < 0)
            x += (x[stopped] / (x[stopped] - wanted[stopped])).min() * (wanted - x)
            free &= x > 0
            free[stopped & (x <= x[stopped].min())] = False
            x[~free] = 0.0
    return x
