"""One `diptych bench`: ask the endpoint what it serves, then put load on it once, at several rates, or in a search.

    measure ─> GET /v1/models ─> model, vocabulary, context ─> prompts ─> replay, once a rate ─> Reports ─> BenchResult
"""

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from ..gateway.tiers import TPOT_HEADER, TTFT_HEADER
from .client import Address, HttpClient
from .endpoint import find_model
from .errors import WorkloadError
from .goodput import GoodputResult, GoodputSearch, SearchPlan
from .load import replay
from .record import RequestRecord
from .report import Objective, Report, summarize
from .workload import Workload
from .writer import PromptMode, PromptSource, RequestWriter


@dataclass(frozen=True, slots=True)
class Load:
    """Requests per second; None: as the workload has it."""

    rates: tuple[float | None, ...]     # one after another
    search: SearchPlan | None = None    # find the goodput instead

    def __post_init__(self) -> None:
        if self.search is not None and len(self.rates) > 1:
            raise WorkloadError("a goodput search chooses its rates itself: --goodput takes no --rates")


@dataclass(frozen=True, slots=True)
class BenchPlan:
    address: Address
    workload: Workload
    load: Load
    objective: Objective
    prompts: PromptSource
    model: str | None = None            # None: the first that /v1/models lists
    deadline_s: float = 120.0           # of each request, from its sending
    gpus: int = 1                       # that serve: goodput is per GPU
    seed: int = 0                       # of the workload
    tells_objective: bool = False       # to the server, with each request

    def __post_init__(self) -> None:
        if self.tells_objective and self.objective == Objective():
            raise WorkloadError("--tell-objective needs one: --ttft-ms, --tpot-ms or both")
        if self.load.search is not None and self.objective == Objective():
            raise WorkloadError("a goodput search needs an objective: --ttft-ms, --tpot-ms or both")

    @property
    def headers(self) -> tuple[str, ...]:
        """Of each request, whole lines."""
        if not self.tells_objective:
            return ()
        objectives = ((TTFT_HEADER, self.objective.ttft_ms), (TPOT_HEADER, self.objective.tpot_ms))
        return tuple(f"{name}: {value:g}" for name, value in objectives if value is not None)


class WorkloadSummary(msgspec.Struct, frozen=True):
    """Of what was asked for: of a search's workload the part that its longest probe took."""

    source: str
    requests: int
    rate: float | None                  # as it is, before a rate was asked for
    prompt_tokens_mean: float
    output_tokens_mean: float
    longest_tokens: int

    @classmethod
    def of(cls, workload: Workload) -> "WorkloadSummary":
        count = len(workload)
        prompt_tokens = sum(request.prompt_tokens for request in workload.requests)
        output_tokens = sum(request.output_tokens for request in workload.requests)
        return cls(workload.source, count, workload.rate, prompt_tokens / count, output_tokens / count, workload.longest.total_tokens)


class GoodputReport(msgspec.Struct, frozen=True):
    target: float
    per_gpu: float                      # DistServe's goodput, requests/s/GPU
    search: GoodputResult


class BenchResult(msgspec.Struct, frozen=True):
    url: str
    model: str
    mode: PromptMode
    seed: int                           # of the workload
    prompt_seed: int                    # of what its prompts are made of
    gpus: int
    objective: Objective
    workload: WorkloadSummary
    runs: list[Report]                  # in the order they were made
    goodput: GoodputReport | None = None

    @property
    def interrupted(self) -> bool:
        return any(run.interrupted for run in self.runs)


class Watcher(Protocol):
    """Sees a run go on; the progress bar."""

    def begin(self, run: str, num_requests: int) -> None: ...
    def ended(self, record: RequestRecord) -> None: ...


async def measure(plan: BenchPlan, client: HttpClient, watcher: Watcher) -> BenchResult:
    """Raises EndpointError if nobody answers, WorkloadError or PromptError for what this endpoint cannot be asked; what goes wrong
    after that is in the reports."""
    card = await find_model(client, plan.model)
    session = BenchSession(plan, client, watcher, RequestWriter(plan.address, card, plan.prompts, plan.headers))
    goodput = None
    if plan.load.search is None:
        await session.sweep()
    else:
        goodput = await session.search(plan.load.search)
    return BenchResult(
        url=str(plan.address),
        model=card.id,
        mode=plan.prompts.mode,
        seed=plan.seed,
        prompt_seed=plan.prompts.seed,
        gpus=plan.gpus,
        objective=plan.objective,
        workload=WorkloadSummary.of(plan.workload.first(max(report.planned for report in session.reports))),
        runs=session.reports,
        goodput=goodput,
    )


@dataclass
class BenchSession:
    plan: BenchPlan
    client: HttpClient
    watcher: Watcher
    writer: RequestWriter
    reports: list[Report] = field(default_factory=list)

    async def sweep(self) -> None:
        for rate in self.plan.load.rates:
            if (await self._run(self.plan.workload, rate)).interrupted:
                return

    async def search(self, plan: SearchPlan) -> GoodputReport:
        self.writer.check_context(self.plan.workload)               # not after the hour that it takes to come to a longer probe
        search = GoodputSearch(plan)
        while (probe := search.next_probe()) is not None:
            report = await self._run(self.plan.workload.first(probe.num_requests), probe.rate)
            if report.interrupted:
                break
            search.observe(report.attainment)
        result = search.result()
        return GoodputReport(plan.target, result.rate / self.plan.gpus, result)

    async def _run(self, workload: Workload, rate: float | None) -> Report:
        scaled = workload if rate is None else workload.at_rate(rate)
        raw_requests = self.writer.write(scaled, salt=len(self.reports))
        rate_asked = scaled.rate if rate is None else rate
        self.watcher.begin(f"{rate_asked:.3g} requests/s" if rate_asked else "all at once", len(scaled))
        run = await replay(self.client, scaled, raw_requests, self.plan.deadline_s, self.watcher.ended)
        self.reports.append(summarize(run, rate_asked, self.plan.objective, self.plan.gpus))
        return self.reports[-1]
