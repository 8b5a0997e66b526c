"""The prefill role: computes prompts, gives the first token to the gateway and the KV to a decode worker."""

from collections.abc import Callable

from ..engine.engine import SequenceStep
from ..engine.scheduler import StepPlan
from ..engine.sequence import Sequence, SequenceState
from ..engine.worker import Worker
from ..messages.codec import Message
from ..messages.handoff import KVAccept, KVCancel, KVCommitted, KVRefuse, KVWait
from ..messages.ids import RequestId
from ..messages.membership import Role
from ..messages.requests import GenerateRequest, WorkerRef
from .kv_writer import Failure, KVWriter


class PrefillWorker(Worker):
    role = Role.PREFILL

    def setup(self) -> None:
        self._writer = KVWriter(
            me=self.ref,
            post=self.post,
            transport=self.replica.transport,
            pool=self.replica.pool,
            timeout_s=self.config.handoff_timeout_s,
            layer_group=self.config.engine.layer_group,
            on_end=self._handoff_ended,
        )

    def hands_off(self, request: GenerateRequest) -> bool:
        return True

    def num_handoffs(self) -> int:
        return len(self._writer)

    def receive_handoff(self, message: Message) -> None:
        if isinstance(message, KVAccept | KVWait | KVRefuse | KVCommitted | KVCancel):
            self._writer.receive(message, self.clock())

    def before_step(self, plan: StepPlan) -> None:
        for sequence in plan.admitted:
            if sequence.request.sampling.max_tokens - sequence.request.num_prior_outputs > 1:
                self._writer.offer(sequence, self.clock())

    def on_layer(self, plan: StepPlan) -> Callable[[int], None]:
        return lambda layer: self._writer.layer_finished(plan, layer)

    def after_step(self, steps: list[SequenceStep]) -> None:
        for step in steps:
            self._writer.chunk_finished(step.chunk, step.delta, self.clock())

    def tick(self, now: float) -> None:
        self._writer.tick(now)

    def abort(self, request_id: RequestId) -> None:
        self._writer.abort(request_id, self.clock())
        self.finish_if_known(request_id)

    def members_changed(self, gone: list[WorkerRef]) -> None:
        self._writer.update_membership(self.membership, gone)

    def idle_wait_s(self) -> float:
        return min(0.001, super().idle_wait_s()) if self._writer.is_waiting else super().idle_wait_s()

    def _handoff_ended(self, sequence: Sequence, failure: Failure | None) -> None:
        if sequence.state is not SequenceState.FINISHED:
            self.engine.finish(sequence)
            if failure is not None:
                self.fail(sequence.request, failure.kind, failure.message, failure.retryable)
