"""What the shared loop of `worker.py` asks of a worker's role: its side of the KV handoff. All of it runs in the loop's thread.

    setup ─► per message: receive_handoff      per turn: tick      per membership: members_changed
             per request: check_route, hands_off      per step: before_step ─► on_layer … ─► after_step      when it is not wanted: abort
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from ..messages.codec import Message
from ..messages.ids import RequestId
from ..messages.membership import Role
from ..messages.requests import GenerateRequest, LinkMeasured, WorkerRef
from .engine import Engine, SequenceStep
from .scheduler import StepPlan


class RoleSide(ABC):
    role: ClassVar[Role]
    engine: Engine                            # the loop's

    @abstractmethod
    def setup(self) -> None:
        """Makes the role's side of the handoff; the loop has all that it needs but its first turn."""
        ...

    @abstractmethod
    def num_handoffs(self) -> int: ...

    def num_leaving(self) -> int:
        """Of the handoffs, those to another worker."""
        return 0

    def num_filling_handoffs(self) -> int:
        """Of the handoffs to this one, those of batch work."""
        return 0

    @property
    def is_quiet(self) -> bool:
        """No request is here, no KV on its way, and no link is being measured: who lends blocks for that holds them."""
        return not self.engine.sequences and not self.engine.pool.num_held and not self.num_handoffs()

    @abstractmethod
    def receive_handoff(self, message: Message) -> None: ...

    @abstractmethod
    def tick(self, now: float) -> None: ...

    @abstractmethod
    def abort(self, request_id: RequestId) -> None: ...

    @abstractmethod
    def members_changed(self, gone: list[WorkerRef]) -> None:
        """`gone` were listed once, and are confirmed dead."""
        ...

    def hands_off(self, request: GenerateRequest) -> bool:
        """Whether the request leaves this worker after its first token."""
        return False

    def check_route(self, request: GenerateRequest) -> None:
        """Raises LinkTooSlow: from here to its decode worker."""
        return

    def links(self) -> tuple[LinkMeasured, ...]:
        return ()

    def requests(self) -> list[GenerateRequest]:
        """All that are under way here."""
        return [sequence.request for sequence in self.engine.sequences]

    def knows(self, request_id: RequestId) -> bool:
        """It is under way here, or something of it is still to be cleared away."""
        return self.engine.find(request_id) is not None

    def before_step(self, plan: StepPlan) -> None:
        return None

    def on_layer(self, plan: StepPlan) -> Callable[[int], None] | None:
        return None

    def after_step(self, steps: list[SequenceStep]) -> None:
        """Before the step's tokens are told: what is waited for on another GPU comes first."""
        return
