"""What both roles share: the loop of a worker's one thread, its books of members, and what it tells gateways.

    turn:  receive ─► commands from other threads ─► expire ─► tick (the role's own) ─► launch ─► collect ─► after_step (the role's own)
           ─► tokens out ─► what was computed becomes matchable ─► step times are learned from, if there is time ─► heartbeat
           ─► if nothing happens for long: a small step to learn from (`idle_refresh.py`)

A step is launched when one may be planned, and collected when its results are there; in between the loop goes on, so that a handoff is
answered while a GPU computes. On a CPU both happen in one turn.

A role adds its side of the KV handoff (`role_side.py`). Whatever it raises ends the process: a worker that is in doubt about its state
does not go on; the gateways route its requests anew and the controller starts another.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from ..kvtransfer.transport import TransferStats
from ..messages.codec import Message
from ..messages.errors import ContextOverflow, LinkTooSlow
from ..messages.ids import RequestId
from ..messages.membership import Member, Membership
from ..messages.post import Post
from ..messages.requests import Abort, FailureKind, GenerateRequest, LinkMeasured, LoadReport, LoadUpdate, RequestFailed, WorkerRef
from .config import WorkerConfig
from .idle_refresh import IdleRefresh
from .load import load_report
from .outbox import TokenOutbox
from .pace import Pacer
from .predictor import features_of
from .replica import Replica, build_replica
from .role_side import RoleSide
from .scheduler import StepPlan
from .step_watch import StepWatch

EXPIRY_PERIOD_S = 0.01         # between looks at who has run out of time
LOOK_AFTER_S = 0.003           # that a step has been being launched: then looks whether the one before has been computed
LOOK_PERIOD_S = 0.001          # between these
ATTENTION_S = 0.0005
"""So long after a question the loop looks for the answer without sleeping: to be woken takes as long as the answer does."""

ALERT_S = 0.005
"""So long after a message or a step the loop of a GPU's worker does not sleep: to be woken takes some 60 µs, and all that it then does
several times as long as in a loop that goes on. On a CPU the model and others need the core."""

MOST_UNLEARNED = 8
"""Steps: their model is so far behind at most, where a turn never comes in which nothing else is to be done."""


class WorkerStatus(Struct, frozen=True):
    """For people and metrics; a consistent snapshot as of the last heartbeat."""

    taken_at: float                           # on the worker's clock
    load: LoadReport
    num_cached_blocks: int
    num_steps: int
    num_preempted: int
    num_tokens_computed: int
    num_dropped_messages: int
    num_pages_sent: int
    num_bytes_sent: int
    transfer_busy_s: float
    draining: bool
    links: tuple[LinkMeasured, ...]           # of a prefill worker, to the decode workers that it has met


class Worker(RoleSide):
    """`run` belongs to one thread; `stop`, `drain`, `update_membership`, `status`, `still_s` and `member` may be called from any other."""

    def __init__(
        self, config: WorkerConfig, post: Post, replica: Replica | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.post = post
        self.clock = clock
        self.ref = WorkerRef(config.worker_id, config.epoch, post.address)
        self.replica = replica or build_replica(config)
        self.engine = self.replica.engine
        self.membership = Membership(version=-1, workers=(), gateways=())
        self._outbox = TokenOutbox(self.ref, post)
        self._commands: deque[Callable[[], None]] = deque()      # appended to by other threads
        self._stopping = threading.Event()
        self._draining = False
        self._backlog: list[Message] = []                        # came while a step was being launched
        self._next_beat = self._next_expiry = clock()
        self._alert_s = ALERT_S if self.replica.pool.ranks[0].tensor.is_cuda else 0.0
        self._active_at = -math.inf                             # when something last came or was computed
        self._num_steps = self.num_preempted = self._num_tokens = 0
        self._steps = StepWatch(self.replica.step_model)
        self._idle_refresh = IdleRefresh(self.engine, self._steps, clock)
        self._descriptors = self.replica.transport.register(self.replica.pool)
        self.engine.scheduler.pacer = Pacer(
            clock, lambda: self._steps.model, self._steps.busy_s, self.engine.runner.padded_rows
        )
        self.setup()
        self._status = self._snapshot()

    # from any thread

    @property
    def member(self) -> Member:
        limits = self.engine.limits
        return Member(
            ref=self.ref,
            role=self.role,
            layout_hash=self.replica.pool.layout.hash,
            block_size=limits.block_size,
            num_blocks=self.replica.pool.num_blocks,
            max_model_len=limits.max_model_len,
            descriptors=self._descriptors,
            draining=self._draining,
            tp=len(self.replica.pool.ranks),
        )

    def status(self) -> WorkerStatus:
        return self._status

    @property
    def still_s(self) -> float:
        """How long ago the loop had its last heartbeat. Who answers for it from another thread proves nothing."""
        return self.clock() - self._status.taken_at

    def stop(self) -> None:
        self._stopping.set()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self._draining = True

    def update_membership(self, membership: Membership) -> None:
        self._commands.append(lambda: self._accept_membership(membership))

    def run(self) -> None:
        """Until `stop`."""
        patience_s = 0.0
        while not self._stopping.is_set():
            if self.turn(patience_s):
                patience_s = 0.0
            elif (patience_s := self.idle_wait_s()) == 0.0:
                os.sched_yield()              # what is looked for may need this core

    def close(self) -> None:
        self.replica.close()

    # the loop's thread

    def turn(self, timeout_s: float) -> bool:
        """One pass; True if anything was computed. Raises StepStuck."""
        backlog, self._backlog = self._backlog, []
        messages = [*backlog, *self.post.receive(0.0 if backlog else timeout_s)]
        for message in messages:
            self._receive(message)
        while self._commands:
            self._commands.popleft()()
        now = self.clock()
        self._expire(now)
        self.tick(now)
        progressed = self._launch()
        if self.engine.is_ready:
            self._collect()
            progressed = True
        elif self.engine.is_computing:
            self._steps.require_progress(now)      # as of before the next was launched: that may have compiled something
        now = self.clock()
        is_active = progressed or bool(messages)
        if is_active:
            self._active_at = now
            self._idle_refresh.put_off(now)
        if self._has_time(now, is_active) or self._steps.num_unlearned > MOST_UNLEARNED:
            self._steps.learn()                    # it takes longer than all else between a step's end or a message and its answer
        self._beat(now)
        if not is_active and self.is_quiet:
            self._idle_refresh.look(now)
        return progressed

    def _has_time(self, now: float, is_active: bool) -> bool:
        """For what nobody waits for: a device computes and nothing came, or what was last said would have been answered by now. On a CPU
        always: what comes while it computes waits far longer than for this."""
        if self._alert_s == 0.0:
            return True
        return not is_active and (self.engine.is_computing or now >= self._active_at + ATTENTION_S)

    def fail(self, request: GenerateRequest, kind: FailureKind, message: str, retryable: bool) -> None:
        """After the tokens that have been computed, which would come too late otherwise."""
        if self._outbox.has_tokens:
            self._outbox.flush(self.load())
        self.post.send(request.gateway, RequestFailed(request.request_id, kind, message, retryable, self.ref))

    def load(self) -> LoadReport:
        handoffs, filling = self.num_handoffs(), self.num_filling_handoffs()
        return load_report(self.ref, self.engine, handoffs, self._steps, self.clock(), self.num_leaving(), filling)

    def _receive(self, message: Message) -> None:
        match message:
            case GenerateRequest():
                self._accept(message)
            case Abort():
                self.abort(message.request_id)
            case _:
                self.receive_handoff(message)

    def _accept(self, request: GenerateRequest) -> None:
        if self.knows(request.request_id):
            return                                            # doubled on the way
        first = request.route.first
        if (first.worker_id, first.epoch) != (self.ref.worker_id, self.ref.epoch):
            text = f"meant for {first.worker_id} epoch {first.epoch}, this is {self.ref.worker_id} epoch {self.ref.epoch}"
            self.fail(request, FailureKind.REFUSED, text, retryable=True)
        elif self._draining:
            self.fail(request, FailureKind.REFUSED, f"{self.ref.worker_id} is draining", retryable=True)
        else:
            try:
                self.check_route(request)
                self.engine.add(request, self.clock(), hands_off=self.hands_off(request))
            except ContextOverflow as error:
                self.fail(request, FailureKind.INVALID, str(error), retryable=False)
            except LinkTooSlow as error:
                self.fail(request, FailureKind.REFUSED, str(error), retryable=True)

    def _launch(self) -> bool:
        """The next step, if there is one."""
        if not (self.engine.scheduler.running or self.engine.scheduler.waiting) or not self.engine.may_plan:
            return False
        plan = self.engine.plan()
        self.num_preempted += len(plan.preempted)
        if not plan.chunks:
            return False
        self.before_step(plan)
        features, began_at = features_of(plan), self.clock()
        self.engine.launch(plan, self._each_layer(plan))
        self._steps.launched(features, began_at)         # until now its tokens counted as waiting, in reports too
        self._num_tokens += sum(chunk.count for chunk in plan.chunks)
        return True

    def _collect(self) -> None:
        steps = self.engine.collect()
        self._steps.collected(self.clock())
        self._num_steps += 1
        for step in steps:
            if step.delta is not None:
                self._outbox.add(step.sequence.request.gateway, step.delta)
        self.after_step(steps)
        self._outbox.flush(self.load())
        self.engine.publish()
        for step in [step for step in steps if step.broke_down]:
            self.abort(step.sequence.id)
            self.fail(step.sequence.request, FailureKind.INTERNAL, "the model's logits are not finite", retryable=False)

    def _each_layer(self, plan: StepPlan) -> Callable[[int], None]:
        """A step may last longer than gateways bear silence, and pages can leave from the layer on at which they were accepted. Launched
        kernel by kernel, it takes the host up to 40 ms: the tokens of the step before would come so much later. What is launched sooner
        comes first, for the device may have nothing else to do."""
        role_hook, next_look = self.on_layer(plan), self.clock() + LOOK_AFTER_S

        def finished(layer: int) -> None:
            nonlocal next_look
            if role_hook is not None:
                self._receive_handoffs()
                role_hook(layer)
            now = self.clock()
            if now >= next_look:
                next_look = now + LOOK_PERIOD_S
                if self.engine.is_ready:
                    self._collect()
            self._beat(now)

        return finished

    def _receive_handoffs(self) -> None:
        """While a step is being launched; what else arrives waits for the next turn."""
        for message in self.post.receive(0.0):
            if isinstance(message, GenerateRequest | Abort):
                self._backlog.append(message)
            else:
                self.receive_handoff(message)

    def _expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRY_PERIOD_S
        for sequence in [s for s in self.engine.sequences if now >= s.deadline]:
            self.abort(sequence.id)
            text = f"no end within {sequence.request.timeout_s:g} s on {self.ref.worker_id}"
            self.fail(sequence.request, FailureKind.TIMEOUT, text, retryable=True)

    def _beat(self, now: float) -> None:
        if now < self._next_beat:
            return
        self._next_beat = now + self.config.heartbeat_s
        self._status = self._snapshot()
        for gateway in self.membership.gateways:
            self.post.send(gateway, LoadUpdate(self._status.load))

    def _accept_membership(self, new: Membership) -> None:
        """Lives and gateways that were listed once and are no longer have ended. An older snapshot than the last is ignored."""
        if new.version <= self.membership.version:
            return
        old, self.membership = self.membership, new
        gone = [m.ref for m in old.workers if not new.lives(m.ref.worker_id, m.ref.epoch)]
        self.members_changed(gone)
        left = set(old.gateways) - set(new.gateways)
        for request in [request for request in self.requests() if request.gateway in left]:
            self.abort(request.request_id)
        self.post.update_members({member.ref.address for member in new.workers} | set(new.gateways))

    def _snapshot(self) -> WorkerStatus:
        transfer: TransferStats = self.replica.outbound[0].stats
        return WorkerStatus(
            taken_at=self.clock(),
            load=self.load(),
            num_cached_blocks=self.engine.pool.num_cached,
            num_steps=self._num_steps,
            num_preempted=self.num_preempted,
            num_tokens_computed=self._num_tokens,
            num_dropped_messages=self.post.num_dropped,
            num_pages_sent=transfer.num_pages,
            num_bytes_sent=transfer.num_bytes,
            transfer_busy_s=transfer.busy_s,
            draining=self._draining,
            links=self.links(),
        )

    def finish_if_known(self, request_id: RequestId) -> None:
        sequence = self.engine.find(request_id)
        if sequence is not None:
            self.engine.finish(sequence)

    def idle_wait_s(self) -> float:
        """How long the loop may sleep when nothing was computed: short while somebody else's memory is waited for."""
        if self.engine.is_computing or self.clock() < self._active_at + self._alert_s:
            return 0.0
        return 0.001 if self.engine.has_work else max(0.0, self._next_beat - self.clock())
