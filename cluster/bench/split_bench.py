"""`diptych bench split`: what a split costs one client on an idle pair, against the same prompt served by one worker.

    each prompt length: [split, local, alone], [split, alone, local], …    one request at a time, each with a prompt of its own

*Local* is the decode worker by itself, *alone* the prefill worker. With one of each, *alone* computes the prompt on the device that
computes it for the split, and what the split's first token takes longer is the handoff; two devices of one kind can differ by more than
that. The header `x-diptych-path` says which way (`router: {debug_headers: true}`); or a second URL is *colocated*, and there are two ways.
Requests take turns in all orders, so that all ways meet the same machine, as busy as it is; of TTFT the difference within a round counts.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from ..gateway.debug_headers import PATH_HEADER
from ..router.policy import Path
from .client import Address, HttpClient
from .endpoint import ModelCard, find_model
from .errors import BenchError, WorkloadError
from .load import Call, no_collection, send
from .record import Outcome, RequestRecord
from .workload import TimedRequest, Workload
from .writer import PromptSource, RequestWriter

WARM_UPS = 6                    # rounds of each length: each order once
PAUSE_S = 0.05                  # between two requests: what the one before left behind is over


@dataclass(frozen=True)
class SplitBench:
    split: Address
    colocated: Address | None           # None: the same deployment, told by header
    lengths: tuple[int, ...]            # tokens of a prompt
    rounds: int                         # of each length
    output_tokens: int
    prompts: PromptSource
    model: str | None = None
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise WorkloadError("--lengths names no length of a prompt: give some, such as 1024,4096")


class Latencies(Struct, frozen=True):
    """Of one way, milliseconds."""

    ttft_p50: float
    ttft_p90: float
    second_p50: float                   # from token 0 to token 1
    second_p90: float
    later_p50: float                    # from token to token after that


class Other(Struct, frozen=True):
    """A way that the split is compared with."""

    name: str                           # local, alone; colocated
    latencies: Latencies
    difference_ms: float                # TTFT split minus this one's within a round: median,
    difference_p25_ms: float            # and quartiles
    difference_p75_ms: float


class SplitRow(Struct, frozen=True):
    prompt_tokens: int
    rounds: int
    split: Latencies
    others: list[Other]


class SplitReport(Struct, frozen=True):
    model: str
    seed: int                           # of the prompts
    split_url: str
    colocated_url: str | None
    rows: list[SplitRow]


def run_split_bench(bench: SplitBench, console: Console) -> SplitReport:
    """Raises EndpointError, WorkloadError, PromptError; BenchError if a request fails."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(_measure(bench, console))
    print_split(report, console)
    return report


async def _measure(bench: SplitBench, console: Console) -> SplitReport:
    ways = await _ways(bench)
    try:
        for way in ways:
            _check_lengths(bench, way.card)
        rows = []
        for salt, length in enumerate(bench.lengths):
            rounds = await _rounds(ways, bench, length, salt)
            rows.append(summary(length, {way.name: [each[i] for each in rounds[WARM_UPS:]] for i, way in enumerate(ways)}))
            found = ", ".join(f"{other.difference_ms:+.2f} ms to {other.name}" for other in rows[-1].others)
            console.print(f"{length} tokens: {found}", style="dim", highlight=False)
    finally:
        for way in ways:
            way.client.close()
    colocated_url = None if bench.colocated is None else str(bench.colocated)
    return SplitReport(ways[0].card.id, bench.prompts.seed, str(bench.split), colocated_url, rows)


@dataclass(frozen=True)
class Way:
    name: str
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


async def _ways(bench: SplitBench) -> list[Way]:
    """The split comes first."""
    if bench.colocated is None:
        return [await _way(bench, path, bench.split, (f"{PATH_HEADER}: {path}",)) for path in Path]
    return [await _way(bench, "split", bench.split), await _way(bench, "colocated", bench.colocated)]


async def _way(bench: SplitBench, name: str, address: Address, headers: tuple[str, ...] = ()) -> Way:
    client = HttpClient(address)
    card = await find_model(client, bench.model)
    return Way(name, client, card, RequestWriter(client.address, card, bench.prompts, headers))


def _check_lengths(bench: SplitBench, card: ModelCard) -> None:
    """Raises WorkloadError: before the shorter ones are measured."""
    context, longest = card.max_model_len, max(bench.lengths)
    if context is not None and longest + bench.output_tokens > context:
        raise WorkloadError(
            f"--lengths {longest} and --output-tokens {bench.output_tokens} are {longest + bench.output_tokens} tokens, "
            f"{card.id!r} takes {context}: prompts of up to {max(0, context - bench.output_tokens)} fit"
        )


async def _rounds(ways: Sequence[Way], bench: SplitBench, length: int, salt: int) -> list[list[RequestRecord]]:
    """One record a way, in the order of `ways`; they are asked in all orders in turn."""
    timed, num_ways = TimedRequest(0.0, length, bench.output_tokens), len(ways)
    count = WARM_UPS + bench.rounds
    workload = Workload(f"prompts of {length}", (timed,) * (num_ways * count))
    raw = [way.writer.write(workload, salt) for way in ways]
    rounds, orders = [], list(permutations(range(num_ways)))
    with no_collection():
        for i in range(count):
            order = orders[i % len(orders)]
            records = {way: await ways[way].ask(timed, raw[way][num_ways * i + way], bench.deadline_s) for way in order}
            rounds.append([records[way] for way in range(num_ways)])
    return rounds


def summary(length: int, records: Mapping[str, Sequence[RequestRecord]]) -> SplitRow:
    """`records` of each way by round, the split's first."""
    (_, split), *others = records.items()
    return SplitRow(length, len(split), _latencies(split), [_other(name, split, those) for name, those in others])


def _other(name: str, split: Sequence[RequestRecord], those: Sequence[RequestRecord]) -> Other:
    differences = [_ttft_ms(one) - _ttft_ms(other) for one, other in zip(split, those, strict=True)]
    low, median, high = np.quantile(differences, [0.25, 0.5, 0.75])
    return Other(name, _latencies(those), float(median), float(low), float(high))


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
    beside = f", colocated at {report.colocated_url}" if report.colocated_url else ""
    console.print(f"{report.model}: split at {report.split_url}{beside}", highlight=False)
    titles = "TTFT p50", "p90", "token 0 to 1 p50", "p90", "later"
    table = Table("prompt", "", *titles, "split −", title="milliseconds, as the client sees them; split minus that way's TTFT: quartiles")
    for row in report.rows:
        table.add_row(str(row.prompt_tokens), "split", *_figures(row.split), "")
        for other in row.others:
            difference = f"{other.difference_p25_ms:+.2f} {other.difference_ms:+.2f} {other.difference_p75_ms:+.2f}"
            table.add_row("", other.name, *_figures(other.latencies), difference)
    console.print(table)


def _figures(way: Latencies) -> list[str]:
    return [f"{ms:.2f}" for ms in (way.ttft_p50, way.ttft_p90, way.second_p50, way.second_p90, way.later_p50)]
