"""The decode role: takes over sequences whose KV a prefill worker writes here, and decodes them.

It also serves whole requests by itself (the local path): their prompts are computed in chunks beside the decodes.
"""

from ..engine.worker import Worker
from ..messages.codec import Message
from ..messages.handoff import KVDrained, KVLanded, KVOffer, KVProbe, KVProbeSent
from ..messages.ids import RequestId
from ..messages.membership import Role
from ..messages.requests import FailureKind, GenerateRequest, ServiceClass, WorkerRef
from .kv_receiver import KVReceiver
from .probe_receiver import ProbeReceiver

ROUSE_PERIOD_S = 0.005          # after 10 ms of rest an H200's driver takes 10 µs more for a step, after 150 ms 150


class DecodeWorker(Worker):
    role = Role.DECODE

    def setup(self) -> None:
        self._next_rouse = self.clock()
        self._receiver = KVReceiver(
            me=self.ref,
            post=self.post,
            transport=self.replica.transport,
            pool=self.replica.pool,
            engine=self.engine,
            timeout_s=self.config.handoff_timeout_s,
            on_failure=self._handoff_failed,
        )
        self._probes = ProbeReceiver(
            me=self.ref,
            post=self.post,
            transport=self.replica.transport,
            engine=self.engine,
            layout=self.replica.pool.layout,
            handoffs=self._receiver,
            timeout_s=self.config.handoff_timeout_s,
        )

    def drain(self) -> None:
        super().drain()
        self._receiver.draining = True

    def requests(self) -> list[GenerateRequest]:
        return [*super().requests(), *self._receiver.requests]

    def knows(self, request_id: RequestId) -> bool:
        return super().knows(request_id) or request_id in self._receiver

    def num_handoffs(self) -> int:
        return len(self._receiver)

    def num_filling_handoffs(self) -> int:
        return sum(request.service_class is ServiceClass.BATCH for request in self._receiver.requests)

    def receive_handoff(self, message: Message) -> None:
        if isinstance(message, KVOffer | KVLanded | KVDrained):
            self._receiver.receive(message, self.clock())
        if isinstance(message, KVProbe | KVProbeSent | KVDrained):
            self._probes.receive(message, self.clock())

    def tick(self, now: float) -> None:
        self._receiver.tick(now)
        self._probes.tick(now)
        if self._is_receiving(now) and not self.engine.has_work and now >= self._next_rouse:
            self._next_rouse = now + ROUSE_PERIOD_S
            self.engine.rouse()

    def abort(self, request_id: RequestId) -> None:
        self._receiver.abort(request_id)
        self.finish_if_known(request_id)

    def members_changed(self, gone: list[WorkerRef]) -> None:
        self._receiver.update_membership(self.membership, self.clock())
        self._probes.update_membership(self.membership, self.clock())

    def idle_wait_s(self) -> float:
        now = self.clock()
        if self._receiver.is_waiting or self._receiver.expects_announcement(now) or self._is_receiving(now):
            return 0.0
        is_looking = self._probes.is_waiting or (self.engine.runner.runs_ahead and self._receiver.expects_pages)
        return min(0.001, super().idle_wait_s()) if is_looking else super().idle_wait_s()

    def _is_receiving(self, now: float) -> bool:
        """And is to be awake when the announcement comes. Where the model is on a CPU, others need the core."""
        return self.engine.runner.runs_ahead and self._receiver.is_receiving(now)

    def _handoff_failed(self, request: GenerateRequest, kind: FailureKind, text: str) -> None:
        self.fail(request, kind, text, retryable=True)
