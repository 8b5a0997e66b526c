"""Which launches of page pushes wait for which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import torch

from diptych.kernels.page_push import DEFAULT_SHAPE, PushShape, Turns

LAUNCHES = st.lists(st.integers(1, 12) | st.just(12), min_size=1, max_size=30)
STARTS = st.sampled_from([0, 2**31 - 20, 2**32 - 20, 5 * 2**32 - 3, 2**40])


def turns(num_launched: int, has_room: bool = True) -> Turns:
    return Turns(torch.zeros(1, dtype=torch.int32), num_launched, has_room)


def may_move(finished: int, after: int) -> bool:
    """As the kernel decides, by int32."""
    return (finished - after + 2**31) % 2**32 - 2**31 >= 0


@given(LAUNCHES, STARTS)
def test_a_long_launch_waits_for_half_of_the_one_before_and_a_short_one_for_nobody(launches: list[int], start: int) -> None:
    shape, kept = PushShape(num_programs=12), turns(start)
    before = start
    for num_programs in launches:
        after = kept.after(num_programs, shape)
        assert -(2**31) <= after < 2**31
        assert may_move(before, after), "it would wait for itself, or for a later one"
        assert may_move(before - 6, after)
        assert may_move(before - 7, after) == (num_programs < 12)
        assert may_move(start, after) or num_programs == 12
        kept.launched(num_programs)
        before += num_programs


@given(LAUNCHES, STARTS)
def test_nobody_waits_where_there_is_no_room(launches: list[int], start: int) -> None:
    shape, kept = PushShape(num_programs=12), turns(start, has_room=False)
    for num_programs in launches:
        assert may_move(start, kept.after(num_programs, shape))
        kept.launched(num_programs)


@pytest.mark.parametrize(("num_sms", "num_launches", "fit"), [(132, 3, True), (99, 3, True), (98, 3, False), (132, 5, False)])
def test_room_is_for_all_programs_of_all_launches(num_sms: int, num_launches: int, fit: bool) -> None:
    assert DEFAULT_SHAPE.fit(num_launches, num_sms) == fit
