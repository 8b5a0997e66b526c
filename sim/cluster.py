"""The whole cluster on virtual time: requests in, outcomes out.

    arrival ──hop──► gateway decides ──hop──► prefill worker ──► first token ──hop──► gateway
                                                 │ offer at admission; pages leave over the writer's link
                                                 ▼
                                              decode worker ──► later tokens ──hop──► gateway
"""

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from ..cluster.bench.workload import TimedRequest, Workload
from ..cluster.router.registry import PolicyOptions, make_policy
from ..engine.engine import EngineLimits, SequenceStep
from ..engine.sequence import Sequence
from ..messages.ids import Address, RequestId
from ..messages.membership import Membership, Role
from ..messages.requests import GenerateRequest, LoadReport, TokenDelta, WorkerRef
from .events import Timeline
from .gateway import SimGateway
from .outcome import Outcome
from .settings import Plant
from .worker import Reservation, SimWorker

FIRST_SHARED_TOKEN = 1 << 24
"""Token ids below are of one request alone, those from here on of a shared block."""


@dataclass(eq=False)
class _Handoff:
    reservation: Reservation
    decode: SimWorker
    prefill: SimWorker
    first: TokenDelta | None = None           # set once the prompt is computed
    landed_s: float | None = None             # when the last page of what is reserved can be there, were the prompt computed
    moving_s: float = 0.0


class Simulation:
    def __init__(self, plant: Plant, workload: Workload) -> None:
        self.timeline = Timeline()
        self._plant = plant
        self._workload = workload
        self.workers: dict[WorkerRef, SimWorker] = {}
        for role, count in ((Role.PREFILL, plant.num_prefill), (Role.DECODE, plant.num_decode)):
            for i in range(count):
                self._add_worker(f"{role}-{i}", role)
        addresses = tuple(Address(f"sim://gateway-{i}") for i in range(plant.num_gateways))
        membership = Membership(1, tuple(worker.member for worker in self.workers.values()), addresses)
        self.gateways = [self._make_gateway(i, membership) for i in range(plant.num_gateways)]
        self._gateway_of = {gateway.address: gateway for gateway in self.gateways}
        self._handoffs: dict[RequestId, _Handoff] = {}
        self._reported_s: dict[WorkerRef, float] = {}
        self._num_ended = 0
        self._came_at: dict[tuple[Hashable, ...], float] = {}
        self._late = random.Random(plant.seed)

    def run(self, patience_s: float = 30.0) -> list[Outcome]:
        """In order of arrival; what has not ended `patience_s` after the last arrival stays unfinished."""
        for number, request in enumerate(self._workload.requests):
            self.timeline.at(request.at_s, partial(self._arrive, number, request))
        self._heartbeats()
        end_s = self._workload.span_s + patience_s
        self.timeline.run(end_s, done=lambda: self._num_ended + self._num_refused == len(self._workload))
        outcomes = {name: outcome for gateway in self.gateways for name, outcome in gateway.outcomes.items()}
        return [outcomes[_name(number)] for number in range(len(self._workload))]

    @property
    def _num_refused(self) -> int:
        return sum(gateway.num_refused for gateway in self.gateways)

    def _add_worker(self, name: str, role: Role) -> None:
        plant = self._plant
        budget = plant.prefill_step_tokens if role is Role.PREFILL else plant.decode_step_tokens
        limits = EngineLimits(plant.block_size, plant.max_model_len, budget, plant.max_sequences)
        worker = SimWorker(
            name, role, self.timeline, plant.cost, plant.jitter, plant.num_blocks, limits, plant.padded_rows, plant.tires
        )
        worker.on_steps = lambda steps: self._stepped(worker, steps)
        if role is Role.PREFILL:
            worker.on_admitted = lambda sequence: self._offer(worker, sequence)
        self.workers[worker.ref] = worker

    def _make_gateway(self, number: int, membership: Membership) -> SimGateway:
        plant = self._plant
        policy = make_policy(plant.policy, PolicyOptions(seed=plant.seed * 1000 + 2 * number))
        gateway = SimGateway(f"gateway-{number}", self.timeline, policy, plant.objectives, membership)
        gateway.send = self._deliver
        return gateway

    def _arrive(self, number: int, request: TimedRequest) -> None:
        gateway = self.gateways[number % len(self.gateways)]
        gateway.arrived(_name(number), tokens_of(number, request, self._workload.block_tokens), request.output_tokens)

    def _deliver(self, request: GenerateRequest) -> None:
        worker = self.workers[request.route.first]
        self.timeline.at(self._comes_at(request.gateway, worker.ref), lambda: worker.accept(request))

    def _heartbeats(self) -> None:
        """Workers beat one after the other, gateways look at what waits in between."""
        beat_s, look_s, draw = self._plant.report_every_s, self._plant.look_every_s, random.Random(self._plant.seed)
        for worker in self.workers.values():
            self._repeat(draw.uniform(0, beat_s), beat_s, partial(self._report, worker))
        for gateway in self.gateways:
            self._repeat(draw.uniform(0, look_s), look_s, gateway.look)

    def _repeat(self, first_s: float, every_s: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.timeline.after(every_s, again)

        self.timeline.at(first_s, again)

    def _report(self, worker: SimWorker) -> None:
        self._reported_s[worker.ref] = self.timeline.now
        report = worker.report()
        for gateway in self.gateways:
            self.timeline.at(self._comes_at(worker.ref, gateway.address), partial(self._heard, gateway, worker.ref, report))

    def _heard(self, gateway: SimGateway, worker: WorkerRef, report: LoadReport) -> None:
        gateway.view.heard(worker, report, self.timeline.now)

    def _comes_at(self, *way: Hashable) -> float:
        """A message that leaves now from the first to the second."""
        late_s = self._late.expovariate(1 / self._plant.late_s) if self._plant.late_s else 0.0
        self._came_at[way] = max(self._came_at.get(way, 0.0), self.timeline.now + self._plant.hop_s + late_s)
        return self._came_at[way]

    # a handoff

    def _offer(self, prefill: SimWorker, sequence: Sequence) -> None:
        if sequence.id in self._handoffs or not sequence.hands_off or sequence.request.sampling.max_tokens == 1:
            return
        decode = self.workers[sequence.request.route.decode]
        handoff = _Handoff(Reservation(sequence, lambda _: self._reserved(handoff)), decode, prefill)
        self._handoffs[sequence.id] = handoff
        self.timeline.after(self._plant.hop_s, lambda: decode.offer(handoff.reservation))

    def _reserved(self, handoff: _Handoff) -> None:
        """Pages leave as they are computed, one request after the other over the writer's link."""
        plant, now, sequence = self._plant, self.timeline.now, handoff.reservation.sequence
        num_tokens = len(sequence.request.token_ids) - handoff.reservation.num_cached * plant.block_size
        handoff.moving_s = max(0, num_tokens) * plant.token_bytes / plant.link_bytes_per_s
        handoff.prefill.link_free_s = max(now, handoff.prefill.link_free_s) + handoff.moving_s
        handoff.landed_s = handoff.prefill.link_free_s
        self._land_if_whole(handoff)

    def _land_if_whole(self, handoff: _Handoff) -> None:
        if handoff.first is not None and handoff.landed_s is not None:
            self.timeline.at(max(self.timeline.now, handoff.landed_s) + self._plant.handover_s, lambda: self._landed(handoff))

    def _landed(self, handoff: _Handoff) -> None:
        sequence = handoff.reservation.sequence
        del self._handoffs[sequence.id]
        assert handoff.first is not None
        handoff.decode.adopt(handoff.reservation, handoff.first)
        handoff.prefill.release(sequence)
        view, route = self._gateway_of[sequence.request.gateway].view, sequence.request.route
        view.arrived(sequence.id, route)
        view.moved(route, len(sequence.request.token_ids), handoff.moving_s)

    # tokens

    def _stepped(self, worker: SimWorker, steps: list[SequenceStep]) -> None:
        for step in steps:
            if step.delta is not None:
                self._token(worker, step.sequence, step.delta)
        has_tokens = any(step.delta is not None for step in steps)
        if has_tokens and self.timeline.now - self._reported_s.get(worker.ref, -1.0) >= self._plant.step_report_every_s:
            self._report(worker)

    def _token(self, worker: SimWorker, sequence: Sequence, delta: TokenDelta) -> None:
        if delta.index == 0 or delta.finish is not None:
            gateway = self._gateway_of[sequence.request.gateway]
            outcome, at_s = gateway.outcomes[sequence.id], self._comes_at(worker.ref, gateway.address)
            if delta.index == 0:
                outcome.first_s = at_s
            if delta.finish is not None:
                outcome.last_s = at_s
                self._num_ended += 1
                gateway.view.ended(sequence.id, sequence.request.route, outcome.num_outputs, sequence.request.service_class)
        if delta.index == 0 and worker.role is Role.PREFILL and (handoff := self._handoffs.get(sequence.id)) is not None:
            handoff.first = delta
            self._land_if_whole(handoff)


def tokens_of(number: int, request: TimedRequest, block_tokens: int) -> tuple[int, ...]:
    """Equal blocks hold equal tokens; what follows them is of this request alone."""
    shared = [FIRST_SHARED_TOKEN + block for block in request.block_ids for _ in range(block_tokens)][: request.prompt_tokens]
    if len(shared) == request.prompt_tokens and shared:
        shared[-1] = number                   # no two prompts are equal to the end
    return (*shared, *[number] * (request.prompt_tokens - len(shared)))


def _name(number: int) -> RequestId:
    return RequestId(f"r{number}")
