"""What this gateway believes of the workers: who lives, and how loaded they are.

    Membership ── who exists ─────────────┐
    LoadReport ── last known load ────────┤
    sent() ────── what no report shows ───┼──► view(now) ──► ClusterView
    moved() ───── how fast links are ─────┤
    ended() ───── how long answers are ───┘      (of each class; of all others, until one of it has ended)

A report is older than what was sent after it. So each request counts, on top of the report, on the worker that
    receives it:   until a report says that the worker has read it, or one sent later (messages of one gateway stay in order), or
                   arrives SETTLE_S after it was sent;
    decodes it:    until the decode worker is known to have it (`arrived`), for it hears of it only when its prefill begins;
and nowhere once it ended. While its KV moves a request may count twice on its decode worker; it never counts nowhere.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import Struct

from ...messages.ids import RequestId
from ...messages.membership import Member, Membership, Role
from ...messages.requests import NO_FILLING, LoadReport, Route, ServiceClass, WorkerRef
from ...messages.steps import StepFeatures, attended_pairs
from .policy import UNMEASURED, ClusterView, Path, WorkerLoad

SETTLE_S = 0.05
"""After which a request that no report has named was lost, or is one that its worker refused."""

NO_WORK = StepFeatures()
MEMORY = 50
"""Of means over ended requests and measured transfers: about the last so many count."""

ROUND_TRIPS = 15
"""The last so many tell how long messages take."""


@dataclass
class _Mean:
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, MEMORY)


class _Sent(Struct, frozen=True):
    at: float
    num_tokens: int
    num_blocks: int
    num_pairs: int
    is_passing: bool
    fills_in: bool                            # and is decoded there


def _sent(now: float, num_tokens: int, block_size: int, service_class: ServiceClass, is_passing: bool = False) -> _Sent:
    fills_in = service_class is ServiceClass.BATCH and not is_passing
    return _Sent(now, num_tokens, -(-num_tokens // block_size), attended_pairs(0, num_tokens), is_passing, fills_in)


class _Outstanding:
    """Requests in the order they were sent, and their sums: a decision must not cost more when there are many."""

    def __init__(self) -> None:
        self._each: dict[RequestId, _Sent] = {}
        self.num_tokens = self.num_blocks = self.num_pairs = self.num_passing = self.num_filling = 0

    def __len__(self) -> int:
        return len(self._each)

    def add(self, request_id: RequestId, sent: _Sent) -> None:
        self.remove(request_id)
        self._each[request_id] = sent
        self._count(sent, 1)

    def remove(self, request_id: RequestId) -> None:
        if (sent := self._each.pop(request_id, None)) is not None:
            self._count(sent, -1)

    def read(self, request_id: RequestId) -> float | None:
        """The worker had read it, and so what was sent before it. → when it was sent; None: not by this gateway, or it was known."""
        sent = self._each.get(request_id)
        while request_id in self._each:
            self.remove(next(iter(self._each)))
        return None if sent is None else sent.at

    @property
    def first_at(self) -> float | None:
        return next(iter(self._each.values())).at if self._each else None

    def report(self, now: float) -> None:
        """A report has come: it shows what was sent SETTLE_S ago, whatever it says."""
        while self._each:
            request_id, sent = next(iter(self._each.items()))
            if now - sent.at < SETTLE_S:
                return
            self.remove(request_id)

    def _count(self, sent: _Sent, sign: int) -> None:
        self.num_tokens += sign * sent.num_tokens
        self.num_blocks += sign * sent.num_blocks
        self.num_pairs += sign * sent.num_pairs
        self.num_passing += sign * sent.is_passing
        self.num_filling += sign * sent.fills_in


@dataclass
class _Worker:
    member: Member
    heard_at: float
    report: LoadReport | None = None
    reported_at: float | None = None
    sent: _Outstanding = field(default_factory=_Outstanding)            # until the next settled report
    expected: _Outstanding = field(default_factory=_Outstanding)        # to decode here, being prefilled elsewhere
    load: WorkerLoad | None = None            # None: to be computed

    round_trip_s: float = 0.0                 # of a message and its answer; 0: not known
    _round_trips: deque[float] = field(default_factory=lambda: deque(maxlen=ROUND_TRIPS))

    def read(self, last_read: Iterable[tuple[RequestId, float]], now: float) -> None:
        for request_id, ago_s in last_read:
            if (sent_at := self.sent.read(request_id)) is not None:
                self._took(max(0.0, now - sent_at - ago_s))

    def _took(self, round_trip_s: float) -> None:
        """The middle one of the last: most of a way may be waiting for a loop, as what comes will; a single long one is no news."""
        self._round_trips.append(round_trip_s)
        self.round_trip_s = sorted(self._round_trips)[(len(self._round_trips) - 1) // 2]

    def changed(self) -> None:
        self.load = None

    def compute(self) -> WorkerLoad:
        report, sent, expected = self.report, self.sent, self.expected
        work = report.work if report and report.work else NO_WORK
        num_reported = report.num_waiting + report.num_running + report.num_reserved if report else 0
        free = report.num_free_blocks if report else self.member.num_blocks
        filling = report.filling if report else NO_FILLING
        self.load = WorkerLoad(
            ref=self.member.ref,
            num_requests=num_reported + len(sent) + len(expected),
            num_waiting_tokens=(report.num_waiting_tokens if report else 0) + sent.num_tokens,
            num_blocks=self.member.num_blocks,
            num_free_blocks=free - sent.num_blocks - expected.num_blocks,
            block_size=self.member.block_size,
            prefill_pairs=work.prefill_pairs + sent.num_pairs,
            num_decoding=work.num_decoding,
            decode_context=work.decode_context,
            queue=report.queue if report else (),
            max_step_tokens=report.max_step_tokens if report else 0,
            num_sent_tokens=sent.num_tokens,
            num_expected=len(expected) - expected.num_filling,
            num_passing=(report.num_passing if report else 0) + sent.num_passing,
            prefill_share=report.prefill_share if report else 0.0,
            step_model=report.step_model if report and report.step_model else UNMEASURED,
            busy_s=report.busy_s if report else 0.0,
            plans_in_s=report.plans_in_s if report else 0.0,
            lead_s=report.lead_s if report else 0.0,
            reported_at=self.reported_at,
            sent_at=sent.first_at,
            message_s=self.round_trip_s / 2,
            tp=self.member.tp,
            num_filling=filling.num_requests + sent.num_filling + expected.num_filling,
            filling=filling,
            max_sequences=report.max_sequences if report else 0,
        )
        return self.load


class LoadView:
    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._workers: dict[WorkerRef, _Worker] = {}
        self._candidates: dict[Role, list[_Worker]] = {role: [] for role in Role}      # not draining, in Membership's order
        self._version = -1
        self._transfers: dict[tuple[WorkerRef, WorkerRef], _Mean] = {}        # seconds per token moved
        self._links: dict[tuple[WorkerRef, WorkerRef], float] = {}            # of those, the values
        self._num_gateways = 1
        self._lengths: dict[ServiceClass, _Mean] = {}
        self._length_of_any = _Mean()
        self._mean_outputs: dict[ServiceClass, float] = {}

    def set_membership(self, membership: Membership, now: float) -> bool:
        """False if it is no newer than the last. A worker that is new has until `silent_after_s` to be heard of."""
        if membership.version <= self._version:
            return False
        self._version = membership.version
        self._num_gateways = max(1, len(membership.gateways))
        known = self._workers
        self._workers = {}
        for member in membership.workers:
            worker = known.get(member.ref) or _Worker(member, heard_at=now)
            worker.member = member
            worker.changed()
            self._workers[member.ref] = worker
        for role, candidates in self._candidates.items():
            candidates[:] = [each for each in self._workers.values() if each.member.role is role and not each.member.draining]
        self._transfers = {link: mean for link, mean in self._transfers.items() if all(end in self._workers for end in link)}
        self._links = {link: mean.value for link, mean in self._transfers.items()}
        return True

    def heard(self, ref: WorkerRef, report: LoadReport | None, now: float) -> None:
        """Any message shows life; a report shows load too. A worker that Membership does not name stays unknown."""
        worker = self._workers.get(ref)
        if worker is None:
            return
        worker.heard_at = now
        if report is not None:
            worker.report, worker.reported_at = report, now
            worker.changed()
            worker.read(report.last_read, now)
            worker.sent.report(now)

    def sent(
        self, request_id: RequestId, route: Route, num_tokens: int, now: float, service_class: ServiceClass = ServiceClass.DEFAULT
    ) -> None:
        """A request with `num_tokens` to prefill has left for `route`."""
        if first := self._workers.get(route.first):
            first.sent.add(request_id, _sent(now, num_tokens, first.member.block_size, service_class, is_passing=route.prefill is not None))
            first.changed()
        decode = self._workers.get(route.decode)
        if route.prefill is not None and decode is not None:
            decode.expected.add(request_id, _sent(now, num_tokens, decode.member.block_size, service_class))
            decode.changed()

    def arrived(self, request_id: RequestId, route: Route) -> None:
        """The decode worker has it: its reports show it from now on."""
        if worker := self._workers.get(route.decode):
            worker.expected.remove(request_id)
            worker.changed()

    def ended(
        self, request_id: RequestId, route: Route, num_outputs: int | None = None, service_class: ServiceClass = ServiceClass.DEFAULT
    ) -> None:
        """`num_outputs`: of an answer that came to its own end."""
        self.arrived(request_id, route)
        if worker := self._workers.get(route.first):
            worker.sent.remove(request_id)
            worker.changed()
        if num_outputs is not None:
            self._lengths.setdefault(service_class, _Mean()).add(num_outputs)
            self._length_of_any.add(num_outputs)
            self._mean_outputs = {each: self._lengths.get(each, self._length_of_any).value for each in ServiceClass}

    def moved(self, route: Route, num_tokens: int, transfer_s: float) -> None:
        """The KV of a prompt took its link so long."""
        if route.prefill is not None and num_tokens > 0:
            link = (route.prefill, route.decode)
            mean = self._transfers.setdefault(link, _Mean())
            mean.add(transfer_s / num_tokens)
            self._links[link] = mean.value

    def lives(self, ref: WorkerRef, now: float) -> bool:
        worker = self._workers.get(ref)
        return worker is not None and now - worker.heard_at <= self._silent_after_s

    def has_prompts_to_compute(self, ref: WorkerRef) -> bool:
        """By its last report: a request there may well be waiting its turn."""
        worker = self._workers.get(ref)
        return worker is not None and worker.report is not None and worker.report.num_waiting_tokens > 0

    def view(self, now: float, path: Path | None = None) -> ClusterView:
        """The workers that live and are not draining, in Membership's order. Those of the prefill pool stand in where no decode worker is
        among them, or where a request's `path` is ALONE: they serve whole requests by themselves."""
        prefill, decode = self._loads(Role.PREFILL, now), self._loads(Role.DECODE, now)
        if not decode or path is Path.ALONE:
            prefill, decode = (), prefill
        return ClusterView(
            prefill=prefill,
            decode=decode,
            links=self._links,
            num_gateways=self._num_gateways,
            mean_outputs=self._mean_outputs,
        )

    def _loads(self, role: Role, now: float) -> tuple[WorkerLoad, ...]:
        silent_after_s = self._silent_after_s
        return tuple([worker.load or worker.compute() for worker in self._candidates[role] if now - worker.heard_at <= silent_after_s])

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(worker.member for worker in self._workers.values())

    @property
    def reports(self) -> tuple[LoadReport, ...]:
        """The last one of each worker that has sent any."""
        return tuple(worker.report for worker in self._workers.values() if worker.report is not None)
