import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.bench.errors import WorkloadError
from diptych.cluster.bench.goodput import MAX_DOUBLINGS, MAX_HALVINGS, TRANSITIONS, GoodputSearch, Phase, Probe, SearchPlan
from diptych.cluster.bench.report import Attainment


def drive(search: GoodputSearch, share_at) -> list[Probe]:
    """Plays a server whose attainment is exactly share_at(rate)."""
    probes = []
    while (probe := search.next_probe()) is not None:
        probes.append(probe)
        assert len(probes) < 300, f"no end: {search}"
        search.observe(Attainment.of(round(share_at(probe.rate) * probe.num_requests), probe.num_requests))
    return probes


@given(st.floats(-4, 10), st.floats(0.1, 50), st.floats(0.01, 0.3), st.floats(0.5, 0.99))
def test_finds_the_threshold_of_a_sharp_server(octaves: float, start: float, resolution: float, target: float) -> None:
    threshold = start * 2**octaves
    plan = SearchPlan(start, 20_000, target, resolution=resolution, min_probe_s=0)
    search = GoodputSearch(plan)
    drive(search, lambda rate: 1.0 if rate <= threshold else 0.0)
    found = search.result()
    assert found.phase is Phase.FOUND
    assert found.rate <= threshold < found.rate * (1 + resolution) * (1 + 1e-9)
    assert found.rate_low == found.rate
    assert found.rate_high is not None
    assert found.rate_high > threshold


@given(st.floats(0.1, 200), st.floats(0.02, 2.0))
def test_finds_the_threshold_of_a_gentle_server(threshold: float, steepness: float) -> None:
    """Attainment falls slowly through the target: the answer's own attainment is near it."""

    def share(rate: float) -> float:
        return min(1.0, max(0.0, 0.9 - steepness * (rate / threshold - 1)))

    search = GoodputSearch(SearchPlan(1.0, 100_000))
    drive(search, share)
    found = search.result()
    assert found.phase is Phase.FOUND
    assert found.rate_low <= found.rate
    assert found.rate_high is None or found.rate_high > found.rate
    assert share(found.rate) >= 0.9 - 0.03


@given(st.integers(0, 2**32), st.floats(1, 100), st.integers(1, 3000), st.sampled_from([0.0, 0.1, 20.0]))
def test_ends_and_stays_consistent_whatever_it_is_told(seed: int, start: float, max_requests: int, min_probe_s: float) -> None:
    noise = random.Random(seed)
    plan = SearchPlan(start, max_requests, min_probe_s=min_probe_s)
    first = min(start, plan.highest_rate)
    search, phases, probes = GoodputSearch(plan), [Phase.BRACKETING], 0
    while (probe := search.next_probe()) is not None:
        assert 1 <= probe.num_requests <= max_requests
        assert probe.num_requests >= probe.rate * min_probe_s * (1 - 1e-9)
        assert first / 2**MAX_HALVINGS <= probe.rate <= first * 2**MAX_DOUBLINGS
        search.observe(Attainment.of(noise.randint(0, probe.num_requests), probe.num_requests))
        if search.phase is not phases[-1]:
            assert search.phase in TRANSITIONS[phases[-1]]
            phases.append(search.phase)
        probes += 1
        assert probes < 500
    found = search.result()
    assert not TRANSITIONS[found.phase]
    passed = [decided.rate for decided in found.decided if decided.passed]
    missed = [decided.rate for decided in found.decided if not decided.passed]
    assert found.rate == max(passed, default=0.0)
    assert not passed or not missed or max(passed) < min(missed)
    assert (found.requests_needed is not None) is (found.phase is Phase.TOO_SHORT)
    assert found.requests_needed is None or found.requests_needed > max_requests


def test_a_clear_rate_is_tried_once() -> None:
    search = GoodputSearch(SearchPlan(1.0, 20_000))
    rates = [probe.rate for probe in drive(search, lambda rate: 1.0 if rate <= 5.5 else 0.0)]
    assert rates == [1, 2, 4, 8, 6, 5, 5.5, 5.75]


def test_a_high_target_needs_more_requests() -> None:
    search = GoodputSearch(SearchPlan(1.0, 20_000, target=0.99))
    probes = drive(search, lambda rate: 1.0 if rate <= 1.5 else 0.0)
    assert [probe.num_requests for probe in probes[:5]] == [40, 80, 160, 320, 640]      # only then all of them are surely over 0.99


def test_below_and_above() -> None:
    never, always = GoodputSearch(SearchPlan(1.0, 100)), GoodputSearch(SearchPlan(1.0, 100_000))
    drive(never, lambda rate: 0.0)
    drive(always, lambda rate: 1.0)
    assert (never.result().phase, never.result().rate, never.result().rate_low) == (Phase.BELOW, 0.0, 0.0)
    assert (always.result().phase, always.result().rate, always.result().rate_high) == (Phase.ABOVE, 2.0**MAX_DOUBLINGS, None)


def test_a_close_rate_is_tried_again_with_more_requests_until_its_interval_is_narrow() -> None:
    search = GoodputSearch(SearchPlan(4.0, 100_000, min_requests=100, min_probe_s=0))
    counts = []
    for _ in range(3):
        probe = search.next_probe()
        assert probe is not None
        assert probe.rate == 4.0
        counts.append(probe.num_requests)
        search.observe(Attainment.of(round(0.9 * probe.num_requests), probe.num_requests))
    assert counts == [100, 200, 400]
    (decided,) = search.result().decided
    assert decided.attainment.high - decided.attainment.low <= 0.06
    assert decided.passed
    assert search.result().rate_low == 0.0, "an interval across the target makes nothing sure"


def test_a_probe_lasts_long_enough_for_a_queue_to_grow() -> None:
    assert GoodputSearch(SearchPlan(30.0, 100_000, min_probe_s=20)).next_probe() == Probe(30.0, 600)
    assert GoodputSearch(SearchPlan(1.0, 100_000, min_probe_s=20)).next_probe() == Probe(1.0, 40)
    assert GoodputSearch(SearchPlan(30.0, 250, min_probe_s=20)).next_probe() == Probe(12.5, 250)


@pytest.mark.parametrize(("start", "rates"), [(1.0, [1, 2, 4, 8, 10]), (9.8, [9.8, 10]), (50.0, [10])])
def test_a_rate_at_which_the_workload_is_over_too_soon_is_not_tried(start: float, rates: list[float]) -> None:
    search = GoodputSearch(SearchPlan(start, 200, min_probe_s=20))
    assert [probe.rate for probe in drive(search, lambda rate: 1.0)] == rates
    found = search.result()
    assert (found.phase, found.rate, found.rate_high) == (Phase.TOO_SHORT, rates[-1], None)
    assert found.requests_needed == 40 * rates[-1]


def test_a_short_workload_is_enough_for_a_slow_server() -> None:
    search = GoodputSearch(SearchPlan(50.0, 200, min_probe_s=20))
    drive(search, lambda rate: 1.0 if rate <= 7 else 0.0)
    assert search.result().phase is Phase.FOUND
    assert search.result().rate == pytest.approx(7, rel=0.05)


@given(st.floats(1, 50), st.floats(1, 100), st.integers(100, 5000), st.floats(0.1, 2))
def test_a_server_with_a_queue_is_not_found_much_faster_than_it_is(capacity: float, start: float, max_requests: int, ttft_s: float) -> None:
    """It serves one request every 1/capacity s; at another rate the queue has grown by (rate / capacity − 1) s in each second."""

    def share(rate: float) -> float:
        return 1.0 if rate <= capacity else min(1.0, ttft_s / (rate / capacity - 1) / 20)

    search = GoodputSearch(SearchPlan(start, max_requests, min_probe_s=20))
    drive(search, share)
    assert search.result().rate <= capacity * (1 + ttft_s / 0.87 / 20) * 1.001


def test_binomial_noise_stays_within_the_interval() -> None:
    """Share 0.9 is crossed at 10 requests/s; the sure interval must hold it in nearly all of 100 seeded searches."""
    held = 0
    for seed in range(100):
        noise, search = random.Random(seed), GoodputSearch(SearchPlan(2.0, 5000))
        while (probe := search.next_probe()) is not None:
            share = min(1.0, max(0.0, 0.9 - 0.5 * (probe.rate / 10 - 1)))
            search.observe(Attainment.of(sum(noise.random() < share for _ in range(probe.num_requests)), probe.num_requests))
        found = search.result()
        held += found.rate_low <= 10 and (found.rate_high is None or found.rate_high > 10)
    assert held >= 90


@pytest.mark.parametrize(
    "wrong", [{"target": 1.0}, {"target": 0.0}, {"half_width": 0.0}, {"resolution": 0.0}, {"start_rate": 0.0}, {"start_rate": float("inf")}]
)
def test_impossible_plans_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(WorkloadError, match="cannot be made with"):
        SearchPlan(**({"start_rate": 1.0, "max_requests": 100} | wrong))
