"""A gateway on virtual time: the production load view and policy, and the dispatcher's way with their decisions.

    arrived ──► policy.choose ──Route──► sent to route.first
                   │ Queue ──► again at each look, and when it is useful no longer
                   │ Refuse ──► refused
"""

import math
from collections.abc import Callable

from ..cluster.router.load_view import LoadView
from ..cluster.router.policy import Objectives, Policy, Queue, Refuse, RoutingRequest
from ..messages.ids import Address, RequestId
from ..messages.membership import Membership
from ..messages.requests import GenerateRequest, Route, SamplingParams
from .events import Timeline
from .outcome import Outcome

NEVER_S = 1e9
MAX_NEW_TOKENS = 4096
"""What clients say at most: the router does not know how long an answer will be."""


class SimGateway:
    def __init__(self, name: str, timeline: Timeline, policy: Policy, objectives: Objectives, membership: Membership) -> None:
        self.address = Address(f"sim://{name}")
        self.view = LoadView(silent_after_s=NEVER_S)
        self.view.set_membership(membership, timeline.now)
        self.send: Callable[[GenerateRequest], None] = lambda request: None
        self.outcomes: dict[RequestId, Outcome] = {}
        self.num_refused = 0
        self._timeline = timeline
        self._policy = policy
        self._objectives = objectives
        self._queued: dict[RequestId, tuple[int, ...]] = {}

    def arrived(self, request_id: RequestId, token_ids: tuple[int, ...], num_outputs: int) -> None:
        self.outcomes[request_id] = Outcome(self._timeline.now, num_outputs)
        self._route(request_id, token_ids)

    def look(self) -> None:
        """As news of the workers come."""
        for request_id, token_ids in list(self._queued.items()):
            self._route(request_id, token_ids)

    def _look_again(self, request_id: RequestId) -> None:
        if request_id in self._queued:
            self._route(request_id, self._queued[request_id])

    def _route(self, request_id: RequestId, token_ids: tuple[int, ...]) -> None:
        outcome, now = self.outcomes[request_id], self._timeline.now
        asked = RoutingRequest(
            token_ids,
            MAX_NEW_TOKENS,
            objectives=self._objectives,
            arrived_at=outcome.arrived_s,
        )
        match self._policy.choose(asked, self.view.view(now), now):
            case Route() as route:
                self._queued.pop(request_id, None)
                outcome.decided_s, outcome.local = now, route.prefill is None
                self.view.sent(request_id, route, len(token_ids), now)
                self.send(self._request(request_id, token_ids, outcome, route))
            case Refuse():
                self._queued.pop(request_id, None)
                outcome.decided_s, outcome.refused = now, True
                self.num_refused += 1
            case Queue(useful_s=useful_s):
                self._queued[request_id] = token_ids
                if math.isfinite(useful_s):
                    self._timeline.after(useful_s, lambda: self._look_again(request_id))

    def _request(self, request_id: RequestId, token_ids: tuple[int, ...], outcome: Outcome, route: Route) -> GenerateRequest:
        return GenerateRequest(
            request_id=request_id,
            gateway=self.address,
            token_ids=token_ids,
            sampling=SamplingParams(max_tokens=outcome.num_outputs, seed=0),
            route=route,
            timeout_s=NEVER_S,
            ttft_slo_s=self._objectives.ttft_s,
            tpot_slo_s=self._objectives.tpot_s,
        )
