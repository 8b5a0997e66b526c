"""What is made of a step's logits."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.engine.model_runner import outputs_of

VOCAB = 5


@given(
    broken=st.lists(st.booleans(), min_size=1, max_size=4),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, VOCAB - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_only_a_chunk_whose_logits_are_not_finite_has_broken_down(
    broken: list[bool], value: float, place: int, dtype: torch.dtype
) -> None:
    """The middle one of three rows each."""
    logits = torch.zeros(3 * len(broken), VOCAB, dtype=dtype)
    for i, is_broken in enumerate(broken):
        if is_broken:
            logits[3 * i + 1, place] = value
    nothing = SimpleNamespace(samples=False, start=1, sequence=SimpleNamespace(request=no_scores()))
    outputs = outputs_of([nothing] * len(broken), logits, range(0, 3 * len(broken) + 1, 3))      # type: ignore[list-item]
    assert [output.is_finite for output in outputs] == [not each for each in broken]


def test_a_chunk_without_logits_is_sound() -> None:
    nothing = SimpleNamespace(samples=False, start=1, sequence=SimpleNamespace(request=no_scores()))
    [output] = outputs_of([nothing], torch.zeros(0, VOCAB), [0, 0])      # type: ignore[list-item]
    assert output.is_finite


def no_scores() -> SimpleNamespace:
    return SimpleNamespace(sampling=SimpleNamespace(prompt_logprobs=None))
