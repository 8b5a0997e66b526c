"""A scheduler driven through jobs: random ones, whose every plan is checked, or a few by example."""

import math
from collections import Counter
from dataclasses import dataclass

from diptych.engine import scheduler
from diptych.engine.block_pool import BlockPool
from diptych.engine.pace import AIM, Pacer
from diptych.engine.predictor import features_of
from diptych.engine.scheduler import Scheduler, StepPlan
from diptych.engine.sequence import Sequence, SequenceState
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, ServiceClass, WorkerRef
from diptych.messages.steps import StepModel

HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))
BLOCK_SIZE = 4
COST = StepModel(base_s=5e-3, prefill_token_s=1e-3, prefill_pair_s=1e-5, decode_sequence_s=1e-4, decode_context_s=1e-5, error=0.0)
BATCH, PRIORITY = ServiceClass.BATCH, ServiceClass.PRIORITY


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    num_outputs: int
    arrives: int = 0                        # before this step
    ttft: float = float("inf")
    aborted_at: int | None = None           # before this step
    adopted: bool = False                   # its prompt's KV came from elsewhere
    scored: bool = False                    # wants logprobs of its prompt
    tier: ServiceClass = ServiceClass.DEFAULT
    tpot: float | None = None


@dataclass(frozen=True)
class Machine:
    num_blocks: int
    max_step_tokens: int
    max_sequences: int
    prefix_cache: bool = True
    paced: bool = False


class Run:
    """Drives a scheduler through jobs as an engine does, but with made-up tokens, and checks every plan."""

    def __init__(self, machine: Machine, jobs: list[Job]) -> None:
        self.machine = machine
        self.pool = BlockPool(machine.num_blocks, machine.prefix_cache)
        self.now = 0.0
        pacer = Pacer(lambda: self.now, lambda: COST) if machine.paced else None
        self.scheduler = Scheduler(self.pool, BLOCK_SIZE, machine.max_step_tokens, machine.max_sequences, pacer)
        self.jobs = jobs
        self.sequences: dict[int, Sequence] = {}
        self.refused: set[int] = set()
        self.num_preempted = 0

    def go(self) -> None:
        step = 0
        while not self.done:
            assert step < 1500, "jobs do not end"
            self.arrive_and_leave(step)
            waiting = list(self.scheduler.waiting)
            decoding = [s for s in self.scheduler.running if s.is_decoding]
            prompts = [s for s in [*waiting, *self.scheduler.running] if not (s.fills_in or s.is_decoding)]
            may_preempt = self.scheduler.may_preempt or not self.scheduler.can_grow_all
            plan = self.scheduler.schedule()
            assert may_preempt or not plan.preempted, "an engine that runs ahead would not have asked"
            self.check(plan, waiting, decoding, prompts)
            self.compute(plan)
            self.now += COST.step_s(features_of(plan))
            step += 1
        assert self.pool.num_held == 0
        assert not self.scheduler.running
        assert not self.scheduler.waiting

    @property
    def done(self) -> bool:
        ended = [s.state is SequenceState.FINISHED for s in self.sequences.values()]
        return len(ended) + len(self.refused) == len(self.jobs) and all(ended)

    def arrive_and_leave(self, step: int) -> None:
        for number, job in enumerate(self.jobs):
            if job.arrives == step:
                self.arrive(number, job)
            elif number in self.sequences and job.aborted_at == step and self.sequences[number].state is not SequenceState.FINISHED:
                self.scheduler.finish(self.sequences[number])

    def arrive(self, number: int, job: Job) -> None:
        sampling = SamplingParams(max_tokens=job.num_outputs, seed=0, prompt_logprobs=0 if job.scored else None)
        request = GenerateRequest(
            RequestId(f"r{number}"),
            Address("fake://g"),
            job.prompt,
            sampling,
            HERE,
            timeout_s=1.0,
            tpot_slo_s=job.tpot,
            service_class=job.tier,
        )
        sequence = Sequence(request, number, deadline=self.now + 1.0, ttft_deadline=self.now + job.ttft, hands_off=False, max_len=1 << 20)
        if not job.adopted:
            self.scheduler.add(sequence)
        elif len(self.scheduler.running) < self.machine.max_sequences and (blocks := self.pool.take(-(-len(job.prompt) // BLOCK_SIZE))):
            sequence.blocks, sequence.num_computed = blocks, len(job.prompt)
            sequence.token_ids.append(7)
            self.scheduler.adopt(sequence)
        else:
            self.refused.add(number)
            return
        self.sequences[number] = sequence

    def check(self, plan: StepPlan, waiting: list[Sequence], decoding: list[Sequence], urgent: list[Sequence]) -> None:
        """`urgent`: prompts that are no batch work."""
        machine, in_plan = self.machine, [chunk.sequence for chunk in plan.chunks]
        self.num_preempted += len(plan.preempted)
        assert len(set(map(id, in_plan))) == len(in_plan) <= machine.max_sequences
        assert len(self.scheduler.running) <= machine.max_sequences

        # Decodes never starve: each is in the plan, or was preempted by an earlier one, or is batch work that gives way.
        left_out = [s for s in decoding if s not in in_plan and s not in plan.preempted]
        stayed = [s for s in decoding if s in in_plan]
        assert stayed == in_plan[: len(stayed)]
        if left_out:
            self.check_left_out(left_out, decoding, plan, urgent)
        # Prompts: within what decodes leave of the budget, but for one token that they always get.
        prompts = [chunk for chunk in plan.chunks if chunk.sequence not in decoding]
        room = max(1, machine.max_step_tokens - (len(plan.chunks) - len(prompts)))
        assert sum(chunk.count for chunk in prompts) <= room
        assert sum(chunk.count for chunk in prompts if chunk.sequence.is_scored) <= scheduler.MAX_SCORED_TOKENS
        if [s for s in self.scheduler.running if s not in decoding]:
            assert sum(chunk.count for chunk in prompts) > 0, "a prompt under way does not get on"

        for chunk in plan.chunks:
            assert chunk.sequence.state is SequenceState.RUNNING
            assert chunk.start == chunk.sequence.num_computed < chunk.end <= len(chunk.sequence.token_ids)
            assert chunk.end <= len(chunk.sequence.blocks) * BLOCK_SIZE
        self.check_order(plan, waiting)
        self.check_blocks()

    def check_left_out(self, left_out: list[Sequence], decoding: list[Sequence], plan: StepPlan, urgent: list[Sequence]) -> None:
        """For a prompt of others, or for the pace of others, which one more would break; never who has waited longest."""
        filling = sorted((s for s in decoding if s.fills_in), key=lambda s: s.urgency)
        first = min(left_out, key=lambda s: s.urgency)
        assert all(s.fills_in for s in left_out)
        assert filling[0] is not first
        assert all(chunk.sequence.urgency < first.urgency for chunk in plan.chunks if chunk.sequence in filling)
        if not urgent:
            pacer, others = self.scheduler.pacer, [s for s in decoding if not s.fills_in]
            assert pacer is not None
            taken = [*others, *filling[: filling.index(first) + 1]]
            most_s = min(min(pacer._slack_s(s, self.now), AIM * (s.request.tpot_slo_s or math.inf)) for s in others)
            assert COST.decode_s(len(taken), sum(len(s.token_ids) for s in taken)) > most_s

    def check_order(self, plan: StepPlan, waiting: list[Sequence]) -> None:
        """Whoever was let in was more urgent than all who stayed out. Whoever was put out, for a decode: has more slack than all who
        stayed; for somebody who waits: is batch work, and less urgent."""
        is_full = sum(chunk.count for chunk in plan.chunks if chunk.sequence.is_scored) >= scheduler.MAX_SCORED_TOKENS
        passed = [s for s in waiting if is_full and s.is_scored and s not in plan.admitted]
        in_order = [s for s in sorted(waiting, key=lambda s: s.urgency) if s not in passed]
        assert list(plan.admitted) == in_order[: len(plan.admitted)]
        assert self.scheduler.waiting == sorted(self.scheduler.waiting, key=lambda s: s.urgency)
        assert self.scheduler.running == sorted(self.scheduler.running, key=lambda s: s.arrival)
        if plan.preempted and not (plan.admitted and waiting):
            for_head = all(s.fills_in and waiting and waiting[0].urgency < s.urgency for s in plan.preempted)
            assert for_head or all(s.urgency < min(p.urgency for p in plan.preempted) for s in self.scheduler.running)
        elif plan.preempted:
            assert all(s.fills_in and s.urgency > waiting[0].urgency and s not in plan.admitted for s in plan.preempted)
        for sequence in plan.preempted:
            assert sequence.state is SequenceState.WAITING
            assert (sequence.blocks, sequence.num_computed) == ([], 0)

    def check_blocks(self) -> None:
        """A block that is yet to be written belongs to one sequence only; and only those that run hold any."""
        holders = Counter(block for s in self.sequences.values() for block in s.blocks)
        assert sum(holders.values()) == sum(len(s.blocks) for s in self.scheduler.running)
        assert set(holders) == set(self.pool._refs)
        for sequence in self.scheduler.running:
            for block in sequence.blocks[sequence.num_computed // BLOCK_SIZE :]:
                assert holders[block] == 1, f"block {block} is shared and written"

    def compute(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            samples, sequence = chunk.samples, chunk.sequence
            self.scheduler.computed(chunk)
            if samples:
                sequence.token_ids.append(len(sequence.token_ids) % 3)
                if sequence.num_outputs >= sequence.request.sampling.max_tokens:
                    self.scheduler.finish(sequence)


ROOMY = Machine(num_blocks=64, max_step_tokens=8, max_sequences=8)


def started(machine: Machine, *jobs: Job) -> Run:
    run = Run(machine, list(jobs))
    run.arrive_and_leave(0)
    return run


def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in plan.chunks]


def decoding_here(scheduler: Scheduler, number: int, num_tokens: int, tier: ServiceClass = ServiceClass.DEFAULT) -> Sequence:
    """Its KV has just landed."""
    sampling = SamplingParams(max_tokens=50, seed=0)
    request = GenerateRequest(RequestId(f"r{number}"), Address("fake://g"), (number,) * num_tokens, sampling, HERE, 1.0, service_class=tier)
    sequence = Sequence(request, number, deadline=1.0, ttft_deadline=float("inf"), hands_off=False, max_len=1 << 20)
    sequence.blocks = scheduler._pool.take(scheduler.blocks_for(num_tokens)) or []
    sequence.num_computed, sequence.was_admitted = num_tokens, True
    sequence.token_ids.append(7)
    scheduler.adopt(sequence)
    return sequence
