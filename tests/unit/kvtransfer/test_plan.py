"""Under any schedule of chunks and layer groups, and however late the receiver accepts: each page exactly once, and in time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer import plan as plan_module
from diptych.kvtransfer.plan import PagePlan, leave_after
from diptych.messages.ids import BlockId


@dataclass(frozen=True)
class Schedule:
    """`ready[i]` leading blocks are complete after chunk i; the receiver accepts after `accepted_at` layer groups of the whole."""

    num_layers: int
    layer_group: int
    num_skipped: int
    src: list[BlockId]
    dst: list[BlockId]
    ready: list[int]
    accepted_at: int


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_blocks = draw(st.integers(1, 12))
    num_skipped = draw(st.integers(0, num_blocks))
    num_layers = draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 99).map(BlockId), min_size=num_blocks, max_size=num_blocks, unique=True)
    ready = [*sorted(draw(st.lists(st.integers(0, num_blocks), max_size=6))), num_blocks]
    accepted_at = draw(st.integers(0, num_layers * len(ready)))
    return Schedule(num_layers, draw(st.integers(1, 7)), num_skipped, draw(ids), draw(ids)[num_skipped:], ready, accepted_at)


def groups(schedule: Schedule) -> Iterator[range]:
    bounds = [*range(0, schedule.num_layers, schedule.layer_group), schedule.num_layers]
    return (range(*each) for each in pairwise(bounds))


@settings(max_examples=300)
@given(schedule=schedules(), few=st.sampled_from([0, 10, 64]))
def test_each_page_once_when_ready_and_all_by_the_end(schedule: Schedule, few: int) -> None:
    with mock.patch.object(plan_module, "FEW_PAGES", few):
        check(schedule)


def check(schedule: Schedule) -> None:
    pages = PagePlan(schedule.num_layers, schedule.src, schedule.dst, schedule.num_skipped)
    complete = [0] * schedule.num_layers               # blocks that the model has finished, by layer
    handed: dict[int, int] = {}
    num_groups = 0

    def take(layers: range, num_ready: int) -> None:
        writes = pages.take(layers, num_ready)
        assert len(writes.src) == len(writes.dst)
        for src, dst in zip(writes.src, writes.dst, strict=True):
            src, dst = int(src), int(dst)
            block, layer = divmod(src, schedule.num_layers)
            index = schedule.src.index(BlockId(block))
            assert layer in layers
            assert schedule.num_skipped <= index < complete[layer], "handed out before it was computed, or although it was skipped"
            assert dst == schedule.dst[index - schedule.num_skipped] * schedule.num_layers + layer
            assert src not in handed, "handed out twice"
            handed[src] = dst

    for chunk, num_ready in enumerate(schedule.ready):
        for layers in groups(schedule):
            for layer in layers:
                complete[layer] = num_ready
            num_groups += 1
            if num_groups > schedule.accepted_at:
                if num_groups == schedule.accepted_at + 1:
                    take(range(schedule.num_layers), schedule.ready[chunk - 1] if chunk else 0)     # what was ready before
                take(layers, num_ready)
        if num_groups > schedule.accepted_at:
            take(range(schedule.num_layers), num_ready)
    take(range(schedule.num_layers), len(schedule.src))
    assert pages.finished
    assert len(handed) == len(set(handed.values())) == pages.num_pages == len(schedule.dst) * schedule.num_layers


@given(num_layers=st.integers(1, 40), layer_group=st.integers(1, 12))
def test_pages_leave_by_groups_or_gathered_in_two_goes(num_layers: int, layer_group: int) -> None:
    groups, gathered = (
        [layer + 1 for layer in range(num_layers) if leave_after(layer, num_layers, layer_group, gathers)] for gathers in (False, True)
    )
    assert groups == sorted({*range(layer_group, num_layers + 1, layer_group), num_layers})
    assert gathered == groups[-2:]


def test_pages_are_handed_out_block_by_block() -> None:
    plan = PagePlan(8, [BlockId(5), BlockId(2)], [BlockId(1), BlockId(7)], num_skipped=0)
    writes = plan.take(range(3), 2)
    assert (writes.src, writes.dst) == ([40, 41, 42, 16, 17, 18], [8, 9, 10, 56, 57, 58])


def test_readiness_that_goes_back_hands_nothing_out_again() -> None:
    plan = PagePlan(1, [BlockId(5), BlockId(6)], [BlockId(1), BlockId(2)], num_skipped=0)
    assert plan.take(range(1), 2).src == [5, 6]
    assert plan.take(range(1), 1).src == []
    assert plan.take(range(1), 2).src == []


def test_not_finished_while_a_layer_is_behind() -> None:
    plan = PagePlan(2, [BlockId(5)], [BlockId(1)], num_skipped=0)
    plan.take(range(1), 1)
    assert not plan.finished
    plan.take(range(1, 2), 1)
    assert plan.finished


def test_all_skipped_is_finished_from_the_start() -> None:
    plan = PagePlan(2, [BlockId(5)], [], num_skipped=1)
    assert plan.finished
    assert plan.num_pages == 0
    assert plan.take(range(2), 1).src == []


@pytest.mark.parametrize(("num_skipped", "num_dst"), [(0, 1), (1, 2), (3, 0), (2, 1)])
def test_block_counts_that_do_not_add_up_are_refused(num_skipped: int, num_dst: int) -> None:
    dst = [BlockId(i) for i in range(num_dst)]
    with pytest.raises(ValueError, match=f"{num_skipped} skipped \\+ {num_dst} to write are not 2 blocks"):
        PagePlan(1, [BlockId(0), BlockId(1)], dst, num_skipped)
