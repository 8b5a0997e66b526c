"""One step in all ranks of a worker. Rank 0 samples and answers; the others compute their part of the layers.

    launch(plan) ─► rank 0: layer 0 … layer n ─► sample ─► outputs
                    rank 1: layer 0 … layer n
                               └─ on_layer(0), once all ranks are through with (on a GPU: have queued) layer 0
"""

import threading
from collections.abc import Callable, Sequence

from .model_runner import ModelRunner, StepOutputs
from .ranks import Ranks
from .scheduler import StepPlan

LOOK_S = 0.1                    # whether a rank has failed


class RankedRunner:
    """`runners`: of each rank, alike but for who samples."""

    def __init__(self, ranks: Ranks, runners: Sequence[ModelRunner]) -> None:
        assert len(ranks) == len(runners)
        self._ranks, self.runners = ranks, tuple(runners)
        self.runs_ahead = runners[0].runs_ahead

    @property
    def padded_rows(self) -> Sequence[int]:
        return self.runners[0].padded_rows

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        hooks: list[Callable[[int], None] | None] = [None] * len(self.runners)
        if on_layer is not None:
            layers = _Layers(self._ranks)
            hooks = [layers.then(on_layer), *(layers.of(rank) for rank in range(1, len(self.runners)))]
        return self._ranks.run(lambda rank: self.runners[rank].launch(plan, hooks[rank]))[0]


class _Layers:
    """How far the ranks are in a step."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._num_done = [0] * len(ranks)
        self._changed = threading.Condition()

    def of(self, rank: int) -> Callable[[int], None]:
        def finished(layer: int) -> None:
            with self._changed:
                self._num_done[rank] = layer + 1
                self._changed.notify()

        return finished

    def then(self, on_layer: Callable[[int], None]) -> Callable[[int], None]:
        """For rank 0: the others first."""

        def finished(layer: int) -> None:
            with self._changed:
                while min(self._num_done[1:]) <= layer and not self._ranks.has_failed:
                    self._changed.wait(LOOK_S)
            on_layer(layer)

        return finished
