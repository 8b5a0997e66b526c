"""The scheduler under random arrivals, ends and small pools: budget, progress, order, and that nobody writes where another reads."""

from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.block_pool import BlockPool
from diptych.engine.scheduler import Scheduler, StepPlan
from diptych.engine.sequence import Sequence, SequenceState
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef

HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    num_outputs: int
    arrives: int = 0                        # before this step
    ttft: float = float("inf")
    aborted_at: int | None = None           # before this step
    adopted: bool = False                   # its prompt's KV came from elsewhere
    scored: bool = False                    # wants logprobs of its prompt


@dataclass(frozen=True)
class Machine:
    num_blocks: int
    max_step_tokens: int
    max_sequences: int
    prefix_cache: bool = True


class Run:
    """Drives a scheduler through jobs as an engine does, but with made-up tokens, and checks every plan."""

    def __init__(self, machine: Machine, jobs: list[Job]) -> None:
        self.machine = machine
        self.pool = BlockPool(machine.num_blocks, machine.prefix_cache)
        self.scheduler = Scheduler(self.pool, BLOCK_SIZE, machine.max_step_tokens, machine.max_sequences)
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
            plan = self.scheduler.schedule()
            self.check(plan, waiting, decoding)
            self.compute(plan)
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
        request = GenerateRequest(RequestId(f"r{number}"), Address("fake://g"), job.prompt, sampling, HERE, timeout_s=1.0)
        sequence = Sequence(request, number, deadline=1.0, ttft_deadline=job.ttft, hands_off=False)
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
        if [s for s in self.scheduler.running if s not in decoding]:
            assert sum(chunk.count for chunk in prompts) > 0, "a prompt under way does not get on"

        for chunk in plan.chunks:
            assert chunk.sequence.state is SequenceState.RUNNING
            assert chunk.start == chunk.sequence.num_computed < chunk.end <= len(chunk.sequence.token_ids)
            assert chunk.end <= len(chunk.sequence.blocks) * BLOCK_SIZE
        self.check_order(plan, waiting)
        self.check_blocks()

    def check_order(self, plan: StepPlan, waiting: list[Sequence]) -> None:
        """Whoever was let in was more urgent than all who stayed out; whoever was put out is later than all who stayed."""
        assert list(plan.admitted) == sorted(waiting, key=lambda s: s.urgency)[: len(plan.admitted)]
        assert self.scheduler.waiting == sorted(self.scheduler.waiting, key=lambda s: s.urgency)
        assert self.scheduler.running == sorted(self.scheduler.running, key=lambda s: s.arrival)
        if plan.preempted:
            assert not plan.admitted
            assert all(s.arrival < min(p.arrival for p in plan.preempted) for s in self.scheduler.running)
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
)
machines = st.builds(
    Machine,
    num_blocks=st.integers(7, 20),          # the longest job needs 7
    max_step_tokens=st.sampled_from([1, 2, 3, 7, 64]),
    max_sequences=st.integers(1, 6),
    prefix_cache=st.booleans(),
)


@settings(max_examples=250, deadline=None)
@given(machine=machines, jobs=st.lists(jobs, min_size=1, max_size=9))
def test_any_jobs_on_any_machine(machine: Machine, jobs: list[Job]) -> None:
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
