import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.predictor import PRIOR, StepPredictor, coefficients, solve_non_negative
from diptych.messages.steps import StepFeatures, StepModel, attended_pairs

TRUTH = StepModel(base_s=4.8e-3, prefill_token_s=23e-6, prefill_pair_s=8e-10, decode_sequence_s=16e-6, decode_context_s=3.2e-8)


def mixed_step(draw: random.Random) -> StepFeatures:
    tokens, decoding = draw.choice((0, draw.randrange(16, 4096))), draw.randrange(0, 128)
    return StepFeatures(tokens, attended_pairs(draw.randrange(0, 4096), tokens), decoding, decoding * draw.randrange(64, 2048))


def scaled(model: StepModel, factor: float) -> StepModel:
    return StepModel(*(factor * each for each in coefficients(model)))


def taught(truth: StepModel, count: int, draw: random.Random, predictor: StepPredictor | None = None, noise: float = 0.0) -> StepPredictor:
    predictor = predictor or StepPredictor()
    for _ in range(count):
        step = mixed_step(draw)
        predictor.observe(step, truth.step_s(step) * draw.lognormvariate(0, noise))
    return predictor


def worst_error(predictor: StepPredictor, truth: StepModel, draw: random.Random) -> float:
    steps = [mixed_step(draw) for _ in range(200)]
    return max(abs(predictor.model.step_s(step) / truth.step_s(step) - 1) for step in steps)


@settings(max_examples=20)
@given(factors=st.lists(st.floats(0.3, 4.0), min_size=5, max_size=5), seed=st.integers(0, 1000))
def test_recovers_known_coefficients(factors, seed):
    truth = StepModel(*(factor * each for factor, each in zip(factors, coefficients(TRUTH), strict=True)))
    predictor = taught(truth, 400, random.Random(seed))
    assert worst_error(predictor, truth, random.Random(seed + 1)) < 0.02
    assert predictor.model.error < 0.02
    assert predictor.model.confidence > 0.9


@settings(max_examples=10)
@given(factor=st.sampled_from((0.4, 0.7, 1.5, 3.0)), seed=st.integers(0, 1000))
def test_tracks_drift(factor, seed):
    draw = random.Random(seed)
    predictor = taught(TRUTH, 300, draw)
    slower = scaled(TRUTH, factor)
    taught(slower, 1500, draw, predictor)
    assert worst_error(predictor, slower, draw) < 0.05


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 8192), st.integers(0, 256), st.floats(-1.0, 10.0)), min_size=1, max_size=60))
def test_never_predicts_negative_or_nonsense_whatever_it_is_told(observations):
    predictor = StepPredictor()
    for tokens, decoding, seconds in observations:
        predictor.observe(StepFeatures(tokens, attended_pairs(0, tokens), decoding, 100 * decoding), seconds)
        assert all(np.isfinite(each) and each >= 0 for each in coefficients(predictor.model))
        assert 0 <= predictor.model.confidence <= 1


def test_noise_is_averaged_away():
    draw = random.Random(1)
    predictor = taught(TRUTH, 1000, draw, noise=0.05)
    assert worst_error(predictor, TRUTH, draw) < 0.06
    assert predictor.model.error == pytest.approx(0.04, abs=0.02)


def test_a_step_held_up_by_something_else_pulls_little():
    draw = random.Random(2)
    predictor = taught(TRUTH, 300, draw)
    for _ in range(8):
        predictor.observe(StepFeatures(num_decoding=16, decode_context=16_000), 5.0)
        taught(TRUTH, 30, draw, predictor)
    assert worst_error(predictor, TRUTH, draw) < 0.15


def test_what_never_happens_stays_as_believed():
    """A prefill worker's decode coefficients do not run away."""
    predictor, draw = StepPredictor(), random.Random(3)
    for _ in range(5000):
        tokens = draw.randrange(128, 4096)
        step = StepFeatures(tokens, attended_pairs(0, tokens))
        predictor.observe(step, TRUTH.step_s(step))
    assert predictor.model.decode_sequence_s == pytest.approx(PRIOR.decode_sequence_s, rel=0.01)
    assert predictor.model.decode_context_s == pytest.approx(PRIOR.decode_context_s, rel=0.01)


def test_a_clock_that_stood_still_teaches_nothing():
    predictor = StepPredictor()
    predictor.observe(StepFeatures(16, 136), 0.0)
    assert predictor.model == PRIOR


def test_a_coefficient_that_would_be_negative_is_held_at_zero():
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([1.0, -3.0])
    assert solve_non_negative(a, b).tolist() == [0.5, 0.0]
    assert solve_non_negative(a, -np.ones(2)).tolist() == [0.0, 0.0]


def test_confidence_needs_steps_and_accuracy():
    model = msgspec.structs.replace(TRUTH, num_observed=20, error=0.0)
    assert model.confidence == 0.5
    assert msgspec.structs.replace(model, error=1.0).confidence == 0.25
    assert TRUTH.confidence == 0.0


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_pairs_do_not_depend_on_the_chunking(start, first, second):
    assert attended_pairs(start, first) + attended_pairs(start + first, second) == attended_pairs(start, first + second)
