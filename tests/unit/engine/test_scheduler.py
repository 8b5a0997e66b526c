"""The scheduler under random arrivals, ends and small pools: budget, progress, order, and that nobody writes where another reads."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine import scheduler
from diptych.engine.block_pool import BlockPool
from diptych.engine.pace import Pacer
from diptych.engine.predictor import features_of
from diptych.engine.scheduler import Scheduler, StepPlan
from diptych.engine.sequence import Sequence, SequenceState
from diptych.engine.urgency import BATCH_PATIENCE_S, NO_OBJECTIVE_S, PRIORITY_HEAD_START_S
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, ServiceClass, WorkerRef
from diptych.messages.steps import StepModel

HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))
BLOCK_SIZE = 4
COST = StepModel(base_s=5e-3, prefill_token_s=1e-3, prefill_pair_s=1e-5, decode_sequence_s=1e-4, decode_context_s=1e-5)


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
            may_preempt = self.scheduler.may_preempt or not self.scheduler.can_grow_all
            plan = self.scheduler.schedule()
            assert may_preempt or not plan.preempted, "an engine that runs ahead would not have asked"
            self.check(plan, waiting, decoding)
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

    def check(self, plan: StepPlan, waiting: list[Sequence], decoding: list[Sequence]) -> None:
        machine, in_plan = self.machine, [chunk.sequence for chunk in plan.chunks]
        self.num_preempted += len(plan.preempted)
        assert len(set(map(id, in_plan))) == len(in_plan) <= machine.max_sequences
        assert len(self.scheduler.running) <= machine.max_sequences

        # Decodes never starve: each is in the plan, or was preempted by an earlier one.
        assert [s for s in decoding if s not in plan.preempted] == in_plan[: len(decoding) - sum(s in plan.preempted for s in decoding)]
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


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)
jobs = st.builds(
    Job,
    prompt=prompts,
    num_outputs=st.integers(1, 12),
    arrives=st.integers(0, 12),
    ttft=st.sampled_from([1.0, 2.0, float("inf")]),
    aborted_at=st.none() | st.integers(1, 25),
    adopted=st.sampled_from([False, False, True]),
    scored=st.sampled_from([False, False, True]),
    tier=st.sampled_from(ServiceClass),
    tpot=st.sampled_from([None, 0.001, 0.01, 1.0]),
)
machines = st.builds(
    Machine,
    num_blocks=st.integers(7, 20),          # the longest job needs 7
    max_step_tokens=st.sampled_from([1, 2, 3, 7, 64]),
    max_sequences=st.integers(1, 6),
    prefix_cache=st.booleans(),
    paced=st.booleans(),
)


@settings(max_examples=250)
@given(machine=machines, jobs=st.lists(jobs, min_size=1, max_size=9))
def test_any_jobs_on_any_machine(machine: Machine, jobs: list[Job]) -> None:
    Run(machine, jobs).go()


@given(machine=machines, jobs=st.lists(jobs, min_size=1, max_size=9))
def test_any_jobs_on_any_machine_with_few_scores_a_step(machine: Machine, jobs: list[Job]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MAX_SCORED_TOKENS", 3)
        Run(machine, jobs).go()


def test_the_property_test_meets_preemption() -> None:
    run = Run(Machine(num_blocks=7, max_step_tokens=64, max_sequences=4), [Job((1, 0) * 5, 12, ttft=float(i)) for i in range(4)])
    run.go()
    assert run.num_preempted > 0


# By example

ROOMY = Machine(num_blocks=64, max_step_tokens=8, max_sequences=8)


def started(machine: Machine, *jobs: Job) -> Run:
    run = Run(machine, list(jobs))
    run.arrive_and_leave(0)
    return run


def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in plan.chunks]


def test_decodes_then_prompts_under_way_then_new_ones() -> None:
    run = started(ROOMY, Job((1,) * 3, 5), Job((2,) * 13, 5), Job((3,) * 2, 5))
    plans = []
    for _ in range(3):
        plans.append(run.scheduler.schedule())
        run.compute(plans[-1])
    assert spans(plans[0]) == [("r0", 0, 3), ("r1", 0, 5)]
    assert spans(plans[1]) == [("r0", 3, 1), ("r1", 5, 7)]
    assert spans(plans[2]) == [("r0", 4, 1), ("r1", 12, 1), ("r2", 0, 2)]


def test_the_most_urgent_goes_first_but_what_has_begun_goes_on() -> None:
    run = started(ROOMY, Job((1,) * 6, 2, ttft=3.0), Job((2,) * 6, 2, ttft=2.0), Job((3,) * 6, 2, ttft=1.0, arrives=1))
    plan = run.scheduler.schedule()
    assert spans(plan) == [("r1", 0, 6), ("r0", 0, 2)]
    run.compute(plan)
    run.arrive_and_leave(1)
    assert spans(run.scheduler.schedule()) == [("r1", 6, 1), ("r0", 2, 4), ("r2", 0, 3)]


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    """Or a stream of small ones would keep it waiting for ever."""
    run = started(replace(ROOMY, num_blocks=7), Job((1,) * 12, 3), Job((2,) * 20, 2), Job((3,), 2))
    while run.sequences[0].state is not SequenceState.FINISHED:
        assert [s.id for s in run.scheduler.waiting][-2:] == ["r1", "r2"]
        run.compute(run.scheduler.schedule())
    assert spans(run.scheduler.schedule()) == [("r1", 0, 8)]


def test_a_cached_prefix_is_not_computed_again_but_for_its_last_token() -> None:
    asked = [Job((1,) * 8, 1), Job((1,) * 8, 1, arrives=1), Job((1,) * 9, 1, arrives=2), Job((1,) * 9, 1, arrives=3, scored=True)]
    run = Run(ROOMY, asked)
    for step, expected in enumerate([("r0", 0, 8), ("r1", 4, 4), ("r2", 8, 1), ("r3", 0, 8)]):
        run.arrive_and_leave(step)
        plan = run.scheduler.schedule()
        assert spans(plan) == [expected]
        run.compute(plan)


def test_few_prompts_are_scored_in_one_step() -> None:
    """Each of their tokens has a row of logits, which memory must be there for."""
    roomy = Machine(num_blocks=4096, max_step_tokens=4096, max_sequences=8)
    run = started(roomy, Job((1,) * 1500, 1, scored=True), Job((2,) * 700, 1, scored=True), Job((3,) * 300, 1))
    for expected in ([("r0", 0, 1024), ("r2", 0, 300)], [("r0", 1024, 476), ("r1", 0, 548)], [("r1", 548, 152)]):
        plan = run.scheduler.schedule()
        assert spans(plan) == expected
        run.compute(plan)


def test_cached_tokens_are_told_as_of_the_first_admission() -> None:
    """A preempted sequence finds its own blocks in the cache: that was no hit of the client's."""
    run = Run(replace(ROOMY, num_blocks=7, max_step_tokens=64), [Job((1,) * 8, 12), Job((2,) * 8, 12)])
    run.go()
    assert run.num_preempted > 0
    assert [s.num_cached for s in run.sequences.values()] == [0, 0]


def test_park_keeps_the_blocks_and_leaves_the_steps() -> None:
    run = started(ROOMY, Job((1,) * 5, 9))
    run.compute(run.scheduler.schedule())
    [sequence] = run.sequences.values()
    run.scheduler.park(sequence)
    assert run.scheduler.schedule().chunks == ()
    assert run.pool.num_held == 2
    run.scheduler.finish(sequence)
    assert run.pool.num_held == 0


# Classes

BATCH, PRIORITY = ServiceClass.BATCH, ServiceClass.PRIORITY


def test_what_cannot_be_in_time_any_more_lets_those_pass_that_can() -> None:
    """Ten tokens take 10 ms: r0 and r2 are lost, once and for all, r1 is not, and r3 has no promise."""
    paced = replace(ROOMY, paced=True)
    run = started(paced, Job((1,) * 10, 2, ttft=0.009), Job((2,) * 10, 2, ttft=0.05), Job((3,) * 10, 2, ttft=0.001), Job((4,) * 10, 2))
    first = run.scheduler.schedule()
    assert first.chunks[0].sequence.id == "r1"
    assert [s.id for s in run.scheduler.waiting] == ["r3", "r2", "r0"]
    due_at = {s.id: s.due_at for s in run.scheduler.waiting}
    run.now = 1.0
    run.scheduler.schedule()
    assert {s.id: s.due_at for s in run.scheduler.waiting if s.id in due_at} == due_at


@settings(max_examples=40)
@given(length=st.integers(1, 12), gap=st.integers(1, 3))
def test_who_was_postponed_is_not_starved(length: int, gap: int) -> None:
    """A flood of prompts in time: those that are due later than its new time do not pass it."""
    flood = [Job((number % 2,) * length, 1, ttft=1.0, arrives=number * gap) for number in range(1200)]
    run = Run(Machine(num_blocks=8, max_step_tokens=8, max_sequences=3, paced=True), [Job((1, 0) * 5, 2, ttft=0.0), *flood])
    step = 0
    while run.sequences.get(0) is None or run.sequences[0].state is not SequenceState.FINISHED:
        run.arrive_and_leave(step)
        plan = run.scheduler.schedule()
        run.compute(plan)
        run.now += 0.02
        step += 1
    assert run.now <= NO_OBJECTIVE_S + 1.0


def test_priority_then_default_then_batch() -> None:
    run = started(ROOMY, Job((1,) * 4, 1, tier=BATCH), Job((2,) * 4, 1, ttft=0.4), Job((3,) * 4, 1, ttft=0.4, tier=PRIORITY))
    assert [s.id for s in run.scheduler.waiting] == ["r2", "r1", "r0"]


def test_batch_that_waited_goes_before_what_came_later() -> None:
    run = started(ROOMY, Job((1,) * 4, 1, tier=BATCH))
    run.jobs += [Job((2,) * 4, 1, ttft=0.4, tier=tier, arrives=1) for tier in ServiceClass]
    run.now = BATCH_PATIENCE_S + PRIORITY_HEAD_START_S
    run.arrive_and_leave(1)
    assert run.scheduler.waiting[0].id == "r0"


@settings(max_examples=60)
@given(tier=st.sampled_from([ServiceClass.DEFAULT, PRIORITY]), length=st.integers(1, 20), gap=st.integers(1, 4))
def test_a_flood_of_others_does_not_starve_batch(tier: ServiceClass, length: int, gap: int) -> None:
    """However urgent and many they are, and though they take memory from it: those that come after its patience do not pass it."""
    flood = [Job((number % 2,) * length, 6, ttft=0.1, arrives=number * gap, tier=tier) for number in range(600)]
    run = Run(Machine(num_blocks=8, max_step_tokens=8, max_sequences=3), [Job((1, 0) * 5, 12, tier=BATCH), *flood])
    step = 0
    while 0 not in run.sequences or run.sequences[0].state is not SequenceState.FINISHED:
        run.arrive_and_leave(step)
        run.compute(run.scheduler.schedule())
        run.now += 0.5
        step += 1
        num_ended = sum(s.state is SequenceState.FINISHED for s in run.sequences.values())
        assert num_ended <= (BATCH_PATIENCE_S + PRIORITY_HEAD_START_S) / 0.5 / gap + 30, "batch work starves"


def test_batch_gives_way_to_who_finds_no_memory_or_no_place() -> None:
    for machine in (replace(ROOMY, num_blocks=7, max_step_tokens=64), replace(ROOMY, max_sequences=1, max_step_tokens=64)):
        run = started(machine, Job((1,) * 16, 9, tier=BATCH), Job((2,) * 16, 2, arrives=1))
        run.compute(run.scheduler.schedule())
        run.arrive_and_leave(1)
        plan = run.scheduler.schedule()
        assert [s.id for s in plan.preempted] == ["r0"]
        assert [s.id for s in plan.admitted] == ["r1"]


def test_batch_stays_where_its_memory_would_not_be_enough() -> None:
    jobs = [Job((2,) * 16, 9), Job((1,) * 4, 9, tier=BATCH), Job((3,) * 20, 2, arrives=1)]
    run = started(replace(ROOMY, num_blocks=7, max_step_tokens=64), *jobs)
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    assert run.scheduler.schedule().preempted == ()


def test_a_handoff_that_finds_no_room_claims_it_from_batch() -> None:
    run = started(replace(ROOMY, num_blocks=7, max_step_tokens=64), Job((1,) * 20, 9, tier=BATCH))
    run.compute(run.scheduler.schedule())
    run.scheduler.claim(4, due_at=1.0)
    assert [s.id for s in run.scheduler.schedule().preempted] == ["r0"]
    assert run.pool.can_take(4)
    assert not run.scheduler.owes_memory(due_at=1.0)
    assert run.scheduler.owes_memory(due_at=BATCH_PATIENCE_S)


def test_the_newest_claim_is_the_one_that_counts() -> None:
    """A worker's loop claims at every turn of a step that takes long, and for whoever is the most urgent by then."""
    jobs = [Job((1,) * 10, 9, tier=BATCH), Job((2,) * 10, 9, tier=BATCH)]
    run = started(replace(ROOMY, num_blocks=7, max_step_tokens=64), *jobs)
    run.compute(run.scheduler.schedule())
    run.scheduler.claim(7, due_at=0.5)
    for _ in range(1000):
        run.scheduler.claim(2, due_at=1.0)
    assert [s.id for s in run.scheduler.schedule().preempted] == ["r1"]


def test_batch_gives_no_room_to_a_prompt_whose_scores_must_wait() -> None:
    roomy = Machine(num_blocks=4096, max_step_tokens=4096, max_sequences=2)
    long = Job((1,) * 3000, 1, scored=True)
    run = started(roomy, replace(long, prompt=(2,) * 12, num_outputs=9, scored=False, tier=BATCH), long, replace(long, arrives=1))
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    for expected in ([], ["r0"]):                         # the first still has two steps, or one, to go
        plan = run.scheduler.schedule()
        assert [s.id for s in plan.preempted] == expected
        run.compute(plan)


def test_batch_scores_give_way_to_scores_that_are_more_urgent() -> None:
    roomy = Machine(num_blocks=8192, max_step_tokens=4096, max_sequences=1)
    run = started(roomy, Job((1,) * 20_000, 1, scored=True, tier=BATCH), Job((2,) * 100, 1, scored=True, arrives=1))
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    plan = run.scheduler.schedule()
    assert ([s.id for s in plan.preempted], spans(plan)) == (["r0"], [("r1", 0, 100)])


def test_a_batch_prompt_under_way_lets_others_pass() -> None:
    run = started(replace(ROOMY, max_step_tokens=4), Job((1,) * 20, 1, tier=BATCH), Job((2,) * 4, 1, arrives=1))
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    plan = run.scheduler.schedule()
    assert spans(plan) == [("r1", 0, 4)]
    run.compute(plan)
    assert spans(run.scheduler.schedule()) == [("r0", 4, 4)]


def test_a_prompt_that_is_handed_over_leaves_each_decode_a_block_to_grow_into():
    """Its pages may be being read, so it could not make room again."""
    def sequence(number: int, num_tokens: int, hands_off: bool) -> Sequence:
        sampling = SamplingParams(max_tokens=9, seed=0)
        request = GenerateRequest(RequestId(f"r{number}"), Address("fake://g"), (number,) * num_tokens, sampling, HERE, timeout_s=1.0)
        return Sequence(request, number, deadline=1.0, ttft_deadline=float("inf"), hands_off=hands_off, max_len=1 << 20)

    for hands_off, num_admitted in ((True, 1), (False, 2)):
        scheduler = Scheduler(BlockPool(4, False), BLOCK_SIZE, 64, 8)
        scheduler.add(sequence(0, 2 * BLOCK_SIZE, hands_off=False))
        scheduler.add(sequence(1, 2 * BLOCK_SIZE, hands_off))
        assert len(scheduler.schedule().admitted) == num_admitted


@pytest.mark.parametrize("hands_off", [True, False])
def test_who_begins_to_decode_here_has_nothing_to_lend(hands_off: bool) -> None:
    """The decode that is there was promised more than it takes; the prompt beside it ends in the second step."""

    def sequence(number: int, hands_off: bool) -> Sequence:
        sampling = SamplingParams(max_tokens=9, seed=0)
        request = GenerateRequest(
            RequestId(f"r{number}"), Address("fake://g"), (number,) * BLOCK_SIZE, sampling, HERE, timeout_s=1.0, tpot_slo_s=0.1
        )
        return Sequence(request, number, deadline=1.0, ttft_deadline=float("inf"), hands_off=hands_off, max_len=1 << 20)

    pacer, leads_s = Pacer(lambda: 0.0, lambda: COST), []
    scheduler = Scheduler(BlockPool(9, False), BLOCK_SIZE, 64, 8, pacer)
    for each in (sequence(0, hands_off=False), sequence(1, hands_off)):
        scheduler.add(each)
        for chunk in scheduler.schedule().chunks:
            scheduler.computed(chunk)
            chunk.sequence.token_ids.append(0)
        leads_s.append(pacer.lead_s)
    assert leads_s[0] == 0.0
    assert (leads_s[1] > 0.01) is hands_off


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


def test_nobody_takes_the_place_of_a_decode_that_made_room() -> None:
    """Of three, two may be in a step. The third has no block for its newest token: it would be written into somebody else's."""
    scheduler = Scheduler(BlockPool(7), BLOCK_SIZE, 64, max_sequences=2)
    decoding_here(scheduler, 0, 8)
    decoding_here(scheduler, 1, 7, BATCH)
    decoding_here(scheduler, 2, 8)
    scheduler._pool.take(scheduler._pool.num_available)
    plan = scheduler.schedule()
    assert [s.id for s in plan.preempted] == ["r1"]
    assert [chunk.sequence.id for chunk in plan.chunks] == ["r0"]
    assert all(chunk.end <= len(chunk.sequence.blocks) * BLOCK_SIZE for chunk in plan.chunks)


def test_the_places_of_handoffs_on_their_way_are_not_given_away() -> None:
    run = started(replace(ROOMY, max_sequences=3, max_step_tokens=64), *[Job((i,) * 4, 5) for i in range(3)])
    run.scheduler.num_reserved = 2
    assert [s.id for s in run.scheduler.schedule().admitted] == ["r0"]
    run.scheduler.num_reserved = 0
    assert [s.id for s in run.scheduler.schedule().admitted] == ["r1", "r2"]


def test_a_place_that_is_kept_for_a_handoff_is_none_that_batch_has_to_make() -> None:
    run = started(replace(ROOMY, max_sequences=2, max_step_tokens=64), Job((1,) * 4, 9, tier=BATCH), Job((2,) * 4, 2, arrives=1))
    run.compute(run.scheduler.schedule())
    run.scheduler.num_reserved = 1
    run.arrive_and_leave(1)
    assert [s.id for s in run.scheduler.schedule().preempted] == ["r0"], "the other place is taken"


@pytest.mark.parametrize(("due_at", "num_admitted"), [(NO_OBJECTIVE_S / 2, 0), (2 * NO_OBJECTIVE_S, 1)])
def test_who_is_less_urgent_does_not_pass_a_handoff_that_waits_for_memory(due_at: float, num_admitted: int) -> None:
    run = started(replace(ROOMY, max_step_tokens=64), Job((1,) * 8, 5))
    run.scheduler.claim(1000, due_at)
    assert len(run.scheduler.schedule().admitted) == num_admitted
    assert len(run.scheduler.schedule().admitted) == 1 - num_admitted, "the claim was for one step"


def test_batch_makes_room_for_a_prompt_that_is_handed_over_once_and_enough() -> None:
    """It is admitted only if all that decode can grow beside it."""
    scheduler = Scheduler(BlockPool(20, False), BLOCK_SIZE, 64, 32)
    for number in range(8):
        decoding_here(scheduler, number, 6, BATCH)                    # two blocks each, and room for two tokens
    sampling = SamplingParams(max_tokens=2, seed=0)
    request = GenerateRequest(RequestId("handed over"), Address("fake://g"), (9,) * 8, sampling, HERE, timeout_s=1.0)
    scheduler.add(Sequence(request, 99, deadline=1.0, ttft_deadline=1.0, hands_off=True, max_len=1 << 20))
    plan = scheduler.schedule()
    assert [s.id for s in plan.admitted] == ["handed over"]
    assert [s.id for s in plan.preempted] == ["r7", "r6"]


def test_who_may_preempt_is_known_before_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first in line waits for its turn to be scored, and the next one, who passes it, takes memory from batch work."""
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 4)
    here = Scheduler(BlockPool(8, False), BLOCK_SIZE, 64, 8)
    decoding_here(here, 0, 6, BATCH)

    def ask(number: int, num_tokens: int, tier: ServiceClass, waited_s: float) -> None:
        sampling = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0 if tier is BATCH else None)
        request = GenerateRequest(
            RequestId(f"r{number}"), Address("fake://g"), (number,) * num_tokens, sampling, HERE, 1.0, service_class=tier, waited_s=waited_s
        )
        here.add(Sequence(request, number, deadline=1.0, ttft_deadline=float("inf"), hands_off=False, max_len=1 << 20))

    ask(1, 12, BATCH, waited_s=90.0)
    for chunk in here.schedule().chunks:
        here.computed(chunk)
    ask(2, 4, BATCH, waited_s=80.0)
    ask(3, 16, ServiceClass.DEFAULT, waited_s=0.0)
    assert [s.id for s in here.waiting] == ["r2", "r3"]
    assert here.may_preempt
    assert [s.id for s in here.schedule().preempted] == ["r0"]
