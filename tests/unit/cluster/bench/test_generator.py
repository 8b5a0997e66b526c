from dataclasses import replace

import numpy as np
import pytest

from diptych.cluster.bench.errors import WorkloadError
from diptych.cluster.bench.generator import Arrivals, Lengths, Recipe, SharedPrefix, generate, weibull_shape

FIXED = Lengths(100), Lengths(20)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(Arrivals.POISSON, 1.0), (Arrivals.GAMMA, 0.3), (Arrivals.GAMMA, 2.0), (Arrivals.WEIBULL, 0.5), (Arrivals.WEIBULL, 2.0)],
)
def test_gaps_have_the_mean_and_variation_asked_for(arrivals: Arrivals, cv: float) -> None:
    workload = generate(Recipe(40_000, *FIXED, arrivals, cv))
    gaps_s = np.diff([request.at_s for request in workload.requests])
    assert gaps_s.mean() == pytest.approx(1.0, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)


def test_weibull_shape_of_the_exponential_is_one() -> None:
    assert weibull_shape(1.0) == pytest.approx(1.0)
    assert weibull_shape(0.5) == pytest.approx(2.1013, abs=1e-3)
    assert weibull_shape(0.01) > weibull_shape(0.1) > weibull_shape(10) > weibull_shape(100) > 0


def test_log_normal_lengths() -> None:
    drawn = Lengths(4000, 0.8).draw(np.random.default_rng(1), 100_000)
    assert drawn.mean() == pytest.approx(4000, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.02)
    assert Lengths(4000, 0.8, 5000).draw(np.random.default_rng(1), 1000).max() == 5000
    assert set(Lengths(7).draw(np.random.default_rng(1), 10)) == {7}
    assert Lengths(1, 3.0).draw(np.random.default_rng(1), 1000).min() == 1


def test_same_seed_same_workload() -> None:
    recipe = Recipe(50, Lengths(100, 0.5), Lengths(20, 0.5), Arrivals.GAMMA, 2.0, SharedPrefix(64, 3), seed=4)
    assert generate(recipe) == generate(recipe)
    assert generate(recipe).requests != generate(replace(recipe, seed=5)).requests


def test_shared_prefix_is_a_block() -> None:
    workload = generate(Recipe(200, *FIXED, prefix=SharedPrefix(64, 3)))
    assert workload.block_tokens == 64
    assert {request.block_ids for request in workload.requests} == {(0,), (1,), (2,)}
    assert {request.prompt_tokens for request in workload.requests} == {164}


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: Recipe(0, *FIXED),
        lambda: Recipe(9, *FIXED, Arrivals.POISSON, 2.0),
        lambda: Recipe(9, *FIXED, Arrivals.GAMMA, 0.0),
        lambda: Recipe(9, *FIXED, Arrivals.WEIBULL, float("nan")),
        lambda: Recipe(9, Lengths(0.5), Lengths(1)),
        lambda: Recipe(9, Lengths(5, -1), Lengths(1)),
        lambda: Recipe(9, Lengths(5, 1, 0), Lengths(1)),
        lambda: Recipe(9, *FIXED, prefix=SharedPrefix(0)),
    ],
)
def test_impossible_recipes_are_refused(recipe) -> None:
    with pytest.raises(WorkloadError):
        generate(recipe())
