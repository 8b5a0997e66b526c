"""The table of transitions, written down a second time: what is not in it is refused and changes nothing."""

from itertools import product

import pytest

from diptych.kvtransfer.session import HandoffState, Session
from diptych.messages.errors import HandoffError, IllegalTransition
from diptych.messages.handoff import Ticket
from diptych.messages.ids import Epoch, RequestId, WorkerId

OFFERED, RESERVED, MOVING, LANDED, CANCELLING, CANCELLED, FAILED = HandoffState
ALLOWED = {
    (OFFERED, RESERVED), (RESERVED, MOVING), (MOVING, LANDED),
    (OFFERED, CANCELLING), (RESERVED, CANCELLING), (MOVING, CANCELLING), (CANCELLING, CANCELLED),
    (OFFERED, FAILED), (RESERVED, FAILED), (MOVING, FAILED), (CANCELLING, FAILED),
}  # fmt: skip
TICKET = Ticket(WorkerId("decode-0"), Epoch(1), RequestId("r1"), 7)


@pytest.mark.parametrize(("state", "to"), list(product(HandoffState, repeat=2)), ids=lambda state: state.name)
def test_every_pair_of_states(state: HandoffState, to: HandoffState) -> None:
    session = Session(TICKET, deadline=0.0, state=state)
    if (state, to) in ALLOWED:
        session.move(to)
        assert session.state is to
    else:
        with pytest.raises(IllegalTransition, match=f"r1: {state.name} → {to.name}"):
            session.move(to)
        assert session.state is state


@pytest.mark.parametrize("state", HandoffState, ids=lambda state: state.name)
def test_live_and_ended(state: HandoffState) -> None:
    session = Session(TICKET, deadline=0.0, state=state)
    assert session.live == (state in {OFFERED, RESERVED, MOVING})
    assert session.ended == (state in {LANDED, CANCELLED, FAILED})


def test_a_handoff_starts_offered() -> None:
    assert Session(TICKET, deadline=0.0).state is OFFERED
    assert issubclass(IllegalTransition, HandoffError)
