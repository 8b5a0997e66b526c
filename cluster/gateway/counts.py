"""Counters and histograms that cost an addition: Prometheus looks at them when it scrapes. For one thread.

Those of prometheus_client lock and validate at every step, and a request takes a dozen.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class Count(Collector):
    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), known: Iterable[str] = (), *, registry: CollectorRegistry
    ) -> None:
        """`known`: of one label, the values that are told before they have been counted."""
        self._name, self._text, self._labels = name, text, labels
        self._totals: dict[tuple[str, ...], float] = {(value,): 0.0 for value in known} if labels else {(): 0.0}
        registry.register(self)

    def add(self, *labels: str, amount: float = 1.0) -> None:
        self._totals[labels] = self._totals.get(labels, 0.0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, total in self._totals.items():
            family.add_metric(labels, total)
        yield family


class Sums(Collector):
    """Counters that are added up when they are looked at."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], read: Callable[[], Mapping[tuple[str, ...], int]], *, registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, total in self._read().items():
            family.add_metric(labels, total)
        yield family


class Distribution(Collector):
    def __init__(self, name: str, text: str, bounds: Sequence[float], *, registry: CollectorRegistry) -> None:
        """`bounds`: the largest value of each bucket, ascending; one more takes what is beyond."""
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        names = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
