import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.bench.errors import WorkloadError
from diptych.cluster.bench.workload import TimedRequest, Workload

lengths = st.tuples(st.integers(1, 20_000), st.integers(1, 2_000))
workloads = st.lists(st.tuples(st.floats(0, 100), lengths), min_size=1, max_size=20).map(
    lambda rows: Workload("made", tuple(TimedRequest(at, *length) for at, length in sorted([(0.0, rows[0][1]), *rows[1:]])))
)


def evenly(count: int, gap_s: float) -> Workload:
    return Workload("even", tuple(TimedRequest(index * gap_s, 10, 5) for index in range(count)))


@given(workloads, st.floats(0.01, 1000))
def test_another_rate_keeps_every_request(workload: Workload, rate: float) -> None:
    if workload.rate is None or workload.span_s < 1e-6:
        return
    scaled = workload.at_rate(rate)
    assert scaled.rate == pytest.approx(rate)
    assert [(r.prompt_tokens, r.output_tokens) for r in scaled.requests] == [(r.prompt_tokens, r.output_tokens) for r in workload.requests]


@given(workloads, st.integers(2, 5000), st.booleans())
def test_fit_context(workload: Workload, max_context: int, scale: bool) -> None:
    fitted = workload.fit_context(max_context, scale=scale)
    assert len(fitted) == len(workload)
    for before, after in zip(workload.requests, fitted.requests, strict=True):
        assert after.total_tokens <= max_context
        assert 1 <= after.prompt_tokens <= before.prompt_tokens
        assert 1 <= after.output_tokens <= before.output_tokens
        if not scale and before.total_tokens <= max_context:
            assert after == before


def test_scaling_keeps_proportions_and_whole_blocks() -> None:
    workload = Workload("blocks", (TimedRequest(0, 4096, 1024, tuple(range(8))), TimedRequest(1, 1025, 512, (0, 1, 8))), block_tokens=512)
    scaled = workload.fit_context(640, scale=True)
    assert scaled.block_tokens == 64
    assert scaled.requests == (TimedRequest(0, 512, 128, tuple(range(8))), TimedRequest(1, 128, 64, (0, 1, 8)))


def test_cutting_takes_from_the_prompt_first() -> None:
    workload = Workload("long", (TimedRequest(0, 1000, 50), TimedRequest(0, 10, 1000)))
    assert workload.fit_context(100, scale=False).requests == (TimedRequest(0, 50, 50), TimedRequest(0, 1, 99))


def test_narrowing() -> None:
    assert len(evenly(10, 0.5).first(3)) == 3
    assert len(evenly(10, 0.5).first_seconds(2.0)) == 5
    assert evenly(11, 0.5).rate == 2.0
    stretch = evenly(10, 0.5).between(6, 9)
    assert [request.at_s for request in stretch.requests] == [0.0, 0.5, 1.0]
    with pytest.raises(WorkloadError, match="no requests"):
        evenly(10, 0.5).between(10, 12)


def test_what_cannot_be_done_says_why() -> None:
    with pytest.raises(WorkloadError, match="no requests"):
        Workload("none", ())
    with pytest.raises(WorkloadError, match="all 3 requests arrive at once"):
        evenly(3, 0.0).at_rate(2)
    with pytest.raises(WorkloadError, match=r"rate must be > 0 requests/s, got -1"):
        evenly(3, 1.0).at_rate(-1)
    with pytest.raises(WorkloadError, match="got nan"):
        evenly(3, 1.0).at_rate(float("nan"))
    with pytest.raises(WorkloadError, match="context of 1 tokens"):
        evenly(3, 1.0).fit_context(1, scale=False)
