from dataclasses import dataclass, field

import pytest

from diptych.engine.calibration import MOST_RUNS, RUNS, calibrate, warm_up
from diptych.engine.engine import EngineLimits
from diptych.engine.fake_runner import FakeRunner, fake_layout
from diptych.engine.model_runner import ChunkOutput, SyncRunner
from diptych.engine.predictor import PRIOR, features_of
from diptych.engine.scheduler import StepPlan
from diptych.kvtransfer.fake import FakeFabric
from diptych.messages.steps import StepFeatures, StepModel

LIMITS = EngineLimits(block_size=16, max_model_len=4096, max_step_tokens=2048, max_sequences=64)
TRUTH = StepModel(2e-3, 150e-6, 4e-9, 300e-6, 1e-6)
SLOW = StepModel(0.1, 1.5e-3, 4e-8, 3e-3, 1e-5)
BENT = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3e-8, past_first_s=12e-6, past_second_s=4e-6)


@dataclass
class TimedRunner(SyncRunner):
    """Takes as long as `truth` says, and ten times that when it sees a shape for the first time."""

    truth: StepModel = TRUTH
    now: float = 0.0
    seen: set[StepFeatures] = field(default_factory=set)
    held_up: int = 1               # all but each third step take so many times as long
    num_steps: int = 0

    def execute(self, plan: StepPlan, on_layer: object) -> list[ChunkOutput]:
        features = features_of(plan)
        self.num_steps += 1
        self.now += self.truth.step_s(features) * (1 if features in self.seen else 10) * (self.held_up if self.num_steps % 3 else 1)
        self.seen.add(features)
        return [ChunkOutput(None) for _ in plan.chunks]


@pytest.mark.parametrize(
    "step", [StepFeatures(512, 512 * 256), StepFeatures(0, 0, 32, 32 * 500), StepFeatures(256, 256 * 800, 16, 16 * 1000)]
)
@pytest.mark.parametrize("truth", [TRUTH, SLOW, BENT], ids=["straight", "slow", "bent"])
def test_what_was_measured_is_predicted(step, truth):
    runner = TimedRunner(truth)
    model = calibrate(runner, LIMITS, lambda: runner.now, budget_s=1000.0)
    assert model.step_s(step) == pytest.approx(truth.step_s(step), rel=0.05)
    assert model.error < 0.05


def test_of_short_steps_the_shortest_of_several_runs_counts():
    """For who calibrates beside others is held up now and then."""
    runner = TimedRunner(held_up=4)
    model = calibrate(runner, LIMITS, lambda: runner.now, budget_s=1000.0)
    for step in (StepFeatures(0, 0, 1, 17), StepFeatures(512, 512 * 256), StepFeatures(0, 0, 32, 32 * 500)):
        assert model.step_s(step) == pytest.approx(TRUTH.step_s(step), rel=0.05)


def test_long_steps_are_run_twice_and_short_ones_at_most_four_times():
    """So that a device whose steps take as long as the whole budget still comes to see several."""
    short, long = TimedRunner(), TimedRunner()
    calibrate(short, LIMITS, lambda: short.now, budget_s=1000.0)
    assert short.num_steps == MOST_RUNS * len(short.seen)
    calibrate(long, LIMITS, lambda: long.now, budget_s=0.03)
    assert long.num_steps == RUNS * len(long.seen)


def test_without_time_the_prior_stays():
    runner = TimedRunner()
    assert calibrate(runner, LIMITS, lambda: runner.now, budget_s=0.0) == PRIOR
    assert not runner.seen


def test_a_grid_point_is_begun_only_within_the_budget():
    runner = TimedRunner()
    calibrate(runner, LIMITS, lambda: runner.now, budget_s=0.1)
    assert len(runner.seen) < 9


SMALLEST = [(4, 16, 8, 4), (16, 2, 1, 1), (1, 2, 1, 1), (4, 64, 512, 64)]


@pytest.mark.parametrize("limits", [EngineLimits(*each) for each in SMALLEST])
def test_the_smallest_engines_have_the_blocks_and_tokens_for_it(limits):
    """With a runner that reads and writes each page it is told of."""
    num_blocks = -(-limits.max_model_len // limits.block_size)
    pool = FakeFabric().transport("here").allocate(fake_layout(limits.block_size), num_blocks)
    model = calibrate(FakeRunner(pool), limits, iter(range(10_000)).__next__, budget_s=5000.0)
    assert model.num_observed > 0
    warm_up(FakeRunner(pool), limits)


def test_steps_of_several_prompts_are_warmed_up_for():
    """Those that fill a step are larger than any CUDA graph."""
    runner = TimedRunner()
    warm_up(runner, LIMITS)
    filling = [seen for seen in runner.seen if seen.prefill_tokens > 2000]
    assert len({seen.prefill_pairs for seen in filling}) == 4                # of one, two, three and four prompts
