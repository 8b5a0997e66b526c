"""Generations out to workers, their tokens back in order, and again elsewhere when a worker is lost.

No I/O but the Post, no clock but `clock`.

    start ──► policy.decide ──Route──► GenerateRequest to route.first
                │ Queue                   │ StepTokens   → in order, once, to the generation
                ▼                         │ RequestFailed, worker dead or silent, no progress
              line.py: asked for again ◄──┘   → Abort to the old route, next attempt: prompt + outputs so far
              as news come, refused when no longer useful

`handle` takes messages as they come, and looks at who waits; `look` is to be called at each moment that `wake_at` was told;
`watch` is called a few times a second and holds the deadlines of what runs.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from ...messages.codec import Message
from ...messages.errors import DiptychError, Malformed, TooLarge
from ...messages.ids import RequestId
from ...messages.membership import Membership, Role
from ...messages.post import Post
from ...messages.requests import (
    Abort,
    FailureKind,
    LinkMeasured,
    LoadReport,
    LoadUpdate,
    RequestFailed,
    RequestSpan,
    Route,
    ServiceClass,
    StepTokens,
    TokenDelta,
    TransferFailed,
    WorkerRef,
)
from ..router.load_view import LoadView
from ..router.policy import Policy, Queue, Refuse
from .config import Limits
from .decisions import DecisionLog
from .errors import GenerationFailed, NoRoute, Overloaded, SlowClient
from .generation import Attempt, Generation, GenerationState
from .line import Line

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


class Observer(Protocol):
    """Who counts."""

    def ended(self, generation: Generation) -> None: ...
    def retried(self, reason: str) -> None: ...
    def span(self, span: RequestSpan) -> None: ...
    def transfer_failed(self, failed: TransferFailed) -> None: ...
    def link_measured(self, link: LinkMeasured) -> None: ...


class Dispatcher:
    def __init__(
        self,
        post: Post,
        policy: Policy,
        loads: LoadView,
        limits: Limits,
        observer: Observer,
        clock: Callable[[], float],
        log: DecisionLog | None = None,
    ) -> None:
        self._post = post
        self._policy = policy
        self._loads = loads
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._log = DecisionLog() if log is None else log
        self._running: dict[RequestId, Generation] = {}
        self._line: Line[Generation] = Line()
        self._prefill: frozenset[WorkerRef] = frozenset()      # workers whose role that is
        self.wake_at: Callable[[float], None] = lambda at: None        # on `clock`; a later call may name a sooner moment

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued(self) -> int:
        return len(self._line)

    def start(self, generation: Generation) -> None:
        """It is refused at once, through its `error`, when the gateway is full."""
        if self.num_running + self.num_queued >= self._limits.max_live_choices:
            limit = self._limits.max_live_choices
            self._end(generation, GenerationState.REFUSED, Overloaded(f"this gateway serves {limit} choices already", retry_after_s=1.0))
            return
        self._begin(generation)
        self._route(generation)
        self._arm()

    def finish(self, generation: Generation) -> None:
        """The client has all it wanted before the workers think so: a stop string."""
        if not generation.ended:
            self._leave_workers(generation)
            self._end(generation, GenerationState.FINISHED)
            self._arm()

    def abort(self, generation: Generation) -> None:
        if not generation.ended:
            self._leave_workers(generation)
            self._end(generation, GenerationState.ABORTED)
            self._arm()

    def drop(self, generation: Generation, error: DiptychError) -> None:
        """Of an answer in which another choice has failed or was refused. Without effect if it has ended already."""
        if not generation.ended:
            self._leave_workers(generation)
            self._give_up(generation, error)
            self._arm()

    def update_membership(self, membership: Membership) -> None:
        """What ran on a life that is gone is routed anew at once."""
        if not self._loads.set_membership(membership, self._clock()):
            return
        self._prefill = frozenset(member.ref for member in membership.workers if member.role is Role.PREFILL)
        self._post.update_members({member.ref.address for member in membership.workers})
        self._line.news()
        self.watch()

    def handle(self, messages: Iterable[Message]) -> None:
        for message in messages:
            match message:
                case StepTokens():
                    self._on_tokens(message)
                case LoadUpdate():
                    self._heard(message.load.worker, message.load)
                case RequestSpan():
                    self._on_span(message)
                case TransferFailed():
                    self._observer.transfer_failed(message)
                case LinkMeasured():
                    self._observer.link_measured(message)
                case RequestFailed():
                    self._on_failed(message)
                case _:
                    pass                      # what workers say to each other is nothing to a gateway
        self.look()

    def watch(self) -> None:
        now = self._clock()
        for generation in list(self._running.values()):
            self._watch_running(generation, now)
        self.look()

    def look(self) -> None:
        """At who waits for a route, where there is a reason to."""
        now = self._clock()
        if now >= self._line.next_at():
            for generation in self._line.turn(now):
                self._look_at(generation, self._clock())
            self._line.rest(self._clock())
        self._arm()

    def _arm(self) -> None:
        if (at := self._line.next_at()) < math.inf:
            self.wake_at(at)

    def _heard(self, worker: WorkerRef, report: LoadReport | None) -> None:
        self._loads.heard(worker, report, self._clock())
        if report is not None:
            self._line.news()

    def _watch_running(self, generation: Generation, now: float) -> None:
        attempt = generation.attempt
        if generation.ended or attempt is None:
            return
        is_queued = not attempt.has_tokens and self._loads.has_prompts_to_compute(attempt.route.first)
        if is_queued or generation.prompt.service_class is ServiceClass.BATCH:
            attempt.progress_at = now         # in a queue, or giving way to others, not stuck: the request's own deadline holds
        dead = [ref.worker_id for ref in attempt.workers if not self._loads.lives(ref, now)]
        if now >= generation.prompt.deadline:
            self._fail(generation, FailureKind.TIMEOUT, self._deadline_text(generation))
        elif dead:
            self._retry(generation, "worker_lost", FailureKind.PEER_LOST, f"{' and '.join(dead)} died or fell silent", backoff=False)
        elif now - attempt.progress_at > self._limits.stall_timeout_s:
            stalled = f"no token for {self._limits.stall_timeout_s:g} s"
            self._retry(generation, "stalled", FailureKind.TIMEOUT, stalled, backoff=False)

    def _look_at(self, generation: Generation, now: float) -> None:
        waits = generation.waits_for
        if now >= generation.prompt.deadline:
            self._fail(generation, FailureKind.TIMEOUT, self._deadline_text(generation))
        elif waits is not None and now >= generation.useful_until:
            self._give_up(generation, Overloaded(waits.reason, waits.retry_after_s))       # the policy's word; it is not asked again
        elif generation in self._line:
            self._route(generation)

    def _route(self, generation: Generation) -> None:
        now = self._clock()
        request = generation.routing_request()
        try:
            explanation = self._policy.decide(request, self._loads.view(now, request.path), now)
        except Exception as error:            # or it would be asked again at every turn, before all who wait behind this one
            logger.exception("%s: the router failed", generation.prompt.name)
            self._fail(generation, FailureKind.INTERNAL, f"the router failed: {error!r}")
            return
        self._log.decided(generation, explanation, now)
        match explanation.decision:
            case Route() as decision:
                generation.routed_at, generation.prediction = now, explanation.chosen
                self._send(generation, decision, now)
            case Refuse() as decision if generation.num_attempts == 0:
                self._give_up(generation, Overloaded(decision.reason, decision.retry_after_s))
            case Queue() | Refuse() as decision if now >= generation.queued_at + self._limits.queue_timeout_s:
                self._give_up(generation, NoRoute(f"{decision.reason}; waited {self._limits.queue_timeout_s:g} s"))
            case Queue() as decision:
                generation.waits_for, generation.useful_until = decision, now + decision.useful_s
                self._wait(generation)
            case Refuse():
                self._wait(generation)        # its client reads already: as long as for any route

    def _wait(self, generation: Generation) -> None:
        given_up_at = min(generation.useful_until, generation.queued_at + self._limits.queue_timeout_s, generation.prompt.deadline)
        self._line.wait(generation, generation.due_at, given_up_at)

    def _send(self, generation: Generation, route: Route, now: float) -> None:
        self._line.remove(generation)
        request = generation.start_attempt(route, self._post.address, now, is_alone=route.decode in self._prefill)
        self._running[request.request_id] = generation
        self._loads.sent(request.request_id, route, len(request.token_ids), now, request.service_class)
        try:
            self._post.send(route.first.address, request)
        except TooLarge as error:
            self._fail(generation, FailureKind.INVALID, str(error))
        if generation.num_attempts == 1:
            generation.routed()

    def _on_tokens(self, message: StepTokens) -> None:
        now, worker = self._clock(), message.worker
        self._heard(worker, message.load)
        for delta in message.deltas:
            generation = self._running.get(delta.request_id)
            if generation is None or (attempt := generation.attempt) is None:
                self._send_abort(worker, delta.request_id)            # an earlier one may have been lost
            elif worker == attempt.route.decode or worker == attempt.route.prefill:
                self._on_delta(generation, attempt, delta, worker, now)

    def _on_delta(self, generation: Generation, attempt: Attempt, delta: TokenDelta, worker: WorkerRef, now: float) -> None:
        try:
            if generation.prompt.sampling.logprobs is not None:
                _check_logprobs(delta)
            ready = attempt.order.push(delta)
        except Malformed as error:
            self._retry(generation, "malformed", FailureKind.INTERNAL, str(error), backoff=True)
            return
        if not attempt.handed_over and worker == attempt.route.decode:
            self._arrived(attempt)
        if not ready:
            return
        attempt.progress_at, attempt.has_tokens = now, True
        is_told = bool(generation.fresh)
        generation.deliver(ready, now)
        if ready[-1].finish is not None:
            self._drop_attempt(generation, num_outputs=len(generation.outputs))
            self._end(generation, GenerationState.FINISHED)
        elif generation.num_fresh_tokens > self._limits.max_buffered_tokens:
            self._leave_workers(generation)
            limit = self._limits.max_buffered_tokens
            self._end(generation, GenerationState.FAILED, SlowClient(f"the client has left more than {limit} tokens unread"))
        elif not is_told:
            generation.wake()

    def _on_span(self, span: RequestSpan) -> None:
        self._observer.span(span)
        generation = self._running.get(span.request_id)
        if generation is not None and generation.attempt is not None:
            self._arrived(generation.attempt)
            self._loads.moved(generation.attempt.route, len(generation.prompt.token_ids), span.transfer_s)

    def _arrived(self, attempt: Attempt) -> None:
        attempt.handed_over = True
        self._loads.arrived(attempt.request_id, attempt.route)

    def _on_failed(self, message: RequestFailed) -> None:
        generation = self._running.get(message.request_id)
        if generation is None or generation.attempt is None or message.worker not in generation.attempt.workers:
            return                            # of an attempt that is over, or of a prefill worker that no longer matters
        text = f"{message.worker.worker_id}: {message.message}"
        if message.retryable:
            self._retry(generation, message.kind, message.kind, text, backoff=True)
        else:
            self._fail(generation, message.kind, text)

    def _retry(self, generation: Generation, reason: str, kind: FailureKind, text: str, *, backoff: bool) -> None:
        assert generation.attempt is not None
        generation.last_failure = text
        generation.avoid |= set(generation.attempt.workers)
        self._leave_workers(generation)
        if generation.num_attempts >= self._limits.max_attempts:
            self._fail(generation, kind, f"attempt {generation.num_attempts} of {self._limits.max_attempts} failed: {text}")
            return
        self._observer.retried(reason)
        self._log.retried(generation, text)
        logger.info("%s: attempt %d is given up for another: %s", generation.prompt.name, generation.num_attempts, text)
        generation.move(GenerationState.QUEUED)
        self._begin(generation)
        if backoff:
            delay_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (generation.num_attempts - 1))
            self._line.back_off(generation, generation.due_at, min(generation.queued_at + delay_s, generation.prompt.deadline))
        else:
            self._route(generation)

    def _begin(self, generation: Generation) -> None:
        """To look for a route. It waits in the line only if there is none."""
        generation.queued_at = self._clock()
        generation.waits_for, generation.useful_until = None, math.inf

    def _give_up(self, generation: Generation, refusal: DiptychError) -> None:
        """No route. That is a refusal only if nothing was ever sent."""
        self._end(generation, GenerationState.REFUSED if generation.num_attempts == 0 else GenerationState.FAILED, refusal)

    def _fail(self, generation: Generation, kind: FailureKind, text: str) -> None:
        self._leave_workers(generation)
        self._end(generation, GenerationState.FAILED, GenerationFailed(kind, text))

    def _deadline_text(self, generation: Generation) -> str:
        progress = f"{len(generation.outputs)} tokens out, attempt {generation.num_attempts}"
        before = f" (before it: {generation.last_failure})" if generation.last_failure else ""
        return f"no answer within {self._limits.request_timeout_s:g} s: {progress}{before}"

    def _leave_workers(self, generation: Generation) -> None:
        attempt = generation.attempt
        if attempt is not None:
            for worker in (attempt.route.prefill, attempt.route.decode):
                if worker is not None:
                    self._send_abort(worker, attempt.request_id)
            self._drop_attempt(generation)

    def _send_abort(self, worker: WorkerRef, request_id: RequestId) -> None:
        self._post.send(worker.address, Abort(request_id))       # which the Post drops if the worker is no member any more

    def _drop_attempt(self, generation: Generation, num_outputs: int | None = None) -> None:
        if generation.attempt is not None:
            del self._running[generation.attempt.request_id]
            self._loads.ended(generation.attempt.request_id, generation.attempt.route, num_outputs, generation.prompt.service_class)
            self._line.news()
            generation.attempt = None

    def _end(self, generation: Generation, state: GenerationState, error: DiptychError | None = None) -> None:
        self._line.remove(generation)
        generation.move(state)
        generation.error = error
        self._observer.ended(generation)
        self._log.ended(generation)
        generation.wake()


def _check_logprobs(delta: TokenDelta) -> None:
    if len(delta.logprobs) != len(delta.token_ids):
        raise Malformed(f"{len(delta.logprobs)} log-probabilities for {len(delta.token_ids)} tokens")
