"""Who goes first and who gives way: service classes, objectives that are lost, and that nobody starves."""

from dataclasses import replace

import pytest
from harness.scheduler_run import BATCH, BLOCK_SIZE, HERE, PRIORITY, ROOMY, Job, Machine, Run, decoding_here, spans, started
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine import scheduler
from diptych.engine.block_pool import BlockPool
from diptych.engine.scheduler import Scheduler
from diptych.engine.sequence import Sequence, SequenceState
from diptych.engine.urgency import BATCH_PATIENCE_S, NO_OBJECTIVE_S, PRIORITY_HEAD_START_S
from diptych.messages.ids import Address, RequestId
from diptych.messages.requests import GenerateRequest, SamplingParams, ServiceClass

# Who goes first

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


def test_a_batch_prompt_under_way_lets_others_pass() -> None:
    run = started(replace(ROOMY, max_step_tokens=4), Job((1,) * 20, 1, tier=BATCH), Job((2,) * 4, 1, arrives=1))
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    plan = run.scheduler.schedule()
    assert spans(plan) == [("r1", 0, 4)]
    run.compute(plan)
    assert spans(run.scheduler.schedule()) == [("r0", 4, 4)]


# Who gives way

def test_batch_gives_way_to_who_finds_no_memory_or_no_place() -> None:
    for machine in (replace(ROOMY, num_blocks=7, max_step_tokens=64), replace(ROOMY, max_sequences=1, max_step_tokens=64)):
        run = started(machine, Job((1,) * 16, 9, tier=BATCH), Job((2,) * 16, 2, arrives=1))
        run.compute(run.scheduler.schedule())
        run.arrive_and_leave(1)
        plan = run.scheduler.schedule()
        assert [s.id for s in plan.preempted] == ["r0"]
        assert [s.id for s in plan.admitted] == ["r1"]


def test_batch_decodes_take_the_time_that_the_pace_of_others_leaves() -> None:
    """A step takes 5 ms and 0.15 for each decode of 5 tokens. A promise of 6.1 ms allows 5.49: two fit beside, those that came first."""
    batch = [Job((number,) * 4, 9, tier=BATCH) for number in range(2, 6)]
    for tpot, beside in ((0.0061, ["r1", "r2"]), (0.001, ["r1"]), (1.0, ["r1", "r2", "r3", "r4"]), (None, ["r1", "r2", "r3", "r4"])):
        run = started(replace(ROOMY, paced=True, max_step_tokens=64), Job((1,) * 4, 9, tpot=tpot), *batch)
        run.compute(run.scheduler.schedule())
        assert [chunk.sequence.id for chunk in run.scheduler.schedule().chunks] == ["r0", *beside]


def test_all_but_one_batch_decode_wait_for_the_prompts_of_others() -> None:
    """Also where these find no place before batch work has made them one, but not for those that find no memory."""
    batch = [Job((number,) * 4, 9, tier=BATCH, tpot=0.05) for number in range(2, 5)]
    for max_sequences, tier, beside in ((8, PRIORITY, ["r0"]), (3, PRIORITY, ["r0"]), (8, BATCH, ["r0", "r1", "r2"])):
        machine = replace(ROOMY, paced=True, max_step_tokens=64, max_sequences=max_sequences)
        run = started(machine, *batch, Job((1,) * 4, 2, tier=tier, arrives=1))
        run.compute(run.scheduler.schedule())
        run.arrive_and_leave(1)
        plan = run.scheduler.schedule()
        assert [chunk.sequence.id for chunk in plan.chunks] == [*beside, "r3"]
        run.compute(plan)
        after = run.scheduler.schedule()
        assert [chunk.sequence.id for chunk in after.chunks] == [s.id for s in run.scheduler.running]
        assert all(s.paced_from is None for s in run.scheduler.running if s.id in ("r1", "r2") and tier is PRIORITY), "it is not late"


def test_batch_decodes_go_on_while_others_find_no_memory() -> None:
    batch = [Job((number,) * 4, 9, tier=BATCH) for number in range(2, 4)]
    run = started(replace(ROOMY, num_blocks=7, paced=True, max_step_tokens=64), Job((1,) * 8, 9), *batch, Job((4,) * 24, 2, arrives=1))
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    for expected in (["r0", "r1"], ["r0", "r1", "r2"], ["r0", "r1", "r2"]):
        plan = run.scheduler.schedule()
        assert [chunk.sequence.id for chunk in plan.chunks] == expected
        run.compute(plan)
        run.now += 0.006


def test_batch_does_not_give_way_for_memory_that_it_shares() -> None:
    """A prefix of 16 tokens, four blocks, is a default answer's, too: without the batch work only one more block would be free."""
    run = started(replace(ROOMY, num_blocks=7, max_step_tokens=64), Job((1,) * 17, 9))
    run.compute(run.scheduler.schedule())
    run.jobs += [Job((1,) * 17, 9, tier=BATCH, arrives=1), Job((2,) * 12, 2, arrives=2)]
    run.arrive_and_leave(1)
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(2)
    assert run.scheduler.schedule().preempted == ()


def test_batch_stays_where_its_memory_would_not_be_enough() -> None:
    jobs = [Job((2,) * 16, 9), Job((1,) * 4, 9, tier=BATCH), Job((3,) * 20, 2, arrives=1)]
    run = started(replace(ROOMY, num_blocks=7, max_step_tokens=64), *jobs)
    run.compute(run.scheduler.schedule())
    run.arrive_and_leave(1)
    assert run.scheduler.schedule().preempted == ()


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
