import msgspec
import pytest

from diptych.cluster.bench.generator import Arrivals, Lengths, Recipe, generate
from diptych.cluster.router.policy import Objectives
from diptych.messages.steps import StepFeatures
from diptych.sim import h200, own_engine
from diptych.sim.outcome import Outcome
from diptych.sim.study import Case, Contender, batch_attainment, crossing_rate, curve, goodput_of, lead


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([(10, 1.0), (20, 0.95), (30, 0.85)], pytest.approx(25)),
        ([(10, 0.8)], 0),
        ([(10, 1.0), (20, 0.9)], 20),
        ([], 0),
        ([(10, 0.95), (20, 0.5), (30, 1.0)], pytest.approx(11.1, abs=0.1)),
    ],
)
def test_goodput_is_where_the_curve_first_falls_through_the_target(points, rate):
    assert crossing_rate(points) == rate


def test_batches_of_neighbours_widen_the_interval():
    mixed = batch_attainment(([True] * 9 + [False]) * 30)
    in_a_row = batch_attainment([True] * 270 + [False] * 30)
    assert mixed.share == in_a_row.share == 0.9
    assert mixed.high - mixed.low < 0.01 < 0.2 < in_a_row.high - in_a_row.low


def test_the_cost_model_is_within_a_few_percent_of_the_measured_table():
    residuals = [abs(each) for each in h200.residuals()]
    assert sorted(residuals)[-2] <= 0.06
    assert max(residuals) <= 0.15, "a prompt of 128 tokens"


@pytest.mark.parametrize("measured", [own_engine.H100, own_engine.H200], ids=["H100", "H200"])
def test_our_own_engines_cost_is_within_a_tenth_of_what_was_measured(measured):
    residuals = sorted(abs(each) for each in own_engine.residuals(measured))
    assert residuals[len(residuals) // 2] <= 0.03
    assert residuals[-1] <= 0.1


@pytest.mark.parametrize(
    ("prompt", "decodes", "rows"), [(1, 0, 64), (65, 0, 128), (900, 0, 960), (60, 10, 128), (300, 10, 384), (0, 10, 10), (3000, 0, 3000)]
)
def test_a_step_with_prompts_has_the_rows_of_its_graph(prompt, decodes, rows):
    assert own_engine.rows_of(StepFeatures(prefill_tokens=prompt, num_decoding=decodes)) == rows


def test_a_contender_may_run_on_any_machine():
    workload = generate(Recipe(40, Lengths(2000), Lengths(20)))
    case = Case("short", (workload,), Objectives(0.4, 0.02), (10.0,), warm_s=0.0)
    contenders = (Contender(1, 1, "round_robin", num_gateways=1, machine=name) for name in ("h100", "h200"))
    [slow], [fast] = (curve(case, contender, lambda point: None) for contender in contenders)
    assert fast.tpot_ms[0] < 0.85 * slow.tpot_ms[0]


def test_a_curve_stops_where_it_is_hopeless():
    workload = generate(Recipe(120, Lengths(2000), Lengths(20)))
    case = Case("short", (workload,), Objectives(0.3, 0.02), (10.0, 200.0, 400.0), warm_s=0.0)
    seen = []
    points = curve(case, Contender(1, 1, "round_robin"), seen.append)
    assert [point.rate for point in points] == [10.0, 200.0]
    assert seen == points
    assert points[0].attainment.share == 1.0
    assert 10.0 <= goodput_of(points).low <= goodput_of(points).rate <= goodput_of(points).high < 200.0


def test_two_contenders_are_compared_batch_by_batch():
    """Hard stretches, which make each one's own interval wide, drop out."""
    workload = generate(Recipe(400, Lengths(2000), Lengths(20), Arrivals.GAMMA, cv=4.0))
    case = Case("bursts", (workload,), Objectives(0.1, 0.02), (16.0,), warm_s=0.0)
    [better], [worse] = (curve(case, Contender(0, number, "round_robin"), lambda point: None) for number in (3, 2))
    ahead = lead(better, worse)
    assert ahead.low < ahead.share == pytest.approx(better.attainment.share - worse.attainment.share)
    assert ahead.low > 0
    assert better.attainment.low < worse.attainment.high
    back = lead(worse, better)
    assert (back.share, back.low, back.high) == pytest.approx((-ahead.share, -ahead.high, -ahead.low))
    with pytest.raises(ValueError, match="different requests"):
        lead(better, msgspec.structs.replace(worse, rate=17.0))


def test_stretches_are_served_one_by_one_and_counted_together():
    easy, hard = (generate(Recipe(100, Lengths(length), Lengths(20))) for length in (500, 12_000))
    both, one, other = (Case("stretches", of, Objectives(0.2, 0.02), (4.0,), warm_s=0.0) for of in ((easy, hard), (easy,), (hard,)))
    [both], [one], [other] = (curve(case, Contender(0, 1, "round_robin"), lambda point: None) for case in (both, one, other))
    assert one.attainment.share > other.attainment.share
    assert (both.attainment.met, both.attainment.total) == (one.attainment.met + other.attainment.met, 200)
    assert len(both.batches) == 10


def test_an_outcome_keeps_both_promises_or_none():
    slo = Objectives(0.4, 0.02)
    good = Outcome(0.0, 11, first_s=0.3, last_s=0.5)
    assert good.meets(slo)
    assert not Outcome(0.0, 11, first_s=0.5, last_s=0.6).meets(slo)
    assert not Outcome(0.0, 11, first_s=0.3, last_s=0.6).meets(slo)
    assert not Outcome(0.0, 11, first_s=0.3).meets(slo)
    assert not Outcome(0.0, 11, refused=True).meets(slo)
    assert Outcome(0.0, 1, first_s=0.3, last_s=0.3).meets(slo)
    assert Outcome(0.0, 11, first_s=9.0, last_s=99.0).meets(Objectives())
