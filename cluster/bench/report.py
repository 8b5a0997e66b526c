"""From records to figures; pure.

    RequestRecords, Objective ─> summarize ─> Report ─> JSON (field names are the keys) and a table

*Attainment*: the share of requests that met TTFT and TPOT both; one that failed or was refused missed. *Goodput* of a run: rate
really sent × attainment / GPUs. (DistServe's goodput, the highest rate that still reaches a target attainment, is goodput.py's.)
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np

from .load import LoadRun
from .record import Outcome, RequestRecord

Z_95 = 1.959963984540054
MAX_LAG_P99_MS = 10.0


class Objective(msgspec.Struct, frozen=True):
    """Joint latency objective; None: not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """An answer of one token has no TPOT to miss."""
        if record.outcome is not Outcome.OK or record.ttft_s is None:
            return False
        ttft_met = self.ttft_ms is None or record.ttft_s * 1e3 <= self.ttft_ms
        return ttft_met and (self.tpot_ms is None or record.tpot_s is None or record.tpot_s * 1e3 <= self.tpot_ms)


class Percentiles(msgspec.Struct, frozen=True):
    """In milliseconds, linear between the two nearest values (numpy's default)."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of_seconds(cls, values_s: Sequence[float]) -> Self | None:
        if not values_s:
            return None
        values_ms = np.asarray(values_s) * 1e3
        return cls(len(values_s), float(values_ms.mean()), *(float(np.percentile(values_ms, q)) for q in (50, 90, 95, 99)))


class Attainment(msgspec.Struct, frozen=True):
    """`met` of `total`, with Wilson's 95 % interval, which takes requests as independent: bursts make it a little narrow."""

    met: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, met: int, total: int) -> Self:
        assert 0 <= met <= total, f"{met} of {total}"
        if total == 0:
            return cls(0, 0, 0.0, 0.0, 1.0)
        share, spread = met / total, Z_95**2 / total
        middle = (share + spread / 2) / (1 + spread)
        half_width = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
        return cls(met, total, share, max(0.0, min(share, middle - half_width)), min(1.0, max(share, middle + half_width)))


class Report(msgspec.Struct, frozen=True):
    rate_asked: float | None            # requests/s of the workload as scaled; None: all at once
    rate_sent: float | None             # requests/s really sent
    planned: int                        # requests of the workload
    sent: int                           # fewer when interrupted
    ok: int
    interrupted: bool
    outcomes: dict[str, int]            # by kind, every kind a key
    first_errors: dict[str, str]        # an example of each kind of failure
    wrong_length: int                   # finished answers of another length than asked (ignore_eos asks for an exact one)
    wrong_prompt_length: int            # the server counted another number of prompt tokens than were made
    duration_s: float                   # first request sent to last one ended
    completed_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    cached_prompt_share: float | None   # of the prompt tokens the server reported, where it reports cached ones
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None
    refused_ms: Percentiles | None      # how soon refusals came
    lag_ms: Percentiles | None          # the load generator's own lateness
    client_bound: bool                  # p99 of the lag is over 10 ms: the figures tell of the client, not of the server
    attainment: Attainment
    goodput_per_gpu: float | None       # rate sent × attainment / GPUs

    @property
    def failed(self) -> int:
        return self.sent - self.ok - self.outcomes[Outcome.CANCELLED.value]


def summarize(run: LoadRun, rate_asked: float | None, objective: Objective, gpus: int) -> Report:
    ok = [record for record in run.records if record.outcome is Outcome.OK]
    judged = [record for record in run.records if record.outcome is not Outcome.CANCELLED]
    lag_ms = Percentiles.of_seconds([record.lag_s for record in run.records])
    duration_s = max((record.ended_s for record in run.records), default=0.0) - min((record.sent_s for record in run.records), default=0.0)
    attainment = Attainment.of(sum(map(objective.met_by, judged)), len(judged))
    rate_sent = _rate_sent(run.records)
    return Report(
        rate_asked=rate_asked,
        rate_sent=rate_sent,
        planned=run.planned,
        sent=len(run.records),
        ok=len(ok),
        interrupted=run.interrupted,
        outcomes=_count_outcomes(run.records),
        first_errors=_first_errors(run.records),
        wrong_length=sum(record.output_tokens != record.output_tokens_asked for record in ok),
        wrong_prompt_length=sum(record.prompt_tokens_seen not in (None, record.prompt_tokens) for record in ok),
        duration_s=duration_s,
        completed_per_s=_per_second(len(ok), duration_s),
        prompt_tokens_per_s=_per_second(sum(record.prompt_tokens for record in ok), duration_s),
        output_tokens_per_s=_per_second(sum(record.output_tokens for record in run.records), duration_s),
        cached_prompt_share=_cached_share(ok),
        ttft_ms=Percentiles.of_seconds([record.ttft_s for record in ok if record.ttft_s is not None]),
        tpot_ms=Percentiles.of_seconds([record.tpot_s for record in ok if record.tpot_s is not None]),
        itl_ms=Percentiles.of_seconds([gap_s for record in ok for gap_s in record.gaps_s]),
        e2e_ms=Percentiles.of_seconds([record.e2e_s for record in ok]),
        refused_ms=Percentiles.of_seconds([record.e2e_s for record in run.records if record.outcome is Outcome.REFUSED]),
        lag_ms=lag_ms,
        client_bound=lag_ms is not None and lag_ms.p99 > MAX_LAG_P99_MS,
        attainment=attainment,
        goodput_per_gpu=None if rate_sent is None else rate_sent * attainment.share / gpus,
    )


def _rate_sent(records: Sequence[RequestRecord]) -> float | None:
    """As `Workload.rate`: gaps over span."""
    sent_s = [record.sent_s for record in records]
    span_s = max(sent_s, default=0.0) - min(sent_s, default=0.0)
    return (len(records) - 1) / span_s if span_s > 0 else None


def _count_outcomes(records: Sequence[RequestRecord]) -> dict[str, int]:
    counted = Counter(record.outcome for record in records)
    return {outcome.value: counted[outcome] for outcome in Outcome}


def _first_errors(records: Sequence[RequestRecord]) -> dict[str, str]:
    first: dict[str, str] = {}
    for record in records:
        if record.outcome not in (Outcome.OK, Outcome.CANCELLED):
            status = f"HTTP {record.status}: " if record.status not in (None, 200) else ""
            first.setdefault(record.outcome.value, status + record.error)
    return first


def _cached_share(records: Sequence[RequestRecord]) -> float | None:
    told = [record for record in records if record.cached_tokens is not None and record.prompt_tokens_seen]
    total = sum(record.prompt_tokens_seen or 0 for record in told)
    return sum(record.cached_tokens or 0 for record in told) / total if total else None


def _per_second(amount: int, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0
