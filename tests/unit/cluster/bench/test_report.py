import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.bench.load import LoadRun
from diptych.cluster.bench.record import Chunk, Outcome, RequestRecord
from diptych.cluster.bench.report import Attainment, Objective, Percentiles, Report, summarize


def answered(sent_s: float, ttft_s: float, tpot_s: float, tokens: int = 5, *, asked: int = 5, lag_s: float = 0.0) -> RequestRecord:
    chunks = tuple(Chunk(sent_s + ttft_s + index * tpot_s, 1) for index in range(tokens))
    return RequestRecord(
        10, asked, sent_s - lag_s, sent_s, chunks[-1].at_s, Outcome.OK, 200, "", "length", chunks, chunks[-1].at_s, tokens, 10, 4
    )


def failed(sent_s: float, outcome: Outcome = Outcome.REFUSED, status: int = 429) -> RequestRecord:
    return RequestRecord(10, 5, sent_s, sent_s, sent_s + 0.01, outcome, status, "said no")


def report(*records: RequestRecord, gpus: int = 1) -> Report:
    return summarize(LoadRun(len(records), records), 2.0, Objective(200, 20), gpus)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=50))
def test_percentiles_are_numpys(values_s: list[float]) -> None:
    found = Percentiles.of_seconds(values_s)
    assert found is not None
    expected = [np.percentile(np.array(values_s), q) * 1e3 for q in (50, 90, 95, 99)]
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values_s) * 1e3)


def test_percentiles_by_hand() -> None:
    assert Percentiles.of_seconds([0.004, 0.001, 0.003, 0.002, 0.005]) == Percentiles(5, *map(pytest.approx, (3.0, 3.0, 4.6, 4.8, 4.96)))
    assert Percentiles.of_seconds([]) is None


def test_both_objectives_must_be_met_by_the_same_request() -> None:
    found = report(answered(0, 0.1, 0.01), answered(1, 0.3, 0.01), answered(2, 0.1, 0.03), failed(3))
    assert (found.attainment.met, found.attainment.total, found.attainment.share) == (1, 4, 0.25)
    assert found.rate_sent == 1.0
    assert found.goodput_per_gpu == 0.25


def test_goodput_is_per_gpu() -> None:
    assert report(answered(0, 0.1, 0.01), answered(0.5, 0.1, 0.01), gpus=4).goodput_per_gpu == pytest.approx(0.5)


def test_a_limit_not_given_does_not_count() -> None:
    slow = answered(0, 9.0, 0.01)
    assert Objective(None, 20).met_by(slow)
    assert not Objective(200, None).met_by(slow)
    assert Objective().met_by(slow)
    assert not Objective().met_by(failed(0))


def test_one_token_has_no_tpot_to_miss() -> None:
    assert Objective(200, 1e-9).met_by(answered(0, 0.1, 0.0, tokens=1))


def test_exactly_at_the_limit_is_met() -> None:
    assert Objective(125, 62.5).met_by(answered(0, 0.125, 0.0625))


def test_interrupted_requests_are_neither_met_nor_missed() -> None:
    found = report(answered(0, 0.1, 0.01), failed(1, Outcome.CANCELLED, 200))
    assert (found.attainment.total, found.attainment.share, found.failed) == (1, 1.0, 0)


def test_refusals_have_a_time_of_their_own() -> None:
    found = report(answered(0, 0.1, 0.01), failed(1), failed(2, Outcome.HTTP_ERROR, 500))
    assert found.refused_ms is not None
    assert (found.refused_ms.count, found.refused_ms.p99) == (1, pytest.approx(10))
    assert found.e2e_ms is not None
    assert found.e2e_ms.count == 1
    assert report(answered(0, 0.1, 0.01)).refused_ms is None


def test_counts_and_rates() -> None:
    found = report(answered(0, 0.1, 0.01), answered(1, 0.1, 0.01, tokens=3), failed(2), failed(3, Outcome.HTTP_ERROR, 500))
    assert (found.sent, found.ok, found.failed, found.wrong_length) == (4, 2, 2, 1)
    assert {kind: count for kind, count in found.outcomes.items() if count} == {"ok": 2, "refused": 1, "http_error": 1}
    assert found.first_errors == {"refused": "HTTP 429: said no", "http_error": "HTTP 500: said no"}
    assert found.duration_s == pytest.approx(3.01)
    assert found.output_tokens_per_s == pytest.approx(8 / 3.01)
    assert found.cached_prompt_share == 0.4


def test_a_late_client_is_told() -> None:
    assert not report(answered(0, 0.1, 0.01, lag_s=0.009)).client_bound
    assert report(answered(0, 0.1, 0.01, lag_s=0.011)).client_bound


def test_nothing_sent_is_a_report_too() -> None:
    found = summarize(LoadRun(9, (), interrupted=True), 2.0, Objective(), 1)
    assert (found.sent, found.rate_sent, found.ttft_ms, found.goodput_per_gpu) == (0, None, None, None)


def test_json_keys_are_stable() -> None:
    encoded = json.loads(msgspec.json.encode(report(failed(0))))
    assert list(encoded) == list(Report.__struct_fields__)
    assert set(encoded["outcomes"]) == {outcome.value for outcome in Outcome}
    assert encoded["ttft_ms"] is None


@given(st.integers(1, 5000), st.data())
def test_wilson_interval(total: int, data: st.DataObject) -> None:
    met = data.draw(st.integers(0, total))
    found = Attainment.of(met, total)
    assert 0 <= found.low <= found.share <= found.high <= 1
    larger = Attainment.of(met * 4, total * 4)
    assert larger.high - larger.low < found.high - found.low


def test_wilson_interval_by_hand() -> None:
    found = Attainment.of(90, 100)
    assert (found.low, found.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)       # Wilson 1927, z = 1.96
    assert (Attainment.of(0, 0).low, Attainment.of(0, 0).high) == (0.0, 1.0)
