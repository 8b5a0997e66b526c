"""A controller that takes over from an earlier one: who goes on, who is replaced, and what is published when."""

import pytest
from harness.controller_world import ALL, D0, D1, FIRST, FIRST_VERSION, G0, TIMEOUTS, presence

from diptych.cluster.controller import Controller, Drain, Kill, Phase, Publish, Start
from diptych.cluster.lives import MAX_FIRST_STARTS, Adopted, Answered, Died, Heard
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.membership import Member
from diptych.messages.requests import WorkerRef


def test_adopting_publishes_nothing_before_all_are_heard() -> None:
    controller = Controller(ALL, TIMEOUTS, Epoch(5000), next_version=1)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    assert [action for action in controller.decide(0.0) if isinstance(action, Publish)] == []
    controller.observe(Answered(D0, FIRST, presence(D0, FIRST)), 0.1)
    published = [action.membership for action in controller.decide(0.1) if isinstance(action, Publish)]
    assert [member.ref.epoch for member in published[0].workers] == [FIRST]


def test_an_adopted_life_that_does_not_answer_holds_nothing_up_for_longer_than_any_other() -> None:
    controller = Controller(frozenset({D0, D1}), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    later = Epoch(FIRST + 1)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    controller.observe(Adopted(D1, later, served=True), 0.0)
    answer_s = TIMEOUTS.answer_s
    controller.observe(Answered(D1, later, presence(D1, later)), answer_s)
    assert controller.decide(answer_s) == []
    assert controller.decide(answer_s + 0.1) == [Kill(D0, FIRST, f"no answer for {answer_s:g} s")], "it may write until it is dead"
    controller.observe(Died(D0, FIRST, "killed"), answer_s + 2)
    published = [action.membership for action in controller.decide(answer_s + 2) if isinstance(action, Publish)]
    assert [member.ref.epoch for member in published[0].workers] == [later]


def test_an_adopted_life_that_was_starting_may_go_on_and_holds_nothing_up() -> None:
    """Ray may not have made its process yet, or its threads wait for Python's lock while libraries load."""
    controller = Controller(frozenset({D0}), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    controller.observe(Adopted(D0, FIRST, served=False), 0.0)
    published = [action.membership for action in controller.decide(0.0) if isinstance(action, Publish)]
    assert not published[0].has_ended(WorkerRef(WorkerId(str(D0)), FIRST, Address("")))
    assert controller.decide(TIMEOUTS.start_s) == []
    assert [type(action) for action in controller.decide(TIMEOUTS.start_s + 1)] == [Kill]


def test_a_place_that_served_an_earlier_controller_is_not_given_up() -> None:
    """Its host may be away for longer than three starts take."""
    controller, now_s, num_starts = Controller(frozenset({D0}), TIMEOUTS, Epoch(FIRST + 7), next_version=1), 0.0, 0
    controller.observe(Adopted(D0, FIRST, served=True), now_s)
    controller.observe(Died(D0, FIRST, "its host is gone"), now_s)
    while num_starts < 2 * MAX_FIRST_STARTS:
        now_s += 100.0
        for action in controller.decide(now_s):
            if isinstance(action, Start):
                num_starts += 1
                controller.observe(Died(action.name, action.epoch, "nowhere to start"), now_s)
        assert now_s < 1e5, "nobody tries any more"
    assert controller.phase is not Phase.FAILED


@pytest.mark.parametrize("here", [None, presence(D0, FIRST)])
def test_who_was_drained_by_an_earlier_controller_is_replaced(here: Member | None) -> None:
    """It has ended, or takes no more requests: nothing brings it back."""
    controller = Controller(frozenset({D0}), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    controller.observe(Answered(D0, FIRST, here, drained=True), 0.1)
    assert [action for action in controller.decide(0.1) if isinstance(action, Kill)] == [Kill(D0, FIRST, "drained")]


def test_who_takes_over_while_all_goes_down_drains_those_that_serve() -> None:
    """They are known to it as starting only, until they answer."""
    controller = Controller(frozenset(), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    for name in (G0, D0):
        controller.observe(Adopted(name, FIRST, served=True), 0.0)
    controller.observe(Adopted(D1, FIRST, served=False), 0.0)
    assert controller.decide(0.0) == []
    for name in (G0, D0):
        controller.observe(Answered(name, FIRST, presence(name, FIRST)), 0.1)
    assert [action for action in controller.decide(0.1) if not isinstance(action, Publish)] == [Drain(G0, FIRST)]
    controller.observe(Died(G0, FIRST, "drained"), 0.2)
    actions = [action for action in controller.decide(0.2) if not isinstance(action, Publish)]
    assert actions == [Drain(D0, FIRST), Kill(D1, FIRST, "no longer wanted")]


def test_versions_and_epochs_go_on_from_what_members_have_heard() -> None:
    """They come from the clock, which may have been set back: members would ignore all news as older than what they know."""
    controller = Controller(ALL, TIMEOUTS, Epoch(10), next_version=10)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    heard = Heard(FIRST_VERSION, Epoch(FIRST + 7))
    controller.observe(Answered(D0, FIRST, presence(D0, FIRST), heard=heard), 0.1)
    actions = controller.decide(0.1)
    assert [action.membership.version for action in actions if isinstance(action, Publish)] == [heard.version + 1]
    assert min(action.epoch for action in actions if isinstance(action, Start)) == heard.next_epoch
