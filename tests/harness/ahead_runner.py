"""A runner as a GPU's: a step is computed only when it is waited for, from the blocks and tokens of its launch; it runs one step ahead."""

from collections.abc import Callable
from dataclasses import dataclass

from diptych.engine.fake_runner import FakeRunner, kv_of
from diptych.engine.model_runner import ChunkOutput, StepOutputs
from diptych.engine.sampler import Sampled
from diptych.engine.scheduler import StepPlan
from diptych.engine.sequence import PENDING, Sequence
from diptych.kvtransfer.transport import KVPool


@dataclass(frozen=True)
class Snapshot:
    sequence: Sequence
    blocks: list[int]
    token_ids: list[int]
    start: int
    end: int
    samples: bool


class AheadRunner(FakeRunner):
    runs_ahead = True

    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        self.num_waited = 0
        self.most_ahead = 0
        self._launched: list[list[Snapshot]] = []
        self._last: dict[Sequence, int] = {}           # what the step that was computed last has sampled

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        step = [
            Snapshot(c.sequence, list(c.sequence.blocks), list(c.sequence.token_ids), c.start, c.end, c.samples) for c in plan.chunks
        ]
        if on_layer is not None:
            for layer in range(self._pool.layout.num_layers):
                on_layer(layer)
        self._launched.append(step)
        self.most_ahead = max(self.most_ahead, len(self._launched) - self.num_waited)
        return Later(self, len(self._launched) - 1)

    def compute(self, index: int) -> list[ChunkOutput]:
        assert index == self.num_waited, "steps are waited for in order"
        self.num_waited += 1
        step = self._launched[index]
        tokens = [self._known(snapshot) for snapshot in step]
        for layer in range(self._pool.layout.num_layers):
            for snapshot, ids in zip(step, tokens, strict=True):
                for position in range(snapshot.start, snapshot.end):
                    block, offset = self._place(snapshot, position)
                    self._pool.tensor[block, layer, :, 0, offset, 0] = kv_of(ids[position], position, layer)
        sampled = [self._sample(snapshot) if snapshot.samples else None for snapshot in step]
        self._last = {s.sequence: token for s, token in zip(step, sampled, strict=True) if token is not None}
        return [ChunkOutput(None if token is None else Sampled(token)) for token in sampled]

    def _known(self, snapshot: Snapshot) -> list[int]:
        ids = snapshot.token_ids
        return [*ids[:-1], self._last[snapshot.sequence]] if ids[-1] == PENDING else ids

    def _place(self, snapshot: Snapshot, position: int) -> tuple[int, int]:
        block_size = self._pool.layout.block_size
        return snapshot.blocks[position // block_size], position % block_size

    def _sample(self, snapshot: Snapshot) -> int:
        return self.token_after([self._place(snapshot, position) for position in range(snapshot.end)])


@dataclass(frozen=True)
class Later:
    runner: AheadRunner
    index: int

    def is_ready(self) -> bool:
        return True

    def wait(self) -> list[ChunkOutput]:
        return self.runner.compute(self.index)
