"""Ranks do the same at the same time, and one that fails ends the waiting of the others."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from diptych.engine import ranks as ranks_module
from diptych.engine.model_runner import Computed, StepOutputs, SyncRunner
from diptych.engine.ranked_runner import RankedRunner
from diptych.engine.ranks import Ranks
from diptych.engine.scheduler import StepPlan

PATIENCE_S = 20.0
NOTHING = StepPlan((), (), ())


def ranks(count: int, on_failure: Callable[[int], None] = lambda rank: None) -> Ranks:
    return Ranks([torch.device("cpu")] * count, on_failure)


def test_results_come_in_the_order_of_ranks() -> None:
    four, barrier = ranks(4), threading.Barrier(4)

    def work(rank: int) -> int:
        barrier.wait(PATIENCE_S)              # nobody gets past unless all work at the same time
        time.sleep(0.01 * (4 - rank))
        return rank * rank

    for _ in range(3):
        assert four.run(work) == [0, 1, 4, 9]
    assert not four.has_failed


def test_rank_0_is_the_caller() -> None:
    idents = ranks(3).run(lambda rank: threading.get_ident())
    assert idents[0] == threading.get_ident()
    assert len(set(idents)) == 3


def test_all_keep_to_rank_0s_choice() -> None:
    three = ranks(3)
    for turn in range(20):
        assert three.run(lambda rank: three.agree(rank, (turn, rank))) == [(turn, 0)] * 3      # noqa: B023


def test_each_thread_computes_with_as_many_threads() -> None:
    """Torch's setting counts for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert ranks(3).run(lambda rank: torch.get_num_threads()) == [1, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_one_that_fails_leaves_nobody_waiting(who: int) -> None:
    barrier, failed = threading.Barrier(3), list[int]()

    def end_waiting(rank: int) -> None:
        failed.append(rank)
        barrier.abort()

    three = ranks(3, end_waiting)

    def work(rank: int) -> None:
        if rank == who:
            raise ValueError(f"rank {rank} of 3")
        barrier.wait(PATIENCE_S)

    began = time.monotonic()
    with pytest.raises(ValueError, match=f"rank {who} of 3"):
        three.run(work)
    assert time.monotonic() - began < PATIENCE_S
    assert three.has_failed
    assert failed[0] == who, "the others have been interrupted"


def test_who_cannot_be_interrupted_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "ABORT_S", 0.05)
    forever, three = threading.Event(), ranks(3)

    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("rank 1")
        if rank == 2:
            forever.wait(PATIENCE_S)

    began = time.monotonic()
    with pytest.raises(ValueError, match="rank 1"):
        three.run(work)
    assert time.monotonic() - began < PATIENCE_S
    forever.set()


def test_closed_ranks_have_no_threads() -> None:
    before = threading.active_count()
    three = ranks(3)
    three.run(lambda rank: None)
    assert threading.active_count() == before + 2
    three.close()
    for _ in range(200):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("who", [0, 1])
def test_who_asks_for_agreement_does_not_wait_for_one_that_has_failed(who: int) -> None:
    two = ranks(2)

    def work(rank: int) -> int:
        if rank == who:
            raise ValueError("gone")
        return two.agree(rank, rank)

    with pytest.raises(ValueError, match="gone"):
        two.run(work)


class Layered(SyncRunner):
    """Its layers take a while, longer in later ranks."""

    def __init__(self, rank: int, log: list[tuple[int, int]], fails_at: int | None = None) -> None:
        self._rank, self._log, self._fails_at = rank, log, fails_at

    def execute(self, plan: StepPlan, on_layer: object) -> list[object]:      # type: ignore[override]
        for layer in range(4):
            if layer == self._fails_at:
                raise ValueError(f"layer {layer}")
            time.sleep(0.005 * self._rank)
            self._log.append((self._rank, layer))
            if callable(on_layer):
                on_layer(layer)
        return [self._rank]


def test_a_layer_is_told_of_when_all_ranks_are_through_with_it() -> None:
    log: list[tuple[int, int]] = []
    told: dict[int, list[tuple[int, int]]] = {}
    runner = RankedRunner(ranks(3), [Layered(rank, log) for rank in range(3)])
    outputs: StepOutputs = runner.launch(NOTHING, lambda layer: told.update({layer: list(log)}))
    assert outputs == Computed([0]), "rank 0 answers"      # type: ignore[list-item]
    assert list(told) == [0, 1, 2, 3]
    for layer, seen in told.items():
        assert {(rank, layer) for rank in range(3)} <= set(seen)


def test_all_ranks_are_roused() -> None:
    roused, runners = list[int](), [Layered(rank, []) for rank in range(3)]
    for rank, each in enumerate(runners):
        each.rouse = lambda rank=rank: roused.append(rank)      # type: ignore[method-assign]
    RankedRunner(ranks(3), runners).rouse()
    assert sorted(roused) == [0, 1, 2]


def test_layers_that_a_rank_has_not_computed_are_not_told_of() -> None:
    log, told = list[tuple[int, int]](), list[int]()
    runner = RankedRunner(ranks(2), [Layered(0, log), Layered(1, log, fails_at=2)])
    began = time.monotonic()
    with pytest.raises(ValueError, match="layer 2"):
        runner.launch(NOTHING, told.append)
    assert time.monotonic() - began < PATIENCE_S
    assert told == [0, 1]
