"""Who is asked for again, and when: on a virtual clock, with waiters that are only names."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diptych.cluster.gateway.line import MOST_AT_ONCE, SHARE, Line


def waiting(*due_at: float) -> Line[str]:
    """One after another, named by their number, all waiting for news."""
    line: Line[str] = Line()
    for number, due in enumerate(due_at):
        line.wait(str(number), due, math.inf)
    line.turn(0.0)
    line.rest(0.0)
    return line


def test_without_news_nobody_is_asked_for():
    line = waiting(1.0, 2.0)
    assert line.next_at() == math.inf
    assert line.turn(1e6) == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_news_are_for_the_most_urgent(due_at):
    line = waiting(*due_at)
    line.news()
    assert line.next_at() <= 0.0
    assert line.turn(0.0) == sorted(map(str, range(len(due_at))), key=lambda name: due_at[int(name)])[:MOST_AT_ONCE]


def test_news_in_an_empty_line_are_forgotten():
    line: Line[str] = Line()
    line.news()
    line.back_off("late", 1.0, 5.0)
    assert line.next_at() == 5.0
    assert line.turn(4.9) == []


def test_a_backoff_is_not_cut_short():
    line = waiting(1.0)
    line.back_off("backs off", 0.0, 5.0)
    line.news()
    assert line.turn(4.0) == ["0"]
    line.rest(4.0)
    assert line.next_at() == 5.0
    assert line.turn(5.0) == ["backs off"]


def test_everybody_has_a_last_moment():
    line = waiting(3.0, 2.0, 1.0)
    line.wait("0", 3.0, 10.0)
    line.wait("1", 2.0, 10.0)
    line.wait("2", 1.0, 11.0)
    assert line.next_at() == 10.0
    assert line.turn(10.0) == ["1", "0"]


@given(st.floats(1e-4, 1.0))
def test_asking_takes_a_share_of_the_time(took_s):
    line = waiting(1.0)
    line.news()
    line.turn(100.0)
    line.rest(100.0 + took_s)
    line.news()
    assert line.next_at() - 100.0 >= took_s / SHARE * (1 - 1e-9)
    assert line.turn(line.next_at() - took_s / 10) == []
    assert line.turn(line.next_at()) == ["0"]


def test_a_last_moment_does_not_wait_for_that():
    line = waiting(1.0)
    line.wait("0", 1.0, 100.5)
    line.news()
    line.turn(100.0)
    line.rest(100.4)
    assert line.next_at() == 100.5
    assert line.turn(100.5) == ["0"]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, `next_at` never lets a moment pass, and a turn never names who is not there or backs off."""

    def __init__(self) -> None:
        super().__init__()
        self.line: Line[int] = Line()
        self.now = 0.0
        self.moments: dict[int, float] = {}
        self.backs_off: dict[int, float] = {}
        self.num_added = 0

    @rule(due_at=st.floats(0, 10), delay_s=st.floats(0, 2))
    def add(self, due_at: float, delay_s: float) -> None:
        self.line.back_off(self.num_added, due_at, self.now + delay_s)
        self.moments[self.num_added] = self.backs_off[self.num_added] = self.now + delay_s
        self.num_added += 1

    @rule(draw=st.data())
    def remove(self, draw: st.DataObject) -> None:
        if self.moments:
            self.forget(draw.draw(st.sampled_from(sorted(self.moments))))

    @rule()
    def news(self) -> None:
        self.line.news()

    @rule(step_s=st.floats(0, 1), took_s=st.floats(0, 0.01), patience_s=st.floats(0.001, 2), leaves=st.booleans())
    def turn(self, step_s: float, took_s: float, patience_s: float, leaves: bool) -> None:
        self.now += step_s
        turn = self.line.turn(self.now)
        assert len(set(turn)) == len(turn)
        assert all(self.backs_off[name] <= self.now for name in turn)
        assert {name for name, moment in self.moments.items() if moment <= self.now} <= set(turn)
        for name in turn:
            if leaves:
                self.forget(name)
            else:
                self.line.wait(name, 0.0, self.now + patience_s)
                self.moments[name], self.backs_off[name] = self.now + patience_s, -math.inf
        self.now += took_s
        self.line.rest(self.now)

    def forget(self, name: int) -> None:
        self.line.remove(name)
        del self.moments[name]

    @invariant()
    def no_moment_passes(self) -> None:
        assert len(self.line) == len(self.moments)
        assert self.line.next_at() <= min(self.moments.values(), default=math.inf)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=30)
