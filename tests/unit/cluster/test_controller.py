"""The controller on a virtual clock, by example: starts, hangs and deaths, who is given up, scaling and stopping."""

import pytest
from harness.controller_world import ALL, D0, D1, G0, P0, TIMEOUTS, epoch_of, lives, presence, ready_world, world

from diptych.cluster.controller import Kill, Phase
from diptych.cluster.lives import MAX_FIRST_STARTS, STABLE_S, LifeState, StartFailed, backoff_s
from diptych.cluster.places import PlaceName
from diptych.cluster.turn_clock import TurnClock
from diptych.messages.errors import IllegalTransition
from diptych.messages.ids import WorkerId

# Starting

def test_starts_everything_and_publishes_it_once_ready() -> None:
    made = world()
    made.tick()
    assert lives(made) == ALL
    assert made.membership is not None
    assert made.membership.workers == ()
    made.make_ready()
    made.tick()
    assert made.controller.phase is Phase.READY
    assert len(made.membership.workers) == 3
    assert made.membership.gateways == (presence(G0, epoch_of(made, G0)),)
    version = made.membership.version
    made.tick()
    assert made.membership.version == version


def test_start_timeout() -> None:
    made = world()
    made.tick()
    made.tick(TIMEOUTS.start_s + 1)
    assert all(process.killed for process in made.processes.values())
    made.tick()
    assert made.controller.places[D0].error == "not ready within 60 s"


def test_who_never_came_up_is_given_up() -> None:
    made = world()
    num_starts = 0
    for _ in range(100):
        made.tick(1.0)
        if (key := next((key for key in made.processes if key[0] == P0), None)) is not None:
            num_starts += 1
            made.die(*key)
    assert num_starts == MAX_FIRST_STARTS
    assert made.controller.phase is Phase.FAILED
    assert made.controller.places[P0].error == "killed"


def test_hopeless_start_fails_at_once_with_its_text() -> None:
    made = world()
    made.tick()
    made.controller.observe(StartFailed(P0, epoch_of(made, P0), "WeightMismatch: lm_head.weight is missing", hopeless=True), made.now_s)
    assert made.controller.phase is Phase.FAILED
    made.tick()
    made.tick()
    assert P0 not in lives(made)
    assert made.controller.places[P0].error == "WeightMismatch: lm_head.weight is missing"


def test_backoff_grows_and_ends() -> None:
    assert [backoff_s(n) for n in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert backoff_s(5000) == 15.0


# Hangs and deaths

def test_replacement_waits_for_the_confirmed_death() -> None:
    made = ready_world()
    epoch = epoch_of(made, D0)
    process = made.processes[D0, epoch]
    process.hung = True
    made.tick(TIMEOUTS.answer_s + 1)
    assert process.killed
    assert made.membership is not None
    assert made.membership.lives(WorkerId("decode-0"), epoch), "a process that may still write is not declared dead"
    assert next(m for m in made.membership.workers if m.ref.worker_id == "decode-0").draining
    for _ in range(20):
        for action in made.controller.decide(made.now_s):
            made.do(action)
    assert lives(made) == ALL
    made.tick()                                               # the death is confirmed
    assert not made.membership.lives(WorkerId("decode-0"), epoch)
    made.settle()
    assert epoch_of(made, D0) > epoch


@pytest.mark.parametrize("name", [D0, G0])
def test_a_loop_that_hangs_is_replaced_though_its_process_answers(name: PlaceName) -> None:
    made = ready_world()
    process = made.processes[name, epoch_of(made, name)]
    process.still_s = 0.0
    made.tick(TIMEOUTS.stall_s)
    assert not process.killed, "a step or a compilation may take so long"
    made.tick(1.0)
    assert process.killed
    assert made.controller.places[name].error == "its loop has stood still for 26 s"
    made.tick()
    made.settle()
    assert made.controller.phase is Phase.READY


def test_a_loop_that_moves_again_in_time_is_kept() -> None:
    made = ready_world()
    process = made.processes[D0, epoch_of(made, D0)]
    for _ in range(5):
        process.still_s = 0.0
        made.tick(TIMEOUTS.stall_s)
        process.still_s = None
        made.tick()
    assert not process.killed


def test_nobody_is_killed_for_a_pause_of_the_controllers_own() -> None:
    """Its first turn after the pause asks everybody, and decides before they can have answered."""
    made = ready_world()
    clock, wall_s = TurnClock(made.now_s), made.now_s
    for pause_s in (0.1, 600.0, 0.1):
        wall_s += pause_s
        assert made.controller.decide(clock.turn(wall_s)) == []
    for _ in range(round(TIMEOUTS.answer_s / 0.1)):           # but who stays silent while he is asked is
        wall_s += 0.1
        actions = made.controller.decide(clock.turn(wall_s))
        if actions:
            break
    assert sorted(action.name for action in actions if isinstance(action, Kill)) == sorted(ALL)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_life_that_served_long_starts_the_count_of_failures_anew(hangs: bool) -> None:
    """Also one that was killed for its silence in the end."""
    made = ready_world()
    for _ in range(3):
        key = D0, epoch_of(made, D0)
        made.tick(STABLE_S + 1)
        if hangs:
            made.processes[key].hung = True
            made.tick(TIMEOUTS.answer_s + 1)
            assert made.processes[key].killed
        made.die(*key)
        assert made.controller.places[D0].num_failures == 1
        made.settle()


def test_who_was_ready_once_is_never_given_up() -> None:
    made = ready_world()
    for _ in range(3 * MAX_FIRST_STARTS):
        key = next(key for key in made.processes if key[0] == D0)
        made.die(*key)
        while D0 not in lives(made):
            made.tick()
        assert made.controller.phase is Phase.DEGRADED
    made.settle()
    assert made.controller.phase is Phase.READY


def test_illegal_transition_names_both_states() -> None:
    made = ready_world()
    life = made.controller.places[D0].life
    assert life is not None
    with pytest.raises(IllegalTransition, match="ready → starting"):
        life.moved(LifeState.STARTING, 0.0)


# Scaling and stopping

def test_gateways_leave_before_workers() -> None:
    made = ready_world()
    made.controller.desired = frozenset()
    made.tick()
    assert [name for (name, _), process in made.processes.items() if process.draining] == [G0]
    assert made.controller.phase is Phase.STOPPING
    made.settle()
    assert not made.processes
    assert made.controller.phase is Phase.STOPPED


def test_scaling_down_drains_only_the_surplus() -> None:
    made = ready_world()
    made.controller.desired = ALL - {D1}
    made.tick()
    assert made.processes[D1, epoch_of(made, D1)].draining
    made.settle()
    assert lives(made) == ALL - {D1}


def test_a_drain_ends_at_its_timeout() -> None:
    made = ready_world()
    made.controller.desired = ALL - {D1}
    made.tick()
    made.processes[D1, epoch_of(made, D1)].draining = False                # it never gets done
    made.tick(TIMEOUTS.drain_s + 1)
    made.tick()
    assert D1 not in lives(made)
