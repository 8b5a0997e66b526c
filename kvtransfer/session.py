"""The states of one handoff, the same on both sides, and the one function that moves between them.

    OFFERED ──► RESERVED ──► MOVING ──► LANDED
       │            │           │
       └────────────┴───────────┴──► CANCELLING ──► CANCELLED
       └────────────┴───────────┴─────────┴───────► FAILED

A writer leaves CANCELLING when its transport has stopped; a receiver when the writer has said so (KVDrained), or is confirmed dead.
Only in LANDED, CANCELLED and FAILED may the handoff's blocks be used for anything else.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from ..messages.errors import IllegalTransition
from ..messages.handoff import Ticket


class HandoffState(Enum):
    OFFERED = auto()       # asked; nothing is reserved
    RESERVED = auto()      # the receiver holds blocks; no page has been written
    MOVING = auto()        # pages may be on their way
    LANDED = auto()        # all pages counted and committed
    CANCELLING = auto()    # given up, but a page may still be on its way
    CANCELLED = auto()
    FAILED = auto()        # a peer died or refused


TRANSITIONS: dict[HandoffState, frozenset[HandoffState]] = {
    HandoffState.OFFERED: frozenset({HandoffState.RESERVED, HandoffState.CANCELLING, HandoffState.FAILED}),
    HandoffState.RESERVED: frozenset({HandoffState.MOVING, HandoffState.CANCELLING, HandoffState.FAILED}),
    HandoffState.MOVING: frozenset({HandoffState.LANDED, HandoffState.CANCELLING, HandoffState.FAILED}),
    HandoffState.CANCELLING: frozenset({HandoffState.CANCELLED, HandoffState.FAILED}),
    HandoffState.LANDED: frozenset(),
    HandoffState.CANCELLED: frozenset(),
    HandoffState.FAILED: frozenset(),
}


@dataclass
class Session:
    """One handoff's state and deadline on one side."""

    ticket: Ticket
    deadline: float                       # of the current wait, on the caller's clock
    state: HandoffState = field(default=HandoffState.OFFERED)

    def move(self, to: HandoffState) -> None:
        """Raises IllegalTransition, and changes nothing then."""
        if to not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"handoff of {self.ticket.request_id}: {self.state.name} → {to.name}")
        self.state = to

    @property
    def ended(self) -> bool:
        return not TRANSITIONS[self.state]

    @property
    def live(self) -> bool:
        """Neither ended nor given up."""
        return HandoffState.CANCELLING in TRANSITIONS[self.state]
