"""A worker on virtual time: the production engine, scheduler, block pool, predictor and load report; only the computing is a cost.

    plan() ──► cost of the plan ──► later: execute() with a runner that knows every answer ──► tokens out, next plan
      │
      └─ decodes alone, none of which will end ──► a leap: many such steps as one event, cut short when anything else happens

A leap gives what its steps would have given one by one (but for one draw of jitter). A decode worker has room for a
handoff by the receiver's own rule (`has_room`); that handoffs wait for preempted sequences is not modelled.
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from ..decode_worker.admission import has_room
from ..engine.engine import Engine, EngineLimits, SequenceStep
from ..engine.load import PrefillShare, load_report
from ..engine.model_runner import ChunkOutput, SyncRunner
from ..engine.pace import Pacer
from ..engine.predictor import StepPredictor, features_of
from ..engine.sampler import Sampled
from ..engine.scheduler import Chunk, StepPlan
from ..engine.sequence import Sequence
from ..messages.ids import Address, BlockId, Epoch, WorkerId
from ..messages.membership import Member, Role
from ..messages.requests import GenerateRequest, LoadReport, TokenDelta, WorkerRef
from ..messages.steps import StepFeatures, StepModel
from .events import Timeline
from .h200 import MEASURED


class KnownAnswers(SyncRunner):
    """A runner to whom every next token is 0."""

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        return [ChunkOutput(Sampled(0) if chunk.samples else None) for chunk in plan.chunks]


class Reservation:
    """A handoff's place on its decode worker; `ready` is called when it has blocks."""

    def __init__(self, sequence: Sequence, ready: Callable[["Reservation"], None]) -> None:
        self.sequence = sequence
        self.ready = ready
        self.blocks: list[BlockId] | None = None
        self.num_cached = 0


@dataclass(eq=False)
class Leap:
    plan: StepPlan                            # of its first step
    ends_s: list[float]                       # of each step
    features: StepFeatures                    # of its first step
    first_s: float                            # its duration


MAX_LEAP = 64
START_ROUNDS = 8


@cache
def measured_at_start(cost: StepModel) -> StepModel:
    """What a worker knows when it begins to serve: the fit of its own start-up grid."""
    predictor = StepPredictor()
    for features, _ in MEASURED * START_ROUNDS:
        predictor.observe(features, cost.step_s(features))
    return predictor.model


class SimWorker:
    def __init__(
        self, name: str, role: Role, timeline: Timeline, cost: StepModel, jitter: float, num_blocks: int, limits: EngineLimits
    ) -> None:
        self.ref = WorkerRef(WorkerId(name), Epoch(1), Address(f"sim://{name}"))
        self.role = role
        self.engine = Engine(KnownAnswers(), num_blocks, limits)
        self.link_free_s = 0.0                # when what leaves over this worker's link so far has left
        self.on_admitted: Callable[[Sequence], None] = lambda sequence: None
        self.on_steps: Callable[[list[SequenceStep]], None] = lambda steps: None
        self._timeline = timeline
        self._cost = cost
        self._jitter = jitter
        self._random = random.Random(name)
        self._predictor = StepPredictor(prior=measured_at_start(cost))
        self._share = PrefillShare()
        self.engine.scheduler.pacer = Pacer(lambda: timeline.now, lambda: self._predictor.model)
        self._busy = False
        self._leap: Leap | None = None
        self._offered: list[Reservation] = []                    # oldest first; without blocks
        self._reserved: list[Reservation] = []

    @property
    def member(self) -> Member:
        limits = self.engine.limits
        return Member(self.ref, self.role, "sim", limits.block_size, self.engine.pool.num_blocks, limits.max_model_len)

    def report(self) -> LoadReport:
        self._cut_leap()
        handoffs = len(self._offered) + len(self._reserved)
        return load_report(self.ref, self.engine, handoffs, self._share, self._predictor.model, self._timeline.now)

    def accept(self, request: GenerateRequest) -> None:
        self._cut_leap()
        self.engine.add(request, self._timeline.now, hands_off=self.role is Role.PREFILL)
        self._go_on()

    def release(self, sequence: Sequence) -> None:
        """The decode worker has its KV."""
        self.engine.finish(sequence)
        self._go_on()

    def offer(self, reservation: Reservation) -> None:
        self._cut_leap()
        self._offered.append(reservation)
        self._reserve()

    def cancel(self, reservation: Reservation) -> None:
        if reservation in self._offered:
            self._offered.remove(reservation)
        else:
            self._reserved.remove(reservation)
            self.engine.pool.release(reservation.blocks or [])

    def adopt(self, reservation: Reservation, first: TokenDelta) -> None:
        self._reserved.remove(reservation)
        assert reservation.blocks is not None
        self._cut_leap()
        self.engine.adopt(reservation.sequence.request, first, reservation.blocks, self._timeline.now)
        self._go_on()

    def _reserve(self) -> None:
        """For those that wait, oldest first, until one does not fit."""
        pool, limits = self.engine.pool, self.engine.limits
        while self._offered:
            sequence = self._offered[0].sequence
            prefix = pool.match(sequence.hashes[: len(sequence.request.token_ids) // limits.block_size])
            num_new = self.engine.scheduler.blocks_for(len(sequence.request.token_ids)) - len(prefix)
            if not has_room(pool, num_new, len(self._reserved) + len(self.engine.scheduler.running), limits.max_sequences):
                return
            blocks = pool.take(num_new, prefix)
            if blocks is None:
                return
            reservation = self._offered.pop(0)
            reservation.blocks, reservation.num_cached = blocks, len(prefix)
            self._reserved.append(reservation)
            reservation.ready(reservation)

    def _go_on(self) -> None:
        if self._busy:
            return
        plan = self.engine.plan()
        if not plan.chunks:
            return
        for sequence in plan.admitted:
            self.on_admitted(sequence)
        features = features_of(plan)
        jitter = self._random.lognormvariate(0.0, self._jitter)
        num_steps = self._num_alike(plan) if features.prefill_tokens == 0 else 1
        if num_steps > 1:
            self._start_leap(plan, features, num_steps, jitter)
        else:
            seconds = self._cost.step_s(features) * jitter
            self._start_step(plan, features, seconds, self._timeline.now + seconds)

    def _start_step(self, plan: StepPlan, features: StepFeatures, seconds: float, ends_s: float) -> None:
        self._busy = True
        self._timeline.at(ends_s, lambda: self._computed(plan, features, seconds))

    def _computed(self, plan: StepPlan, features: StepFeatures, seconds: float) -> None:
        steps = self.engine.execute(plan)
        self._predictor.observe(features, seconds)
        model = self._predictor.model
        self._share.add(model.prefill_s(features.prefill_tokens, features.prefill_pairs), self._timeline.now)
        self._busy = False
        self.on_steps(steps)
        self._reserve()
        self._go_on()

    # leaps

    def _num_alike(self, plan: StepPlan) -> int:
        """Steps from this one on that decode the same sequences: nobody ends in them, nobody is admitted, memory suffices."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        if scheduler.waiting or len(plan.chunks) < len(scheduler.running):
            return 1
        left = min(chunk.sequence.request.sampling.max_tokens - chunk.sequence.num_outputs for chunk in plan.chunks) - 1
        num_steps = min(left, MAX_LEAP)
        blocks_each = 1 + num_steps // self.engine.limits.block_size
        return num_steps if len(plan.chunks) * blocks_each <= pool.num_available else 1

    def _start_leap(self, plan: StepPlan, features: StepFeatures, num_steps: int, jitter: float) -> None:
        first_s, more_s = self._cost.step_s(features), self._cost.decode_context_s * features.num_decoding
        durations = ((first_s + i * more_s) * jitter for i in range(num_steps))
        ends_s = list(accumulate(durations, initial=self._timeline.now))[1:]
        self._leap = leap = Leap(plan, ends_s, features, first_s * jitter)
        self._busy = True
        self._timeline.at(leap.ends_s[-1], lambda: self._end_leap(leap))

    def _end_leap(self, leap: Leap) -> None:
        if self._leap is leap:
            self._leap, self._busy = None, False
            self._advance(leap, len(leap.ends_s))
            self._reserve()
            self._go_on()

    def _cut_leap(self) -> None:
        """Something is about to change: the steps that are over become fact, and the one under way an ordinary one."""
        leap, self._leap = self._leap, None
        if leap is None:
            return
        num_over = bisect_right(leap.ends_s, self._timeline.now)
        if num_over == 0:
            self._start_step(leap.plan, leap.features, leap.first_s, leap.ends_s[0])
            return
        self._advance(leap, num_over)
        if num_over == len(leap.ends_s):
            self._busy = False
            self._go_on()
        else:
            plan, started_s, ends_s = self.engine.plan(), leap.ends_s[num_over - 1], leap.ends_s[num_over]
            self._start_step(plan, features_of(plan), ends_s - started_s, ends_s)

    def _advance(self, leap: Leap, num_steps: int) -> None:
        """Does at once what so many steps do."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        for chunk in leap.plan.chunks:
            sequence = chunk.sequence
            sequence.token_ids += [0] * num_steps
            missing = scheduler.blocks_for(len(sequence.token_ids) - 1) - len(sequence.blocks)
            if missing > 0:
                blocks = pool.take(missing)
                assert blocks is not None, "a leap was longer than memory allows"
                sequence.blocks += blocks
            scheduler.computed(Chunk(sequence, sequence.num_computed, num_steps))
        self._predictor.observe(leap.features, leap.first_s)
