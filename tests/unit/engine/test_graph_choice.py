"""Which of the captured graphs are kept."""

from hypothesis import given
from hypothesis import strategies as st

from diptych.engine.graph_choice import MARGIN, not_outrun
from diptych.engine.prompt_steps import StepShape, fast_shapes, padded_rows, shape_for, step_shapes


@given(st.dictionaries(st.integers(1, 20), st.floats(1e-3, 1.0), min_size=1))
def test_what_is_dropped_is_outrun_by_what_is_kept(seconds: dict[int, float]) -> None:
    kept = not_outrun(seconds)
    assert kept == sorted(kept)
    assert kept[-1] == max(seconds)
    for size, own_s in seconds.items():
        faster = [other for other in kept if other >= size and (other == size or seconds[other] < (1 - MARGIN) * own_s)]
        assert faster, f"{size} rows have no graph that is as fast"


def test_a_size_that_a_larger_one_outruns_by_far_is_dropped() -> None:
    assert not_outrun({384: 10.6, 448: 16.6, 512: 11.9, 576: 16.2, 640: 15.9}) == [384, 512, 576, 640]


@given(st.integers(1, 3000), st.integers(1, 300), st.randoms(use_true_random=False), st.data())
def test_every_step_that_had_a_shape_has_one_of_the_kept_and_is_padded_alike(max_tokens, max_sequences, random, data) -> None:
    shapes = step_shapes(max_tokens, max_sequences)
    kept = fast_shapes({shape: random.uniform(1, 2) for shape in shapes})
    assert kept == sorted(set(kept) & set(shapes))
    step = data.draw(st.sampled_from(shapes))
    tokens, sequences = data.draw(st.integers(1, step.tokens)), data.draw(st.integers(1, step.sequences))
    found = shape_for(kept, tokens, sequences, step.has_single_rows)
    assert found is not None
    if step.has_single_rows and sequences < tokens:
        assert found.tokens == min(rows for rows in padded_rows(kept) if rows >= tokens)


def test_few_and_many_sequences_go_together() -> None:
    few, many, larger = StepShape(448, True, 16), StepShape(448, True, 64), StepShape(512, True, 64)
    assert fast_shapes({few: 1.0, many: 1.4, larger: 1.2}) == [larger]
    assert fast_shapes({few: 9.0, many: 1.2, larger: 1.2}) == [few, many, larger]
