"""The prefill role: computes prompts, gives the first token to the gateway and the KV to a decode worker.

It also serves whole requests by itself, where the router finds that decode workers have no room, or that there are none: they are decoded
beside its prompts.
"""

from collections.abc import Callable

from ..engine.engine import SequenceStep
from ..engine.scheduler import StepPlan
from ..engine.sequence import Sequence, SequenceState
from ..engine.worker import Worker
from ..messages.codec import Message
from ..messages.handoff import KVAccept, KVCancel, KVCommitted, KVProbeAccept, KVProbeCounted, KVRefuse, KVWait
from ..messages.ids import RequestId
from ..messages.membership import Role
from ..messages.requests import GenerateRequest, LinkMeasured, WorkerRef
from .kv_writer import KVWriter
from .link_prober import LinkProber
from .outgoing import Failure
from .probe import Floor


class PrefillWorker(Worker):
    role = Role.PREFILL

    def setup(self) -> None:
        transport, pool = self.replica.outbound
        self._writer = KVWriter(
            me=self.ref,
            post=self.post,
            transport=transport,
            pool=pool,
            blocks=self.engine.pool,
            timeout_s=self.config.handoff_timeout_s,
            layer_group=self.replica.layer_group,
            on_end=self._handoff_ended,
            staging=self.replica.staging,
        )
        self._prober = LinkProber(
            me=self.ref,
            post=self.post,
            transport=transport,
            pool=pool,
            timeout_s=self.config.handoff_timeout_s,
            floor=Floor(self.config.min_gbps, self.config.refuse_below_floor),
        )

    def hands_off(self, request: GenerateRequest) -> bool:
        return request.route.prefill is not None

    def check_route(self, request: GenerateRequest) -> None:
        if _needs_handoff(request):
            self._prober.check(request.route.decode)

    def links(self) -> tuple[LinkMeasured, ...]:
        return self._prober.links

    def knows(self, request_id: RequestId) -> bool:
        return super().knows(request_id) or request_id in self._writer

    def num_handoffs(self) -> int:
        return len(self._writer)

    def num_leaving(self) -> int:
        return len(self._writer)

    @property
    def is_quiet(self) -> bool:
        return super().is_quiet and not self._prober.is_probing

    def receive_handoff(self, message: Message) -> None:
        if isinstance(message, KVProbeAccept | KVProbeCounted | KVRefuse | KVCancel) and self._prober.receive(message, self.clock()):
            return
        if isinstance(message, KVAccept | KVWait | KVRefuse | KVCommitted | KVCancel):
            self._writer.receive(message, self.clock())

    def before_step(self, plan: StepPlan) -> None:
        for sequence in plan.admitted:
            if _needs_handoff(sequence.request):
                self._writer.offer(sequence, self.clock())

    def on_layer(self, plan: StepPlan) -> Callable[[int], None]:
        return lambda layer: self._writer.layer_finished(plan, layer)

    def after_step(self, steps: list[SequenceStep]) -> None:
        for step in steps:
            self._writer.chunk_finished(step.chunk, step.delta, self.clock())

    def tick(self, now: float) -> None:
        self._writer.tick(now)
        if self.config.probe_links:
            self._prober.tick(now, is_quiet=not self._writer and not self.engine.sequences)

    def abort(self, request_id: RequestId) -> None:
        self._writer.abort(request_id, self.clock())
        self.finish_if_known(request_id)

    def members_changed(self, gone: list[WorkerRef]) -> None:
        self._writer.update_membership(self.membership, gone)
        self._prober.update_membership(self.membership, self.clock())

    def idle_wait_s(self) -> float:
        if self._writer.expects_answer(self.clock()):
            return 0.0
        is_waiting = self._writer.is_waiting or self._prober.is_waiting
        return min(0.001, super().idle_wait_s()) if is_waiting else super().idle_wait_s()

    def _handoff_ended(self, sequence: Sequence, failure: Failure | None) -> None:
        if sequence.state is not SequenceState.FINISHED:
            self.engine.finish(sequence)
            if failure is not None:
                self.fail(sequence.request, failure.kind, failure.message, failure.retryable)


def _needs_handoff(request: GenerateRequest) -> bool:
    """It is decoded elsewhere, and the first token is not the last one."""
    return request.route.prefill is not None and request.sampling.max_tokens - request.num_prior_outputs > 1
