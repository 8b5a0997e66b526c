"""What was decided for the last requests, and what came of it: kept for `GET /explain/ID`, off unless the spec asks for it.

    begin(response id) ──► decided … retried … decided ──► ended        per choice; of a request's ids, both find it
    capacity requests, the oldest goes first                            no prompt and no answer is kept, only numbers

An attempt keeps its last decision and how often it waited before: a choice takes no more room however long it is queued. Of a request with
many choices the first MAX_CHOICES are kept: a client says how many there are, and the log's size is not for clients to choose.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from ...messages.requests import Route
from ..router.policy import Decision, Explanation, Prediction, Queue
from .generation import Generation, GenerationState

MAX_CHOICES = 16


class DecisionKind(StrEnum):
    ROUTE = "route"
    QUEUE = "queue"
    REFUSE = "refuse"


class Candidate(Struct, frozen=True):
    """One way that was looked at. Seconds count from the decision; None: no end was foreseen."""

    prefill: str | None                       # worker ids; None: the local path
    decode: str
    ttft_s: float | None
    kv_arrival_s: float | None
    tpot_s: float | None
    memory: float | None                      # of the decode worker's pool, 0 to 1 and beyond
    cost: float | None
    keeps_ttft: bool
    keeps_tpot: bool                          # and its KV fits
    chosen: bool


class AttemptExplanation(Struct, frozen=True):
    decided_after_s: float                    # since the HTTP request came
    kind: DecisionKind
    prefill: str | None                       # of a route, worker ids; None: the local path
    decode: str | None
    reason: str                               # why it waits or was refused
    num_waits: int                            # decisions before this one that found no route
    candidates: tuple[Candidate, ...]         # best first; empty: the policy predicts nothing
    num_outputs: float | None                 # expected
    ttft_slack_s: float | None                # None: no objective
    failure: str = ""                         # why the attempt was given up for the next


class ChoiceExplanation(Struct, frozen=True):
    index: int
    service_class: str
    num_prompt_tokens: int
    promised_ttft_s: float | None
    promised_tpot_s: float | None
    attempts: tuple[AttemptExplanation, ...]
    state: GenerationState
    path: str | None                          # split, local or alone, of the last attempt
    ttft_s: float | None                      # as measured, since the HTTP request came
    tpot_s: float | None
    num_outputs: int
    kept_objectives: bool | None              # None: it goes on
    error: str


class RequestExplanation(Struct, frozen=True):
    response_id: str                          # cmpl-… or chatcmpl-…
    request_id: str                           # the x-request-id header
    choices: tuple[ChoiceExplanation, ...]    # those that have been decided on


@dataclass
class _Request:
    request_id: str
    live: dict[int, Generation] = field(default_factory=dict)
    attempts: dict[int, list[AttemptExplanation]] = field(default_factory=dict)
    ended: dict[int, ChoiceExplanation] = field(default_factory=dict)


class DecisionLog:
    def __init__(self, capacity: int = 0) -> None:
        """0: nothing is kept."""
        self._capacity = capacity
        self._requests: OrderedDict[str, _Request] = OrderedDict()             # by response id, the oldest first
        self._response_ids: dict[str, str] = {}                                # by x-request-id, the last that had it

    @property
    def on(self) -> bool:
        return self._capacity > 0

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, response_id: str, request_id: str) -> None:
        if not self.on:
            return
        if len(self._requests) == self._capacity:
            oldest_id, oldest = self._requests.popitem(last=False)
            if self._response_ids[oldest.request_id] == oldest_id:
                del self._response_ids[oldest.request_id]
        self._requests[response_id] = _Request(request_id)
        self._response_ids[request_id] = response_id

    def decided(self, generation: Generation, explanation: Explanation, now: float) -> None:
        request, index = self._find(generation)
        if request is None:
            return
        request.live[index] = generation
        attempts = request.attempts.setdefault(index, [])
        waited = attempts.pop().num_waits + 1 if attempts and attempts[-1].kind is not DecisionKind.ROUTE else 0
        attempts.append(_attempt(explanation, now - generation.arrived_at, waited))

    def retried(self, generation: Generation, failure: str) -> None:
        request, index = self._find(generation)
        if request is not None and (attempts := request.attempts.get(index)):
            attempts[-1] = replace(attempts[-1], failure=failure)

    def ended(self, generation: Generation) -> None:
        request, index = self._find(generation)
        if request is not None:
            request.live.pop(index, None)
            request.ended[index] = _choice(index, generation, request.attempts.pop(index, []))

    def find(self, some_id: str) -> RequestExplanation | None:
        """By response id or x-request-id."""
        response_id = some_id if some_id in self._requests else self._response_ids.get(some_id, "")
        request = self._requests.get(response_id)
        if request is None:
            return None
        live = {index: _choice(index, each, request.attempts[index]) for index, each in request.live.items()}
        choices = live | request.ended
        return RequestExplanation(response_id, request.request_id, tuple(choices[index] for index in sorted(choices)))

    def _find(self, generation: Generation) -> tuple[_Request | None, int]:
        """None: not kept. The name of a choice is RESPONSE_ID-INDEX."""
        if not self._requests:
            return None, 0
        response_id, _, text = generation.prompt.name.rpartition("-")
        index = int(text)
        return self._requests.get(response_id) if index < MAX_CHOICES else None, index


def _attempt(explanation: Explanation, decided_after_s: float, num_waits: int) -> AttemptExplanation:
    decision = explanation.decision
    route = decision if isinstance(decision, Route) else None
    chosen = explanation.chosen
    return AttemptExplanation(
        decided_after_s=decided_after_s,
        kind=_kind(decision),
        prefill=_prefill_of(route) if route else None,
        decode=route.decode.worker_id if route else None,
        reason="" if isinstance(decision, Route) else decision.reason,
        num_waits=num_waits,
        candidates=tuple(_candidate(each, chosen=each is chosen) for each in explanation.predictions),
        num_outputs=explanation.num_outputs,
        ttft_slack_s=_finite(explanation.ttft_slack_s),
    )


def _kind(decision: Decision) -> DecisionKind:
    if isinstance(decision, Route):
        return DecisionKind.ROUTE
    return DecisionKind.QUEUE if isinstance(decision, Queue) else DecisionKind.REFUSE


def _prefill_of(route: Route) -> str | None:
    return None if route.prefill is None else route.prefill.worker_id


def _candidate(prediction: Prediction, *, chosen: bool) -> Candidate:
    return Candidate(
        prefill=_prefill_of(prediction.route),
        decode=prediction.route.decode.worker_id,
        ttft_s=_finite(prediction.ttft_s),
        kv_arrival_s=_finite(prediction.kv_arrival_s),
        tpot_s=_finite(prediction.tpot_s),
        memory=_finite(prediction.memory),
        cost=_finite(prediction.cost),
        keeps_ttft=prediction.keeps_ttft,
        keeps_tpot=prediction.keeps_tpot,
        chosen=chosen,
    )


def _choice(index: int, generation: Generation, attempts: list[AttemptExplanation]) -> ChoiceExplanation:
    prompt = generation.prompt
    return ChoiceExplanation(
        index=index,
        service_class=prompt.service_class,
        num_prompt_tokens=len(prompt.token_ids),
        promised_ttft_s=prompt.objectives.ttft_s,
        promised_tpot_s=prompt.objectives.tpot_s,
        attempts=tuple(attempts),
        state=generation.state,
        path=generation.path,
        ttft_s=None if generation.first_token_at is None else generation.first_token_at - generation.arrived_at,
        tpot_s=generation.tpot_s,
        num_outputs=len(generation.outputs),
        kept_objectives=generation.kept_objectives if generation.ended else None,
        error="" if generation.error is None else str(generation.error),
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
