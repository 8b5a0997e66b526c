"""Ranks do the same at the same time, and one that fails ends the waiting of the others."""

import threading
import time

import pytest
import torch

from diptych.engine.model_runner import Computed, StepOutputs, SyncRunner
from diptych.engine.ranked_runner import RankedRunner
from diptych.engine.ranks import Ranks
from diptych.engine.scheduler import StepPlan

PATIENCE_S = 20.0
NOTHING = StepPlan((), (), ())


def ranks(count: int, on_failure: object = None) -> Ranks:
    return Ranks([torch.device("cpu")] * count, on_failure if callable(on_failure) else lambda: None)


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
    barrier = threading.Barrier(3)
    three = ranks(3, barrier.abort)

    def work(rank: int) -> None:
        if rank == who:
            raise ValueError(f"rank {rank} of 3")
        barrier.wait(PATIENCE_S)

    began = time.monotonic()
    with pytest.raises(ValueError, match=f"rank {who} of 3"):
        three.run(work)
    assert time.monotonic() - began < PATIENCE_S
    assert three.has_failed


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


def test_nobody_waits_for_the_layers_of_a_rank_that_has_failed() -> None:
    log: list[tuple[int, int]] = []
    runner = RankedRunner(ranks(2), [Layered(0, log), Layered(1, log, fails_at=2)])
    began = time.monotonic()
    with pytest.raises(ValueError, match="layer 2"):
        runner.launch(NOTHING, lambda layer: None)
    assert time.monotonic() - began < PATIENCE_S
