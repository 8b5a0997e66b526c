"""An idle worker looks whether its steps are shorter than it has learned. One that was disturbed as it calibrated reports steps some times
as long as they are; a router then sends it nothing, and from nothing it would learn no better.

    nothing came or was computed for REST_S, nobody holds a block ──► a small step on free blocks, and SOON_S later another kind, …
          ▲                                                             └──► any far shorter than predicted? learned from, all together
          └──── RARELY_S later ◄──────────────────────────────────────────────┘

What was not shorter teaches nothing: a busy neighbour would make an idle worker look slow, and the predictor would forget what requests
have taught it. That steps are longer than predicted requests will teach. No step is ever measured too short, so that what is learned is
repeated until it is believed.

What it costs: at most one part in IDLE_SHARE of the time; and a request that comes meanwhile waits for a step that is expected to take
LONGEST_S at most, or for two of less than TWICE_S. Blocks that hold anything, cached prefixes too, are left alone. Not for a runner that
runs ahead (a GPU's, which has its device to itself as it calibrates). All ranks of a worker take part, as in any step.
"""

from collections.abc import Callable

from ..messages.steps import StepFeatures
from .calibration import ROUNDS, shortest_s, small_steps
from .engine import Engine
from .predictor import features_of
from .scheduler import StepPlan
from .step_watch import StepWatch

REST_S = 5.0                    # since the last message or step
SOON_S, RARELY_S = 1.0, 10.0    # from one small step to the next, from the last kind to the first
IDLE_SHARE = 200
TWICE_S = 0.02                  # a second run: of the first the caches were cold
LONGEST_S = 0.25
FAR_SHORTER = 0.8               # of what was predicted


class IdleRefresh:
    def __init__(self, engine: Engine, steps: StepWatch, clock: Callable[[], float]) -> None:
        self._engine, self._steps, self._clock = engine, steps, clock
        self._plans, self._next = small_steps(engine.limits), 0
        self._measured: list[tuple[StepFeatures, float]] = []    # since the first kind
        self._due_at = clock() + REST_S

    def put_off(self, now: float) -> None:
        """The worker is not idle."""
        self._due_at = max(self._due_at, now + REST_S)
        self._next = 0
        self._measured.clear()

    def look(self, now: float) -> None:
        """Nobody waits for anything. Takes as long as a small step, if it is time for one."""
        if now < self._due_at or self._engine.runner.runs_ahead:
            return
        self._measure(self._plans[self._next])
        took_s, self._next = self._clock() - now, (self._next + 1) % len(self._plans)
        if self._next == 0:
            self._learn()
        self._due_at = now + took_s + max(SOON_S if self._next else RARELY_S, IDLE_SHARE * took_s)

    def _measure(self, plan: StepPlan) -> None:
        """If it will not take too long, as far as is known by now, and there are enough free blocks."""
        features, pool, sequences = features_of(plan), self._engine.pool, [chunk.sequence for chunk in plan.chunks]
        num_blocks = max(len(sequence.blocks) for sequence in sequences)
        factor = min([1.0, *(seconds / self._steps.model.step_s(each) for each, seconds in self._measured)])
        if factor * self._steps.model.step_s(features) > LONGEST_S or pool.num_free < num_blocks:
            return
        blocks = pool.take(num_blocks)
        assert blocks is not None
        for sequence in sequences:
            sequence.blocks = blocks[: len(sequence.blocks)]
        self._measured.append((features, shortest_s(self._engine.runner, plan, self._clock, 1, 2, TWICE_S)))
        pool.release(blocks)

    def _learn(self) -> None:
        told = [(features, min(seconds, self._steps.model.step_s(features))) for features, seconds in self._measured]
        self._measured.clear()
        for _ in range(ROUNDS):
            if all(seconds >= FAR_SHORTER * self._steps.model.step_s(features) for features, seconds in told):
                return
            for features, seconds in told:
                self._steps.observe(features, seconds)
