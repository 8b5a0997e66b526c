"""A worker on virtual time: the production engine, scheduler, block pool, step watch and load report; only the computing is a cost.

    plan() ──► launch() with a runner that knows every answer ──► at the end of its cost: collect() ──► tokens out
      ▲                                                             │
      └──── the next step is planned and queued behind it at once ──┘

So steps are planned one ahead, as on a GPU: what arrives waits for the one under way and the one behind it. A decode worker has room for
a handoff by the receiver's own rule (`has_room`); that handoffs wait for preempted sequences is not modelled.
"""

import random
from collections.abc import Callable, Hashable
from functools import cache
from typing import Protocol

from ..decode_worker.admission import has_room
from ..engine.calibration import calibrate
from ..engine.engine import Engine, EngineLimits, SequenceStep
from ..engine.load import load_report
from ..engine.model_runner import ChunkOutput, Computed, StepOutputs
from ..engine.pace import Pacer
from ..engine.predictor import features_of
from ..engine.sampler import Sampled
from ..engine.scheduler import StepPlan
from ..engine.sequence import Sequence
from ..engine.step_watch import StepWatch
from ..messages.ids import Address, BlockId, Epoch, WorkerId
from ..messages.membership import Member, Role
from ..messages.requests import GenerateRequest, LoadReport, TokenDelta, WorkerRef
from ..messages.steps import StepFeatures, StepModel
from .events import Timeline

CALIBRATION_S = 60.0
"""Of virtual time: all of the start-up's grid."""


class StepCost(Hashable, Protocol):
    def step_s(self, features: StepFeatures) -> float: ...


class KnownAnswers:
    """A runner to whom every next token is 0, and whose own clock shows what its steps cost so far."""

    runs_ahead = True
    padded_rows = ()

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.busy_s = 0.0

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> StepOutputs:
        self.busy_s += self._cost.step_s(features_of(plan))
        return Computed([ChunkOutput(Sampled(0) if chunk.samples else None) for chunk in plan.chunks])

    def rouse(self) -> None:
        return


class Reservation:
    """A handoff's place on its decode worker; `ready` is called when it has blocks."""

    def __init__(self, sequence: Sequence, ready: Callable[["Reservation"], None]) -> None:
        self.sequence = sequence
        self.ready = ready
        self.blocks: list[BlockId] | None = None
        self.num_cached = 0


@cache
def known_at_start(cost: StepCost, limits: EngineLimits) -> StepModel:
    """What a worker has learned when it begins to serve."""
    runner = KnownAnswers(cost)
    return calibrate(runner, limits, lambda: runner.busy_s, CALIBRATION_S)


class SimWorker:
    def __init__(
        self,
        name: str,
        role: Role,
        timeline: Timeline,
        cost: StepCost,
        jitter: float,
        num_blocks: int,
        limits: EngineLimits,
        padded_rows: tuple[int, ...] = (),
        tires: float = 0.0,
    ) -> None:
        self.ref = WorkerRef(WorkerId(name), Epoch(1), Address(f"sim://{name}"))
        self.role = role
        self.engine = Engine(KnownAnswers(cost), num_blocks, limits)
        self.link_free_s = 0.0                # when what leaves over this worker's link so far has left
        self.on_admitted: Callable[[Sequence], None] = lambda sequence: None
        self.on_steps: Callable[[list[SequenceStep]], None] = lambda steps: None
        self._timeline = timeline
        self._cost = cost
        self._jitter = jitter
        self._tires = tires
        self._random = random.Random(name)
        self._steps = StepWatch(known_at_start(cost, limits))
        self.engine.scheduler.pacer = Pacer(
            lambda: timeline.now, lambda: self._steps.model, self._steps.busy_s, padded_rows
        )
        self._free_at = 0.0                   # when all steps that were launched have ended
        self._offered: list[Reservation] = []                    # oldest first; without blocks
        self._reserved: list[Reservation] = []

    @property
    def member(self) -> Member:
        limits = self.engine.limits
        return Member(self.ref, self.role, "sim", limits.block_size, self.engine.pool.num_blocks, limits.max_model_len)

    def report(self) -> LoadReport:
        leaving = sum(sequence.hands_off and sequence.was_admitted for sequence in self.engine.sequences)
        handoffs = leaving + len(self._offered) + len(self._reserved)
        return load_report(self.ref, self.engine, handoffs, self._steps, self._timeline.now, leaving)

    def accept(self, request: GenerateRequest) -> None:
        self.engine.add(request, self._timeline.now, hands_off=request.route.prefill is not None)
        self._go_on()

    def release(self, sequence: Sequence) -> None:
        """The decode worker has its KV."""
        self.engine.finish(sequence)
        self._go_on()

    def offer(self, reservation: Reservation) -> None:
        self._offered.append(reservation)
        self._reserve()

    def cancel(self, reservation: Reservation) -> None:
        if reservation in self._offered:
            self._offered.remove(reservation)
        else:
            self._reserved.remove(reservation)
            self.engine.scheduler.num_reserved -= 1
            self.engine.pool.release(reservation.blocks or [])

    def adopt(self, reservation: Reservation, first: TokenDelta) -> None:
        self._reserved.remove(reservation)
        self.engine.scheduler.num_reserved -= 1
        assert reservation.blocks is not None
        self.engine.adopt(reservation.sequence.request, first, reservation.blocks, self._timeline.now)
        self._go_on()

    def _reserve(self) -> None:
        """For those that wait, oldest first, until one does not fit."""
        pool, scheduler, limits = self.engine.pool, self.engine.scheduler, self.engine.limits
        while self._offered:
            sequence = self._offered[0].sequence
            prefix = pool.match(sequence.hashes[: len(sequence.request.token_ids) // limits.block_size])
            num_new = scheduler.blocks_for(len(sequence.request.token_ids)) - len(prefix)
            if not has_room(pool, num_new, scheduler.num_reserved + len(scheduler.running), limits.max_sequences):
                return
            blocks = pool.take(num_new, prefix)
            if blocks is None:
                return
            reservation = self._offered.pop(0)
            reservation.blocks, reservation.num_cached = blocks, len(prefix)
            self._reserved.append(reservation)
            scheduler.num_reserved += 1
            reservation.ready(reservation)

    def _go_on(self) -> None:
        while self.engine.may_plan and (self.engine.scheduler.running or self.engine.scheduler.waiting):
            plan = self.engine.plan()
            if not plan.chunks:
                return
            for sequence in plan.admitted:
                self.on_admitted(sequence)
            self._launch(plan)

    def _launch(self, plan: StepPlan) -> None:
        features, now = features_of(plan), self._timeline.now
        self._steps.launched(features, now)
        self.engine.launch(plan)
        slower = 1 + self._tires * self._steps.prefill_share.at(now)
        step_s = self._cost.step_s(features) * slower * self._random.lognormvariate(0.0, self._jitter)
        self._free_at = max(now, self._free_at) + step_s
        self._timeline.at(self._free_at, self._collect)

    def _collect(self) -> None:
        steps = self.engine.collect()
        self._steps.collected(self._timeline.now)
        self._steps.learn()
        self.on_steps(steps)
        self.engine.publish()
        self._reserve()
        self._go_on()
