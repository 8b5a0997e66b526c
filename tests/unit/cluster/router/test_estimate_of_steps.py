"""The estimate against the worker's own scheduler and pacer, run until the prompt has its first token."""

import math

import pytest

from diptych.cluster.router.estimate import Work, estimate_prefill
from diptych.cluster.router.policy import WorkerLoad
from diptych.engine.block_pool import BlockPool
from diptych.engine.pace import Pacer
from diptych.engine.predictor import features_of
from diptych.engine.scheduler import Scheduler, StepPlan
from diptych.engine.sequence import Sequence
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef
from diptych.messages.steps import StepModel, attended_pairs

HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))
MODEL = StepModel(5e-3, 7e-6, 9e-10, 12e-6, 3.2e-8, past_first_s=12e-6, past_second_s=4e-6)
NUM_DECODES, TPOT_S, BUDGET = 150, 0.02, 2048


class Worker:
    """Its clock goes step by step, as long as MODEL says that each takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pacer = Pacer(lambda: self.now, lambda: MODEL)
        self.scheduler = Scheduler(BlockPool(100_000, False), 16, BUDGET, 256, self.pacer)
        self._num_added = 0

    def add(self, length: int) -> Sequence:
        number, self._num_added = self._num_added, self._num_added + 1
        sampling = SamplingParams(max_tokens=5000, seed=0)
        request = GenerateRequest(
            RequestId(f"r{number}"), Address("fake://g"), (number,) * length, sampling, HERE, timeout_s=99.0, tpot_slo_s=TPOT_S
        )
        sequence = Sequence(request, number, deadline=99.0, ttft_deadline=math.inf, hands_off=False, max_len=1 << 20)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """→ who has a token more."""
        plan: StepPlan = self.scheduler.schedule()
        self.now += MODEL.step_s(features_of(plan))
        for chunk in plan.chunks:
            self.scheduler.computed(chunk)
        sampled = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        for sequence in sampled:
            sequence.token_ids.append(1)
        return sampled


@pytest.fixture
def ahead() -> Worker:
    """Its decodes have had steps to themselves for long."""
    worker = Worker()
    for _ in range(NUM_DECODES):
        worker.add(1000)
    while len(worker.step()) < NUM_DECODES:
        pass
    for _ in range(100):
        worker.step()
    return worker


@pytest.mark.parametrize("lengths", [[], [1500], [6000], [1500, 1500], [1500] * 4, [3000] * 4])
def test_what_decodes_lend_ends_with_the_first_prompt_that_joins_them(ahead: Worker, lengths: list[int]) -> None:
    lead_s, begins_at = ahead.pacer.lead_s, ahead.now
    assert lead_s > 0.1
    worker = WorkerLoad(
        ref=HERE.decode, num_requests=NUM_DECODES + len(lengths), num_waiting_tokens=sum(lengths), num_blocks=100_000,
        num_free_blocks=100_000, block_size=16, num_decoding=NUM_DECODES,
        decode_context=sum(len(s.token_ids) for s in ahead.scheduler.running), prefill_pairs=sum(attended_pairs(0, n) for n in lengths),
        queue=tuple((-1.0, length) for length in lengths), max_step_tokens=BUDGET, step_model=MODEL, lead_s=lead_s, reported_at=0.0,
        plans_in_s=1e-3,
    )  # fmt: skip
    estimate = estimate_prefill(worker, Work(1500, 100.0, 0.4, TPOT_S), 0, 0.0)
    for length in lengths:
        ahead.add(length)
    own = ahead.add(1500)
    while own not in ahead.step():
        pass
    assert estimate.ttft_s == pytest.approx(ahead.now - begins_at, rel=0.07)
