"""The scheduler under random arrivals, ends and small pools: budget, progress, order, and that nobody writes where another reads."""

from dataclasses import replace

import pytest
from harness.scheduler_run import ROOMY, Job, Machine, Run, spans, started
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine import scheduler
from diptych.engine.sequence import SequenceState
from diptych.messages.requests import ServiceClass

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
