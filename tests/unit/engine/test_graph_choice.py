"""Which of the captured graphs are kept."""

import operator

from hypothesis import given
from hypothesis import strategies as st

from diptych.engine.graph_choice import undominated
from diptych.engine.prompt_steps import StepShape, shape_for

shapes = st.builds(StepShape, st.integers(1, 8), st.booleans(), st.integers(1, 4))
timed = st.dictionaries(shapes, st.integers(1, 5).map(float), min_size=1, max_size=12)


@given(timed)
def test_whatever_was_taken_still_is_and_by_nothing_slower(seconds: dict[StepShape, float]) -> None:
    kept = undominated(dict(sorted(seconds.items())), StepShape.holds)
    assert kept == sorted(kept)
    for shape, own_s in seconds.items():
        taking = [other for other in kept if other.holds(shape)]
        assert min(seconds[other] for other in taking) == min(s for other, s in seconds.items() if other.holds(shape)) <= own_s
        found = shape_for(kept, shape.tokens, shape.sequences, shape.has_single_rows)
        assert found is not None
        assert found.takes(shape.tokens, shape.sequences, shape.has_single_rows)


def test_a_size_that_a_larger_one_outruns_is_dropped() -> None:
    assert undominated({384: 10.6, 448: 16.6, 512: 11.9, 576: 15.9, 640: 15.9}, operator.ge) == [384, 512, 576, 640]
