"""`diptych bench split`: what a split costs one client on an idle pair, against the same prompt computed where it is decoded.

    each prompt length: [split, colocated], [colocated, split], …    one request at a time, each with a prompt of its own

Either one deployment serves both, and the header `x-diptych-path` says which way (`router: {debug_headers: true}`), or a second URL is
colocated. Requests take turns, so that both ways meet the same machine at the same time; of TTFT the difference within each pair counts.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from ..gateway.debug_headers import PATH_HEADER
from ..router.policy import Path
from .client import Address, HttpClient
from .endpoint import ModelCard, find_model
from .errors import BenchError
from .load import Call, no_collection, send
from .record import Outcome, RequestRecord
from .workload import TimedRequest, Workload
from .writer import PromptSource, RequestWriter

WARM_UPS = 2                    # pairs of each length
PAUSE_S = 0.05                  # between two requests: what the one before left behind is over


@dataclass(frozen=True)
class SplitBench:
    split: Address
    colocated: Address | None           # None: the same deployment, told by header
    lengths: tuple[int, ...]            # tokens of a prompt
    pairs: int                          # of each length
    output_tokens: int
    prompts: PromptSource
    model: str | None = None
    deadline_s: float = 60.0


class Latencies(Struct, frozen=True):
    """Of one way, milliseconds."""

    ttft_p50: float
    ttft_p90: float
    second_p50: float                   # from token 0 to token 1
    second_p90: float
    later_p50: float                    # from token to token after that


class SplitRow(Struct, frozen=True):
    prompt_tokens: int
    pairs: int
    split: Latencies
    colocated: Latencies
    difference_ms: float                # TTFT split minus TTFT colocated within a pair: median,
    difference_p25_ms: float            # and quartiles
    difference_p75_ms: float


class SplitReport(Struct, frozen=True):
    model: str
    seed: int                           # of the prompts
    split_url: str
    colocated_url: str
    rows: list[SplitRow]


def run_split_bench(bench: SplitBench, console: Console) -> SplitReport:
    """Raises EndpointError, WorkloadError, PromptError; BenchError if a request fails."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(_measure(bench, console))
    print_split(report, console)
    return report


async def _measure(bench: SplitBench, console: Console) -> SplitReport:
    ways = [await _way(bench, path) for path in Path]
    try:
        rows = []
        for salt, length in enumerate(bench.lengths):
            pairs = await _pairs(ways, bench, length, salt)
            rows.append(summary(length, pairs[WARM_UPS:]))
            console.print(f"{length} tokens: {rows[-1].difference_ms:+.2f} ms", style="dim", highlight=False)
    finally:
        for way in ways:
            way.client.close()
    return SplitReport(ways[0].card.id, bench.prompts.seed, str(ways[0].client.address), str(ways[1].client.address), rows)


@dataclass(frozen=True)
class Way:
    client: HttpClient
    card: ModelCard
    writer: RequestWriter

    async def ask(self, timed: TimedRequest, raw: bytes, deadline_s: float) -> RequestRecord:
        """Raises BenchError: a comparison with gaps is none."""
        record = await send(self.client, Call(timed, raw), deadline_s, time.perf_counter)
        if record.outcome is not Outcome.OK or len(record.chunks) < 2 or record.cached_tokens:
            what = f"{record.outcome.value}, {record.cached_tokens or 0} of {timed.prompt_tokens} tokens cached"
            raise BenchError(f"{self.client.address}: {what}, answer in {len(record.chunks)} chunks {record.error}")
        await asyncio.sleep(PAUSE_S)
        return record


async def _way(bench: SplitBench, path: Path) -> Way:
    headers = (f"{PATH_HEADER}: {path}",) if bench.colocated is None else ()
    client = HttpClient(bench.split if bench.colocated is None or path is Path.SPLIT else bench.colocated)
    card = await find_model(client, bench.model)
    return Way(client, card, RequestWriter(client.address, card, bench.prompts, headers))


async def _pairs(ways: Sequence[Way], bench: SplitBench, length: int, salt: int) -> list[list[RequestRecord]]:
    """One record a way, in the order of `ways`; who comes first alternates."""
    timed = TimedRequest(0.0, length, bench.output_tokens)
    count = WARM_UPS + bench.pairs
    workload = Workload(f"prompts of {length}", (timed,) * (len(ways) * count))
    raw = [way.writer.write(workload, salt) for way in ways]
    pairs = []
    with no_collection():
        for i in range(count):
            order = range(len(ways)) if i % 2 else range(len(ways))[::-1]
            records = {way: await ways[way].ask(timed, raw[way][len(ways) * i + way], bench.deadline_s) for way in order}
            pairs.append([records[way] for way in range(len(ways))])
    return pairs


def summary(length: int, pairs: Sequence[Sequence[RequestRecord]]) -> SplitRow:
    split, colocated = zip(*pairs, strict=True)
    low, median, high = np.quantile([_ttft_ms(one) - _ttft_ms(other) for one, other in pairs], [0.25, 0.5, 0.75])
    return SplitRow(length, len(pairs), _latencies(split), _latencies(colocated), float(median), float(low), float(high))


def _latencies(records: Iterable[RequestRecord]) -> Latencies:
    records = list(records)
    gaps_ms = [[1e3 * gap_s for gap_s in record.gaps_s] for record in records]
    later_ms = [gap for gaps in gaps_ms for gap in gaps[1:]] or [float("nan")]
    ttft, second = (np.quantile(each, [0.5, 0.9]) for each in ([_ttft_ms(r) for r in records], [gaps[0] for gaps in gaps_ms]))
    return Latencies(*map(float, (*ttft, *second, np.median(later_ms))))


def _ttft_ms(record: RequestRecord) -> float:
    assert record.ttft_s is not None, "answers without a token have been refused"
    return 1e3 * record.ttft_s


def print_split(report: SplitReport, console: Console) -> None:
    console.print(f"{report.model}: split at {report.split_url}, colocated at {report.colocated_url}", highlight=False)
    titles = "TTFT p50", "p90", "token 0 to 1 p50", "p90", "later"
    table = Table("prompt", "", *titles, "split −", title="milliseconds, as the client sees them; split minus colocated: TTFT, quartiles")
    for row in report.rows:
        difference = f"{row.difference_p25_ms:+.2f} {row.difference_ms:+.2f} {row.difference_p75_ms:+.2f}"
        for name, way, last in (("split", row.split, difference), ("colocated", row.colocated, "")):
            figures = way.ttft_p50, way.ttft_p90, way.second_p50, way.second_p90, way.later_p50
            table.add_row(str(row.prompt_tokens) if last else "", name, *(f"{ms:.2f}" for ms in figures), last)
    console.print(table)
