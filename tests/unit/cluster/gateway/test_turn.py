"""Who is called when: a step's tokens are written in slices, and answers that have not begun come before those that have."""

import asyncio
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway.outbox import Outbox
from diptych.cluster.gateway.responder import BUSY_AFTER_S, LONG_SLICE_S, SLICE_S, Turn

WRITE_S = SLICE_S / 9.5         # so ten of them in a slice, which ends with the one that it ends in


class House:
    """A turn on a clock that only writing moves, and what was written between two looks of the loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turn = Turn(Outbox(), lambda: self.now)
        self.written: list[list[str]] = [[]]

    def news(self, name: str, is_first: bool = False, then: Callable[[], None] | None = None) -> None:
        def write() -> None:
            self.now += WRITE_S
            self.written[-1].append(name)
            if then is not None:
                then()

        self.turn.add(write, is_first)

    async def until_quiet(self) -> list[list[str]]:
        while True:
            await asyncio.sleep(0)
            if not self.written[-1]:
                return self.written[:-1]
            self.written.append([])


def written(*news: tuple[str, bool]) -> list[list[str]]:
    async def run() -> list[list[str]]:
        house = House()
        for name, is_first in news:
            house.news(name, is_first)
        return await house.until_quiet()

    return asyncio.run(run())


def test_a_small_step_is_written_at_once_and_who_begins_comes_first() -> None:
    assert written(("a", False), ("b", True), ("c", False), ("d", True)) == [["b", "d", "a", "c"]]


def test_between_slices_the_loop_looks_at_what_has_come() -> None:
    async def run() -> list[list[str]]:
        house = House()
        for i in range(25):
            house.news(f"old {i}")
        await asyncio.sleep(0)
        house.written.append([])
        house.news("new", is_first=True)
        return await house.until_quiet()

    slices = asyncio.run(run())
    assert [len(each) for each in slices] == [10, 11, 5]
    assert slices[1][0] == "new"
    assert [name for each in slices for name in each if name != "new"] == [f"old {i}" for i in range(25)]


def test_slices_are_longer_when_there_is_no_end_of_it() -> None:
    count = round((BUSY_AFTER_S + 3 * LONG_SLICE_S) / WRITE_S)
    in_a_long_one = LONG_SLICE_S / WRITE_S
    slices = written(*((str(i), False) for i in range(count)))
    lengths = [len(each) for each in slices]
    assert lengths[0] == lengths[10] == 10
    assert in_a_long_one <= max(lengths) <= in_a_long_one + 1
    assert sum(lengths) == count


def test_however_many_requests_come_a_fifth_of_the_time_is_for_answers_under_way() -> None:
    """Between two slices the loop takes sixteen times as long with requests, and with answers that begin."""

    async def run() -> list[list[str]]:
        house = House()
        for i in range(500):
            house.news(f"old {i}")
        for i in range(4):
            await asyncio.sleep(0)
            house.now += 15 * SLICE_S
            house.news(f"new {i}", is_first=True, then=lambda: setattr(house, "now", house.now + SLICE_S))
            house.written.append([])
        return house.written

    slices = asyncio.run(run())
    assert len(slices[0]) == 10
    for i, each in enumerate(slices[1:4]):
        assert each[0] == f"new {i}"
        assert 16 * 9.5 / 4 <= len(each) - 1 <= 16 * 9.5 / 4 + 3


@given(st.lists(st.booleans(), max_size=80), st.lists(st.integers(0, 79), max_size=8))
def test_everybody_is_called_once_and_in_order(kinds: list[bool], stirring: list[int]) -> None:
    """`stirring`: who brings more news while it writes."""

    async def run() -> list[str]:
        house = House()
        for i, is_first in enumerate(kinds):
            then = (lambda i=i: house.news(f"{i} again", is_first=False)) if i in stirring else None
            house.news(str(i), is_first, then)
        return [name for each in await house.until_quiet() for name in each]

    names = asyncio.run(run())
    assert sorted(names) == sorted([*map(str, range(len(kinds))), *(f"{i} again" for i in {*stirring} if i < len(kinds))])
    for wanted in (True, False):
        mine = [i for i, is_first in enumerate(kinds) if is_first is wanted]
        assert [name for name in names if name in map(str, mine)] == list(map(str, mine))


def test_one_whose_news_cannot_be_told_harms_nobody_else() -> None:
    async def run() -> list[list[str]]:
        def fail() -> None:
            raise RuntimeError("no")

        house = House()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        house.news("first")
        house.news("broken", then=fail)
        house.news("last")
        return await house.until_quiet()

    assert asyncio.run(run()) == [["first", "broken"], ["last"]]
