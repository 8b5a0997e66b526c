"""How long a step took by itself, and that one which never ends is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.engine.predictor import PRIOR
from diptych.engine.step_watch import STEP_LIMIT_S, StepWatch
from diptych.messages.errors import StepStuck
from diptych.messages.steps import StepFeatures

DECODES = StepFeatures(prefill_tokens=0, prefill_pairs=0, num_decoding=8, decode_context=8000)


@given(seconds=st.floats(0.004, 0.05), ahead=st.booleans())
def test_a_step_counts_from_the_end_of_the_one_before(seconds: float, ahead: bool) -> None:
    watch, now = StepWatch(PRIOR), 100.0
    watch.launched(DECODES, now)
    for _ in range(300):
        if ahead:
            watch.launched(DECODES, now)              # while the one before runs
        now += seconds
        watch.collected(now)
        watch.learn()
        if not ahead:
            watch.launched(DECODES, now)
    assert watch.model.step_s(DECODES) == pytest.approx(seconds, rel=0.1)


def test_busy_until_all_that_are_under_way_have_ended() -> None:
    watch, step_s = StepWatch(PRIOR), PRIOR.step_s(DECODES)
    assert watch.busy_s(5.0) == 0.0
    watch.launched(DECODES, 5.0)
    watch.launched(DECODES, 5.001)                    # ahead: it begins when the first has ended
    assert watch.busy_s(5.002) == pytest.approx(2 * step_s - 0.002)
    assert watch.oldest_s(5.002) == pytest.approx(step_s - 0.002)
    watch.collected(5.0 + step_s)
    assert watch.busy_s(5.0 + step_s) == pytest.approx(step_s, rel=0.01)
    assert watch.busy_s(9.0) == watch.oldest_s(9.0) == 0.0


def test_prompts_are_a_share_of_the_time() -> None:
    watch = StepWatch(PRIOR)
    watch.launched(StepFeatures(prefill_tokens=1000, prefill_pairs=500_000, num_decoding=0, decode_context=0), 1.0)
    watch.collected(1.03)
    watch.learn()
    assert watch.prefill_share.at(1.03) > 0
    assert watch.prefill_share.at(30.0) < 1e-3


def test_a_step_may_take_its_time_and_no_more() -> None:
    watch = StepWatch(PRIOR)
    watch.launched(DECODES, 10.0)
    watch.launched(DECODES, 10.0)
    watch.require_progress(10.0 + STEP_LIMIT_S)
    watch.collected(10.0 + STEP_LIMIT_S)
    watch.require_progress(10.0 + 1.9 * STEP_LIMIT_S)
    with pytest.raises(StepStuck, match="0 prompt tokens and 8 decodes"):
        watch.require_progress(10.0 + 2.1 * STEP_LIMIT_S)
