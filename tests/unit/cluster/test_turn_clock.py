"""The clock by which the controller judges silence."""

from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.turn_clock import MAX_TURN_S, TurnClock


@given(st.lists(st.floats(0.0, 1e6)))
def test_it_goes_with_the_wall_but_never_far_in_one_turn(pauses: list[float]) -> None:
    clock, wall_s = TurnClock(100.0), 100.0
    for pause_s in pauses:
        wall_s += pause_s
        before = clock.now_s
        assert before <= clock.turn(wall_s) <= min(wall_s + 1e-6, before + MAX_TURN_S)
    if all(pause_s <= MAX_TURN_S for pause_s in pauses):
        assert abs(clock.now_s - wall_s) < 1e-6
