"""What a gateway counts: for Prometheus on /metrics, and the recent past for GatewayStatus. A registry per gateway, whose id labels all."""

import math
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ...messages.requests import LinkFigures, LinkMeasured, LoadReport, RequestSpan, ServiceClass, TransferFailed
from ..router.policy import Path
from .counts import Count, Distribution, Sums
from .errors import NoRoute
from .generation import Generation, GenerationState
from .status import Quantiles, TransferTotals

NUM_RECENT = 1000
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)
TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
E2E_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
ERROR_BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 2, 5)

PAIR = ("prefill", "decode", "transport")
OUTCOMES = ("finished", "aborted", "refused", "failed")
REFUSALS = ("overloaded", "no_route", "rate_limited")
CLASSES = [str(each) for each in ServiceClass]


class _Ended(NamedTuple):
    """What choices that have ended are counted by; all other counts of them are sums."""

    service_class: str
    outcome: str
    path: str | None                          # of the last attempt
    in_time: bool                             # finished, and kept its objectives


class _Labelled(Collector):
    def __init__(self, registry: CollectorRegistry, gateway: str) -> None:
        self._registry, self._gateway = registry, gateway

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample._replace(labels={"gateway": self._gateway, **sample.labels}) for sample in family.samples]
            yield family


class Metrics:
    """The dispatcher's Observer."""

    def __init__(self, gateway: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._labelled = _Labelled(registry, gateway)
        self._ended: Tally[tuple[str, str, str | None, bool]] = Tally()        # by what _Ended names
        self.num_retries = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.last_span: RequestSpan | None = None
        self._transfers: dict[str, TransferTotals] = {}
        self._recent_ttft: deque[float] = deque(maxlen=NUM_RECENT)
        self._recent_tpot: deque[float] = deque(maxlen=NUM_RECENT)
        self._ttft = Distribution("diptych_ttft_seconds", "HTTP request read to first token", TTFT_BUCKETS_S, registry=registry)
        self._tpot = Distribution("diptych_tpot_seconds", "Mean time between a choice's tokens", TPOT_BUCKETS_S, registry=registry)
        self._e2e = Distribution("diptych_e2e_seconds", "HTTP request read to last token", E2E_BUCKETS_S, registry=registry)
        off = "How far first tokens of first attempts were off: |came / predicted - 1|, from the HTTP request on"
        self._ttft_error = Distribution("diptych_ttft_prediction_error", off, ERROR_BUCKETS, registry=registry)
        self._add_sums("choices", "Choices by how they ended", {"outcome": OUTCOMES}, lambda end: (end.outcome,))
        by_both = {"class": CLASSES, "outcome": OUTCOMES}
        self._add_sums("requests", "Choices by class and how they ended", by_both, lambda end: (end.service_class, end.outcome))
        in_time = "Choices that finished and kept their objectives"
        self._add_sums("goodput_requests", in_time, {"class": CLASSES}, _class_in_time)
        refused = "Choices that were never sent to a worker: refused by the router, or for their key's limits"
        self._refusals = Count("diptych_refusals", refused, ["reason"], REFUSALS, registry=registry)
        self._add_sums("paths", "Choices by the way of their last attempt", {"path": [str(each) for each in Path]}, _way)
        error_text = "Mean relative error of a worker's predicted step times"
        self._predictor_error = Gauge("diptych_predictor_error", error_text, ["worker"], registry=registry)
        self._responses = Count("diptych_http_responses", "HTTP answers", ["path", "status"], registry=registry)
        self._turned_away = Count("diptych_http_turned_away", "Requests over connections that were too many", registry=registry)
        self._retries = Count("diptych_retries", "Attempts given up for another", ["reason"], registry=registry)
        self._prompt_tokens = Count("diptych_prompt_tokens", "Prompt tokens of finished choices", registry=registry)
        self._output_tokens = Count("diptych_output_tokens", "Output tokens of finished choices", registry=registry)
        self._kv_bytes = Count("diptych_kv_transfer_bytes", "KV written into decode workers", PAIR, registry=registry)
        self._kv_seconds = Count("diptych_kv_transfer_seconds", "Time the writers' transports were busy", PAIR, registry=registry)
        self._kv_gbps = Gauge("diptych_kv_transfer_gbps", "GB/s while busy, of the last handoff", PAIR, registry=registry)
        self._kv_failures = Count("diptych_kv_transfer_failures", "Handoffs whose KV could not be moved", PAIR, registry=registry)
        probed = "of the probe when the prefill worker met the decode worker"
        self._probe_gbps = Gauge("diptych_kv_transfer_probe_gbps", f"GB/s {probed}", PAIR, registry=registry)
        self._probe_latency = Gauge("diptych_kv_transfer_probe_latency_seconds", f"One page's write, {probed}", PAIR, registry=registry)
        self._used = Gauge("diptych_kv_transfer_used", "1: of the pair's transports the one that it uses", PAIR, registry=registry)
        self._reached: dict[tuple[str, str], set[str]] = {}          # transports of a pair, so far

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Read when scraped."""
        Gauge(f"diptych_{name}", text, registry=self._registry).set_function(read)

    def render(self, reports: Iterable[LoadReport] = ()) -> bytes:
        self._predictor_error.clear()
        for report in reports:
            if report.step_model is not None:
                self._predictor_error.labels(report.worker.worker_id).set(report.step_model.error)
        return generate_latest(self._labelled)

    def responded(self, path: str, status: int) -> None:
        self._responses.add(path, str(status))

    def rate_limited(self, num_choices: int) -> None:
        self._refusals.add("rate_limited", amount=num_choices)

    def turned_away(self) -> None:
        self._turned_away.add()

    def retried(self, reason: str) -> None:
        self.num_retries += 1
        self._retries.add(reason)

    def span(self, span: RequestSpan) -> None:
        self.last_span = span
        old = self._transfers.get(span.transport) or TransferTotals(span.transport, 0, 0, 0, 0.0)
        self._transfers[span.transport] = TransferTotals(
            transport=span.transport,
            num_handoffs=old.num_handoffs + 1,
            num_pages=old.num_pages + span.num_pages,
            num_bytes=old.num_bytes + span.num_bytes,
            busy_s=old.busy_s + span.transfer_s,
        )
        pair = (span.worker.worker_id, span.decode_id, span.transport)
        self._kv_bytes.add(*pair, amount=span.num_bytes)
        self._kv_seconds.add(*pair, amount=span.transfer_s)
        if span.transfer_s > 0:                        # 0: the decode worker had all of it
            self._kv_gbps.labels(*pair).set(span.num_bytes / span.transfer_s / 1e9)

    def transfer_failed(self, failed: TransferFailed) -> None:
        self._kv_failures.add(failed.worker.worker_id, failed.decode_id, failed.transport)

    def link_measured(self, link: LinkMeasured) -> None:
        ends = (link.worker.worker_id, link.decode_id)
        reached: tuple[LinkMeasured | LinkFigures, ...] = (link, *link.others)
        for figures in reached:
            self._probe_gbps.labels(*ends, figures.transport).set(figures.gbps)
            self._probe_latency.labels(*ends, figures.transport).set(figures.latency_s)
        known = self._reached.setdefault(ends, set())
        known.update(figures.transport for figures in reached)
        for transport in known:
            self._used.labels(*ends, transport).set(transport == link.transport)

    def ended(self, generation: Generation) -> None:
        self._ended[generation.prompt.service_class, generation.state, generation.path, generation.kept_objectives] += 1
        if generation.state is GenerationState.REFUSED:
            self._refusals.add("no_route" if isinstance(generation.error, NoRoute) else "overloaded")
        first, last = generation.first_token_at, generation.last_token_at
        if first is None or last is None:
            return
        self._ttft.observe(first - generation.arrived_at)
        self._recent_ttft.append(first - generation.arrived_at)
        if generation.num_attempts == 1 and (predicted_s := generation.predicted_ttft_s) is not None and 0 < predicted_s < math.inf:
            self._ttft_error.observe(abs((first - generation.arrived_at) / predicted_s - 1))
        if generation.state is GenerationState.FINISHED:
            self._finished(generation, first, last)

    @property
    def outcomes(self) -> dict[str, int]:
        return dict.fromkeys(OUTCOMES, 0) | {outcome: total for (outcome,), total in self._sums(lambda end: (end.outcome,)).items()}

    @property
    def by_class(self) -> dict[str, int]:
        """Ended, but for those whose client left."""
        of_those = self._sums(lambda end: None if end.outcome == GenerationState.ABORTED else (end.service_class,))
        return {service_class: total for (service_class,), total in of_those.items()}

    @property
    def good_by_class(self) -> dict[str, int]:
        """Of those, finished and in time."""
        return {service_class: total for (service_class,), total in self._sums(_class_in_time).items()}

    @property
    def transfers(self) -> tuple[TransferTotals, ...]:
        return tuple(self._transfers.values())

    @property
    def ttft(self) -> Quantiles | None:
        return _quantiles(self._recent_ttft)

    @property
    def tpot(self) -> Quantiles | None:
        return _quantiles(self._recent_tpot)

    def _add_sums(
        self, name: str, text: str, labels: Mapping[str, Iterable[str]], labels_of: Callable[[_Ended], tuple[str, ...] | None]
    ) -> None:
        """`labels`: with their values, each of which is told from the start, or a rate would miss the first."""
        zeros = dict.fromkeys(product(*labels.values()), 0)
        Sums(f"diptych_{name}", text, list(labels), lambda: zeros | self._sums(labels_of), registry=self._registry)

    def _sums(self, labels_of: Callable[[_Ended], tuple[str, ...] | None]) -> dict[tuple[str, ...], int]:
        """By labels; those without any are left out."""
        sums: Tally[tuple[str, ...]] = Tally()
        for ended, total in self._ended.items():
            if (labels := labels_of(_Ended(*ended))) is not None:
                sums[labels] += total
        return sums

    def _finished(self, generation: Generation, first: float, last: float) -> None:
        num_prompt, num_output = len(generation.prompt.token_ids), len(generation.outputs)
        self.num_prompt_tokens += num_prompt
        self.num_output_tokens += num_output
        self._prompt_tokens.add(amount=num_prompt)
        self._output_tokens.add(amount=num_output)
        self._e2e.observe(last - generation.arrived_at)
        if (tpot_s := generation.tpot_s) is not None:
            self._tpot.observe(tpot_s)
            self._recent_tpot.append(tpot_s)


def _class_in_time(ended: _Ended) -> tuple[str, ...] | None:
    return (ended.service_class,) if ended.in_time else None


def _way(ended: _Ended) -> tuple[str, ...] | None:
    return None if ended.path is None else (ended.path,)


def _quantiles(samples: Iterable[float]) -> Quantiles | None:
    """Nearest rank."""
    ordered = sorted(samples)
    if not ordered:
        return None
    return Quantiles(len(ordered), *(ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.9)))
