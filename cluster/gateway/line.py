"""Generations without a route: who is asked for again, and when. Pure; times are the caller's clock.

    back_off, wait ──► each has a moment of its own: the end of a backoff, the last useful one ──► whoever's has come
    news ───────► all may find a route: the MOST_AT_ONCE most urgent, unless asking took more than SHARE of the time lately

    turn(now) ──► these, most urgent first ──► the caller routes, refuses or lets each wait on ──► rest(now)
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

W = TypeVar("W")

MOST_AT_ONCE = 32
SHARE = 0.25


@dataclass
class _Place:
    due_at: float                             # what urgency goes by
    asked_from: float                         # not before, whatever news come
    moment: float                             # news or not


class Line(Generic[W]):
    def __init__(self) -> None:
        self._places: dict[W, _Place] = {}    # in order of arrival, which breaks ties
        self._news = False
        self._free_at = -math.inf             # when news may be followed again
        self._began_at = -math.inf
        self._next_moment = math.inf          # never later than the soonest of all; sooner, if that one has left

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, waiting: W) -> bool:
        return waiting in self._places

    def back_off(self, waiting: W, due_at: float, until: float) -> None:
        """It comes, and is asked for at `until`, not sooner."""
        self._put(waiting, _Place(due_at, until, until))

    def wait(self, waiting: W, due_at: float, until: float) -> None:
        """It comes, or stays: until there are news, `until` at the latest."""
        self._put(waiting, _Place(due_at, -math.inf, until))

    def remove(self, waiting: W) -> None:
        self._places.pop(waiting, None)

    def news(self) -> None:
        """A worker has told its load, or a request has left one."""
        self._news = bool(self._places)

    def next_at(self) -> float:
        """When to take a turn; infinite: not before something happens."""
        if not self._places:
            return math.inf
        return min(self._next_moment, self._free_at) if self._news else self._next_moment

    def turn(self, now: float) -> list[W]:
        self._began_at = now
        due = [waiting for waiting, place in self._places.items() if place.moment <= now]
        if self._news and now >= self._free_at:
            self._news = False
            due += self._askable(now)
        return sorted(due, key=lambda waiting: self._places[waiting].due_at)

    def rest(self, now: float) -> None:
        """The turn is over."""
        self._free_at = now + (now - self._began_at) * (1 / SHARE - 1)
        self._next_moment = min((place.moment for place in self._places.values()), default=math.inf)

    def _put(self, waiting: W, place: _Place) -> None:
        self._places[waiting] = place
        self._next_moment = min(self._next_moment, place.moment)

    def _askable(self, now: float) -> list[W]:
        askable = [waiting for waiting, place in self._places.items() if place.asked_from <= now < place.moment]
        return sorted(askable, key=lambda waiting: self._places[waiting].due_at)[:MOST_AT_ONCE]
