"""The same as prometheus_client's own would show."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from diptych.cluster.gateway.counts import Count, Distribution

LABELS = st.sampled_from(["a", 'b"\n', "ü"])
BOUNDS = (0.005, 0.1, 1, 2.5)


def samples(registry: CollectorRegistry) -> set[tuple]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    shown = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    return {(sample.name, tuple(sorted(sample.labels.items())), sample.value) for sample in shown}


@given(st.lists(st.tuples(LABELS, LABELS, st.integers(0, 9))))
def test_counts(steps):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    plain, labelled = Count("x_things", "Things", registry=ours), Count("x_seen", "Seen", ["one", "two"], registry=ours)
    oracle = Counter("x_things", "Things", registry=theirs), Counter("x_seen", "Seen", ["one", "two"], registry=theirs)
    for one, two, amount in steps:
        plain.add(amount=amount)
        labelled.add(one, two)
        oracle[0].inc(amount)
        oracle[1].labels(one, two).inc()
    assert samples(ours) == samples(theirs)
    assert any(name == "x_things_total" for name, _, _ in samples(ours))


@given(st.lists(st.sampled_from([*BOUNDS, 0.0, 0.05, 1.5, 99.0])))
def test_distributions(values):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distribution, oracle = Distribution("x_s", "S", BOUNDS, registry=ours), Histogram("x_s", "S", buckets=BOUNDS, registry=theirs)
    for value in values:
        distribution.observe(value)
        oracle.observe(value)
    assert samples(ours) == samples(theirs)
    assert len(samples(ours)) == len(BOUNDS) + 3
