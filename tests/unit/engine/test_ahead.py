"""An engine whose runner runs one step ahead and computes late: the same tokens, and no block that a step may write to in other hands."""

from dataclasses import dataclass, field

import pytest
from harness.ahead_runner import AheadRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine.engine import Engine, EngineLimits
from diptych.engine.fake_runner import fake_layout, next_token
from diptych.engine.load import load_report
from diptych.engine.pace import Pacer
from diptych.engine.predictor import PRIOR, features_of
from diptych.engine.sequence import Sequence
from diptych.engine.step_watch import StepWatch
from diptych.kvtransfer.fake import FakeFabric
from diptych.kvtransfer.transport import KVPool
from diptych.messages.ids import Address, BlockId, Epoch, RequestId, WorkerId
from diptych.messages.requests import FinishReason, GenerateRequest, Route, SamplingParams, ServiceClass, TokenDelta, WorkerRef
from diptych.messages.steps import StepModel

BLOCK_SIZE = 4
SENTINEL = -77
SLOW = StepModel(0.5, 1e-3, 1e-5, 0.3, 1e-3)                # two decodes take longer than some are promised
HERE = Route(WorkerRef(WorkerId("decode-0"), Epoch(1), Address("fake://d")))


@dataclass(frozen=True)
class Visit:
    prompt: list[int]
    max_tokens: int
    arrives: int                    # before which turn
    aborted_at: int | None
    stops_after: int | None         # outputs
    batch: bool
    hands_off: bool
    ttft: float | None = None
    tpot: float | None = None


visits = st.builds(
    Visit,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    max_tokens=st.integers(1, 8),
    arrives=st.integers(0, 8),
    aborted_at=st.none() | st.integers(0, 15),
    stops_after=st.none() | st.integers(1, 6),
    batch=st.booleans(),
    hands_off=st.booleans(),
    ttft=st.sampled_from([None, 1e6]),
    tpot=st.sampled_from([None, 0.3, 1.5]),
)


def make_engine(num_blocks: int, max_step_tokens: int = 8) -> tuple[Engine, KVPool, AheadRunner]:
    pool = FakeFabric().transport("w").allocate(fake_layout(BLOCK_SIZE), num_blocks)
    runner = AheadRunner(pool)
    return Engine(runner, num_blocks, EngineLimits(BLOCK_SIZE, 24, max_step_tokens, 4)), pool, runner


def correct(visit: Visit) -> list[int]:
    """What it is to be answered, if it is not aborted."""
    tokens = list(visit.prompt)
    for _ in range(1 if visit.hands_off else visit.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(visit.prompt) :]


def stop_tokens(visit: Visit) -> tuple[int, ...]:
    return () if visit.stops_after is None else tuple(correct(visit)[visit.stops_after - 1 : visit.stops_after])


def request(index: int, visit: Visit) -> GenerateRequest:
    params = SamplingParams(max_tokens=visit.max_tokens, seed=0, stop_token_ids=stop_tokens(visit))
    kind = ServiceClass.BATCH if visit.batch else ServiceClass.DEFAULT
    name, promised = RequestId(str(index)), {"ttft_slo_s": visit.ttft, "tpot_slo_s": visit.tpot}
    return GenerateRequest(name, Address("fake://g"), tuple(visit.prompt), params, HERE, 1e9, service_class=kind, **promised)


@dataclass
class Stranger:
    """Somebody who writes into free blocks from outside, in no order with the steps: a handoff's writer."""

    engine: Engine
    pool: KVPool
    held: list[BlockId] = field(default_factory=list)

    def come(self) -> None:
        self.held = self.engine.pool.take(1) or [] if self.engine.pool.num_available > 8 else []
        for block in self.held:
            self.pool.tensor[block] = SENTINEL

    def go(self) -> None:
        for block in self.held:
            assert bool((self.pool.tensor[block] == SENTINEL).all()), "a step wrote to a block that was given away"
        self.engine.pool.release(self.held)
        self.held = []


@settings(max_examples=120)
@given(st.lists(visits, min_size=1, max_size=7), st.integers(7, 20), st.integers(2, 12), st.sets(st.integers(0, 40)), st.booleans())
def test_any_visits(stays: list[Visit], num_blocks: int, max_step_tokens: int, looks: set[int], paced: bool) -> None:
    """`looks`: turns in which the step before is collected while one is being launched, as soon as it has been computed."""
    engine, pool, _ = make_engine(num_blocks, max_step_tokens)
    now = 0.0
    if paced:
        engine.scheduler.pacer = Pacer(lambda: now, lambda: SLOW)
    stranger, tokens = Stranger(engine, pool), {str(i): [] for i in range(len(stays))}
    parked: list[Sequence] = []

    def look(layer: int) -> None:
        if engine.is_ready:
            parked.extend(_collect(engine, tokens))

    for turn in range(600):
        now = float(turn)
        stranger.go()
        stranger.come()
        for i, visit in enumerate(stays):
            if visit.arrives == turn:
                engine.add(request(i, visit), float(turn), visit.hands_off)
            sequence = engine.find(RequestId(str(i)))
            if visit.aborted_at == turn and sequence is not None:
                engine.finish(sequence)
        for sequence in parked:                          # committed elsewhere
            if engine.find(sequence.id) is sequence:
                engine.finish(sequence)
        parked.clear()
        if engine.may_plan and (plan := engine.plan()).chunks:
            engine.launch(plan, look if turn in looks else None)
        if engine.is_ready and (turn % 3 or not engine.may_plan):
            parked += _collect(engine, tokens)
        if turn > 8 and not engine.has_work and not parked:
            break
    stranger.go()
    assert not engine.sequences
    assert engine.pool.num_available == num_blocks
    for i, visit in enumerate(stays):
        expected, stops = correct(visit), stop_tokens(visit)
        end = next((n + 1 for n, token in enumerate(expected) if token in stops), len(expected))
        found = tokens[str(i)]
        assert found == expected[: len(found)] if visit.aborted_at is not None else found == expected[:end]


def _collect(engine: Engine, tokens: dict[str, list[int]]) -> list[Sequence]:
    """→ the sequences that were handed off."""
    steps = engine.collect()
    for step in steps:
        if step.delta is not None:
            assert step.delta.index == len(tokens[step.sequence.id])
            tokens[step.sequence.id] += step.delta.token_ids
    return [step.sequence for step in steps if step.delta is not None and step.sequence.hands_off and step.delta.finish is None]


def test_it_runs_one_step_ahead_and_no_more() -> None:
    engine, _, runner = make_engine(20)
    plain = Visit([1, 0, 1], 8, 0, None, None, batch=False, hands_off=False)
    engine.add(request(0, plain), 0.0)
    engine.launch(engine.plan())
    assert engine.may_plan
    engine.launch(engine.plan())
    assert not engine.may_plan
    assert runner.most_ahead == 2
    assert [step.delta.token_ids for step in engine.collect() if step.delta] == [(correct(plain)[0],)]


def test_reports_say_when_the_next_step_will_be_planned() -> None:
    """At once, with one step under way; when the first of two has ended."""
    engine, _, _ = make_engine(20)
    engine.add(request(0, Visit([1, 0, 1], 8, 0, None, None, batch=False, hands_off=False)), 0.0)
    watch, told = StepWatch(PRIOR), []
    for _ in range(2):
        plan = engine.plan()
        watch.launched(features_of(plan), 5.0)
        engine.launch(plan)
        told.append(load_report(HERE.decode, engine, 0, watch, 5.001))
    assert [report.plans_in_s for report in told] == [0.0, pytest.approx(told[0].busy_s)]
    assert told[1].busy_s > told[0].busy_s > 0


def test_reports_say_how_far_decodes_are_ahead_of_their_pace() -> None:
    engine, _, _ = make_engine(20)
    assert load_report(HERE.decode, engine, 0, StepWatch(PRIOR), 0.0).lead_s == 0.0
    engine.scheduler.pacer = Pacer(lambda: 0.0, lambda: PRIOR)
    engine.scheduler.pacer.lead_s = 0.03
    assert load_report(HERE.decode, engine, 0, StepWatch(PRIOR), 0.0).lead_s == 0.03


def test_a_sequence_that_reaches_its_length_is_not_computed_again() -> None:
    engine, _, _ = make_engine(20)
    engine.add(request(0, Visit([1, 0], 1, 0, None, None, batch=False, hands_off=False)), 0.0)
    engine.launch(engine.plan())
    assert engine.plan().chunks == ()
    (step,) = engine.collect()
    assert step.delta is not None
    assert step.delta.finish is FinishReason.LENGTH


def test_blocks_of_an_aborted_sequence_come_back_with_the_step_that_writes_to_them() -> None:
    engine, _, _ = make_engine(20)
    engine.add(request(0, Visit([1, 0, 1], 8, 0, None, None, batch=False, hands_off=False)), 0.0)
    engine.launch(engine.plan())
    sequence = engine.find(RequestId("0"))
    assert sequence is not None
    engine.finish(sequence)
    assert engine.pool.num_available == 19
    assert engine.collect() == []
    assert engine.pool.num_available == 20


def test_pace_is_told_how_long_answers_were_and_when_sequences_came() -> None:
    """A step that was launched ahead is no part of the answer."""
    engine, _, _ = make_engine(20)
    pacer = engine.scheduler.pacer = Pacer(lambda: 0.0, lambda: PRIOR)
    engine.add(request(0, Visit([1, 0, 1], 8, 0, None, 3, batch=False, hands_off=False)), 0.0)
    while engine.has_work:
        while engine.may_plan and (plan := engine.plan()).chunks:
            engine.launch(plan)
        engine.collect()
    assert list(pacer._lengths) == [3]
    plain = request(1, Visit([1, 0, 1], 8, 0, None, None, batch=False, hands_off=False))
    adopted = engine.adopt(plain, TokenDelta(plain.request_id, 0, (1,)), engine.pool.take(1) or [], 7.0)
    assert adopted.handed_over_at == 7.0
    engine.scheduler._preempt(adopted)
    assert adopted.handed_over_at is None
