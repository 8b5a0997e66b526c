"""One choice of a client's request, over all attempts to generate it.

    QUEUED ──► RUNNING ──► FINISHED      the last token is out, or the client has all it wanted (a stop string)
      ▲ │         │
      │ │         ├──────► ABORTED       the client is gone
      │ └─────────┤
      │           ├──────► FAILED        a typed error: deadline, attempts used up, invalid for the workers
      └───────────┘ (retry)
    QUEUED before any attempt ──► REFUSED

It ends exactly once, in one of the last four. Tokens wait in `fresh` until the answer takes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
from msgspec import Struct

from ...engine.urgency import due_in_s
from ...messages.errors import DiptychError
from ...messages.ids import Address, RequestId
from ...messages.requests import GenerateRequest, Route, SamplingParams, ServiceClass, TokenDelta, WorkerRef
from ..router.policy import NO_OBJECTIVES, Objectives, Path, Prediction, Queue, RoutingRequest
from .ordering import InOrder


class GenerationState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    REFUSED = "refused"
    FAILED = "failed"


_S = GenerationState
TRANSITIONS: dict[GenerationState, frozenset[GenerationState]] = {
    _S.QUEUED: frozenset({_S.RUNNING, _S.FINISHED, _S.ABORTED, _S.REFUSED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.FINISHED, _S.ABORTED, _S.FAILED}),
    _S.FINISHED: frozenset(),
    _S.ABORTED: frozenset(),
    _S.REFUSED: frozenset(),
    _S.FAILED: frozenset(),
}
ENDS = frozenset(state for state, after in TRANSITIONS.items() if not after)


class Prompt(Struct, frozen=True):
    """What is asked of the workers, the same in every attempt."""

    name: str                                 # unique; request ids of attempts begin with it
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline: float                           # on the dispatcher's clock
    objectives: Objectives = NO_OBJECTIVES
    service_class: ServiceClass = ServiceClass.DEFAULT
    path: Path | None = None                  # that the client asks for


@dataclass(slots=True)
class Attempt:
    request_id: RequestId
    route: Route
    order: InOrder
    progress_at: float                        # last new token, or the start
    has_tokens: bool = False                  # of this attempt
    handed_over: bool = False                 # the decode worker has the KV: but for its token, the prefill worker no longer matters

    @property
    def workers(self) -> tuple[WorkerRef, ...]:
        """Whose death ends this attempt."""
        prefill = self.route.prefill
        return (self.route.decode,) if prefill is None or (self.handed_over and self.has_tokens) else (prefill, self.route.decode)


@dataclass(eq=False, slots=True)
class Generation:
    prompt: Prompt
    wake: Callable[[], None]                  # called when there is something to take, or an end
    arrived_at: float                         # of the HTTP request
    routed: Callable[[], None] = lambda: None                 # called when it has been sent to a worker for the first time
    state: GenerationState = GenerationState.QUEUED
    outputs: list[int] = field(default_factory=list)          # in order, over all attempts
    fresh: list[TokenDelta] = field(default_factory=list)
    num_fresh_tokens: int = 0
    attempt: Attempt | None = None
    num_attempts: int = 0
    queued_at: float = 0.0
    waits_for: Queue | None = None            # the policy's last word, if that was to wait,
    useful_until: float = math.inf            # which it is until then
    avoid: frozenset[WorkerRef] = frozenset()
    first_token_at: float | None = None
    last_token_at: float | None = None
    error: DiptychError | None = None         # of REFUSED and FAILED
    last_failure: str = ""
    path: Path | None = None                  # of the last attempt
    route: Route | None = None                # of the last attempt, as are the two below
    routed_at: float = 0.0
    prediction: Prediction | None = None      # None: the policy predicts nothing

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    @property
    def predicted_ttft_s(self) -> float | None:
        """As of the last attempt, from the HTTP request on, as clients count it."""
        return None if self.prediction is None else self.routed_at - self.arrived_at + self.prediction.ttft_s

    def move(self, to: GenerationState) -> None:
        assert to in TRANSITIONS[self.state], f"{self.prompt.name}: {self.state} → {to}"
        self.state = to

    def take(self) -> list[TokenDelta]:
        """What came since the last call."""
        taken, self.fresh, self.num_fresh_tokens = self.fresh, [], 0
        return taken

    def deliver(self, deltas: list[TokenDelta], now: float) -> None:
        self.first_token_at = now if self.first_token_at is None else self.first_token_at
        self.last_token_at = now
        for delta in deltas:
            self.outputs += delta.token_ids
            self.num_fresh_tokens += len(delta.token_ids)
        self.fresh += deltas

    @property
    def due_at(self) -> float:
        """By its class and as of when it began to wait: what queues go by."""
        now = self.queued_at
        return now + due_in_s(self.prompt.service_class, self.ttft_slack_s(now), now - self.arrived_at)

    def ttft_slack_s(self, now: float) -> float:
        """Until the first token is due; negative once it is late, infinite without an objective."""
        ttft_s = self.prompt.objectives.ttft_s
        return math.inf if ttft_s is None else self.arrived_at + ttft_s - now

    @property
    def tpot_s(self) -> float | None:
        """None: fewer than two tokens."""
        if self.first_token_at is None or self.last_token_at is None or len(self.outputs) < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (len(self.outputs) - 1)

    @property
    def kept_objectives(self) -> bool:
        """It finished, and in time; what was promised nothing is always in time."""
        if self.state is not GenerationState.FINISHED or self.first_token_at is None:
            return False
        promised, ttft_s, tpot_s = self.prompt.objectives, self.first_token_at - self.arrived_at, self.tpot_s
        kept_ttft = promised.ttft_s is None or ttft_s <= promised.ttft_s
        return kept_ttft and (promised.tpot_s is None or tpot_s is None or tpot_s <= promised.tpot_s)

    def routing_request(self) -> RoutingRequest:
        """Batch work is late rather than refused, and so is a retry: the client has waited, or reads already."""
        return RoutingRequest(
            token_ids=self._token_ids(),
            max_new_tokens=self.prompt.sampling.max_tokens - len(self.outputs),
            avoid=self.avoid,
            objectives=self.prompt.objectives,
            arrived_at=self.arrived_at,
            may_be_late=self.num_attempts > 0 or self.prompt.service_class is ServiceClass.BATCH,
            path=self.prompt.path,
            service_class=self.prompt.service_class,
        )

    def start_attempt(self, route: Route, gateway: Address, now: float, *, is_alone: bool = False) -> GenerateRequest:
        """The next attempt continues after what has been delivered, with the same seed. `is_alone`: a prefill worker is to decode."""
        self.num_attempts += 1
        self.route = route
        self.path = Path.SPLIT if route.prefill is not None else Path.ALONE if is_alone else Path.LOCAL
        request_id = RequestId(f"{self.prompt.name}-{self.num_attempts}")
        self.attempt = Attempt(request_id, route, InOrder(len(self.outputs)), progress_at=now)
        self.move(GenerationState.RUNNING)
        objectives = self.prompt.objectives
        return GenerateRequest(
            request_id=request_id,
            gateway=gateway,
            token_ids=self._token_ids(),
            sampling=self._sampling(),
            route=route,
            timeout_s=self.prompt.deadline - now,
            num_prior_outputs=len(self.outputs),
            ttft_slo_s=None if objectives.ttft_s is None else self.ttft_slack_s(now),
            tpot_slo_s=objectives.tpot_s,
            service_class=self.prompt.service_class,
            waited_s=max(0.0, now - self.arrived_at),
        )

    def _token_ids(self) -> tuple[int, ...]:
        return (*self.prompt.token_ids, *self.outputs) if self.outputs else self.prompt.token_ids

    def _sampling(self) -> SamplingParams:
        """Prompt logprobs came with the first token: no second time."""
        return msgspec.structs.replace(self.prompt.sampling, prompt_logprobs=None) if self.outputs else self.prompt.sampling
