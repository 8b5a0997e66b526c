"""Virtual time: what happens when, in order; nothing waits."""

import heapq
from collections.abc import Callable
from itertools import count


class Timeline:
    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()                 # events of one moment happen in the order in which they were made

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        assert time_s >= self.now, f"{time_s} is before now, {self.now}"
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def run(self, until_s: float, done: Callable[[], bool]) -> None:
        """To the end of time, or until `done`."""
        while self._heap and not done():
            time_s, _, action = heapq.heappop(self._heap)
            if time_s > until_s:
                return
            self.now = time_s
            action()
