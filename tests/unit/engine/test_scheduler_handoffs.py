"""What handoffs have of a scheduler: room for prompts that are handed over, memory and places for those on their way."""

from dataclasses import replace

import pytest
from harness.scheduler_run import BATCH, BLOCK_SIZE, COST, HERE, ROOMY, Job, decoding_here, started

from diptych.engine.block_pool import BlockPool
from diptych.engine.pace import Pacer
from diptych.engine.scheduler import Scheduler
from diptych.engine.sequence import Sequence
from diptych.engine.urgency import BATCH_PATIENCE_S, NO_OBJECTIVE_S
from diptych.messages.ids import Address, RequestId
from diptych.messages.requests import GenerateRequest, SamplingParams

# Prompts that are handed over

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


# Handoffs on their way

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


@pytest.mark.parametrize(("due_at", "num_admitted"), [(NO_OBJECTIVE_S / 2, 0), (2 * NO_OBJECTIVE_S, 1)])
def test_who_is_less_urgent_does_not_pass_a_handoff_that_waits_for_memory(due_at: float, num_admitted: int) -> None:
    run = started(replace(ROOMY, max_step_tokens=64), Job((1,) * 8, 5))
    run.scheduler.claim(1000, due_at)
    assert len(run.scheduler.schedule().admitted) == num_admitted
    assert len(run.scheduler.schedule().admitted) == 1 - num_admitted, "the claim was for one step"


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
