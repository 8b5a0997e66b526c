"""Where does a request go? A pure question: (request, view of the cluster, clock) → Route, Queue or Refuse.

    policy.choose(request, view, now) ──► Route    send it there
                                          Queue    nobody can take it now; ask again as workers tell their loads
                                          Refuse   the cluster is full; HTTP 429
    policy.decide(request, view, now) ──► the same, with the predictions it was taken on

A policy keeps at most what it chose before (a turn, a seed, an index of prefixes); it does no I/O and reads no clock, so the
simulator runs it unchanged. A Route that it returns is taken.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from msgspec import Struct, structs

from ...engine.predictor import PRIOR
from ...messages.requests import NO_FILLING, FillingLoad, Route, ServiceClass, WorkerRef
from ...messages.steps import StepModel

LEAST_OBJECTIVE_MS = 1e-3                     # policies divide by objectives

UNMEASURED = structs.replace(PRIOR, error=0.0)
"""Of a worker that has told nothing of its steps: its first requests are not refused for that."""


class Objectives(Struct, frozen=True):
    """What a request is promised; None: nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None               # mean over the answer


NO_OBJECTIVES = Objectives()


class Path(StrEnum):
    SPLIT = "split"                           # a prefill worker computes the prompt
    LOCAL = "local"                           # whoever decodes does
    ALONE = "alone"                           # whoever decodes does, and that is a prefill worker: the view of `LoadView` is made for it


class RoutingRequest(Struct, frozen=True):
    token_ids: tuple[int, ...]                # prompt, then outputs of earlier attempts
    max_new_tokens: int                       # still to come, at most
    avoid: frozenset[WorkerRef] = frozenset()  # an earlier attempt failed there: chosen only if there is nobody else
    objectives: Objectives = NO_OBJECTIVES
    arrived_at: float | None = None           # policy's clock: what the TTFT objective counts from; None: now
    may_be_late: bool = False                 # it is not refused for an objective that cannot be met (any more)
    path: Path | None = None                  # asked for; None: the policy's to choose
    service_class: ServiceClass = ServiceClass.DEFAULT


class WorkerLoad(Struct, frozen=True):
    """A live worker that takes new work: its last report, corrected by what this gateway sent since."""

    ref: WorkerRef
    num_requests: int                         # waiting, running and arriving
    num_waiting_tokens: int                   # prompt tokens still to compute
    num_blocks: int
    num_free_blocks: int
    block_size: int                           # tokens
    prefill_pairs: int = 0                    # of num_waiting_tokens, with what they attend to
    num_decoding: int = 0                     # of num_requests, as of the report; without batch work
    decode_context: int = 0                   # tokens that those attend to
    queue: tuple[tuple[float, int], ...] = () # (seconds from the report until it is due, prompt tokens) of what waits, soonest first
    max_step_tokens: int = 0                  # 0: not told
    num_sent_tokens: int = 0                  # of num_waiting_tokens, what this gateway sent and no report shows
    num_expected: int = 0                     # of num_requests, what this gateway sent and others prefill; without batch work
    num_passing: int = 0                      # of num_requests, what is decoded elsewhere
    prefill_share: float = 0.0                # of this worker's time, lately
    step_model: StepModel = UNMEASURED
    busy_s: float = 0.0                       # as of the report, until the steps under way have ended
    plans_in_s: float = 0.0                   # as of the report, until the next step is planned
    lead_s: float = 0.0                       # as of the report: the tightest decode's, after the steps under way; behind, if negative
    reported_at: float | None = None          # policy's clock: when the report came; None: never
    sent_at: float | None = None              # policy's clock: the first of num_sent_tokens; None: there are none
    message_s: float = 0.0                    # one way, to the worker or from it
    tp: int = 1                               # GPUs that it is
    num_filling: int = 0                      # of num_requests - num_passing: batch work, which gives way to all others
    filling: FillingLoad = NO_FILLING         # of that, as of the report
    max_sequences: int = 0                    # in a step; 0: not told

    @property
    def used_share(self) -> float:
        """Of the KV pool, 0 to 1 and beyond: more may have been sent than fits."""
        return 1 - self.num_free_blocks / self.num_blocks


class ClusterView(Struct, frozen=True):
    prefill: tuple[WorkerLoad, ...]
    decode: tuple[WorkerLoad, ...]
    links: Mapping[tuple[WorkerRef, WorkerRef], float] = {}    # (prefill, decode) → seconds per prompt token moved, as measured
    num_gateways: int = 1                     # that send to these workers, this one included
    mean_outputs: Mapping[ServiceClass, float] = {}            # tokens of an answer, of those that ended lately; empty: none has


def prefill_pool(request: RoutingRequest, view: ClusterView, local_only: bool) -> tuple[WorkerLoad, ...]:
    """Who may compute the prompt, beside the decode worker itself. What the request asks for goes before `local_only`."""
    is_local = local_only if request.path is None else request.path is not Path.SPLIT
    return () if is_local else view.prefill


def what_is_missing(request: RoutingRequest, view: ClusterView) -> str | None:
    """Without which there is no route at all."""
    if not view.decode:
        return f"no {'prefill ' if request.path is Path.ALONE else ''}worker is alive and takes requests"
    if not view.prefill and request.path is Path.SPLIT:
        return "no prefill worker is alive beside a decode worker, and the request asks for one"
    return None


class Queue(Struct, frozen=True):
    reason: str
    useful_s: float = math.inf                # from now; then it is to be refused without being asked for again
    retry_after_s: float = 1.0                # if it comes to that


class Refuse(Struct, frozen=True):
    reason: str
    retry_after_s: float


Decision = Route | Queue | Refuse


class Prediction(Struct, frozen=True):
    """What one way would give. Seconds count from the decision."""

    route: Route
    ttft_s: float
    kv_arrival_s: float                       # the decode worker can go on
    tpot_s: float
    memory: float                             # of the decode worker's pool, held once the request has its expected end
    cost: float
    keeps_ttft: bool
    keeps_tpot: bool                          # and its KV fits
    keeps_but_for_priority: bool = False      # but not what is to be left free for priority requests
    fits: bool = True                         # its KV, beside what decodes there have to grow into
    has_place: bool = True                    # in steps, when its KV has come

    @property
    def keeps_both(self) -> bool:
        return self.keeps_ttft and self.keeps_tpot


class Explanation(Struct, frozen=True):
    """A decision and all that it was taken on: a value to log."""

    decision: Decision
    predictions: tuple[Prediction, ...] = ()  # best first; none: the policy makes none
    num_outputs: float | None = None          # expected
    ttft_slack_s: float | None = None

    @property
    def chosen(self) -> Prediction | None:
        """Of the route taken; None: no route, or nothing was predicted."""
        return next((each for each in self.predictions if each.route == self.decision), None)


class Policy(Protocol):
    def choose(self, request: RoutingRequest, view: ClusterView, now: float) -> Decision: ...

    def decide(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        """`choose`, and what it was taken on."""
        ...
