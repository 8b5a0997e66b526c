"""The controller against a world of processes that start, answer, hang and die as hypothesis likes, on a virtual clock."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diptych.cluster.controller import Controller, Drain, Kill, Phase, Publish, Start, Timeouts
from diptych.cluster.lives import (
    MAX_FIRST_STARTS,
    NOTHING_HEARD,
    STABLE_S,
    Adopted,
    Answered,
    Died,
    Heard,
    LifeState,
    StartFailed,
    backoff_s,
)
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.cluster.turn_clock import TurnClock
from diptych.messages.errors import IllegalTransition
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import WorkerRef

P0, D0, D1, G0 = (
    PlaceName(PlaceKind.PREFILL, 0),
    PlaceName(PlaceKind.DECODE, 0),
    PlaceName(PlaceKind.DECODE, 1),
    PlaceName(PlaceKind.GATEWAY, 0),
)
ALL = frozenset({P0, D0, D1, G0})
TIMEOUTS = Timeouts(start_s=60.0, answer_s=5.0, stall_s=25.0, drain_s=20.0)
FIRST, FIRST_VERSION = Epoch(100_000), 100_000


def presence(name: PlaceName, epoch: Epoch) -> Member | Address:
    address = Address(f"tcp://{name}/{epoch}")
    if name.kind is PlaceKind.GATEWAY:
        return address
    ref = WorkerRef(WorkerId(str(name)), epoch, address)
    return Member(ref, Role(name.kind), layout_hash="", block_size=16, num_blocks=8, max_model_len=64)


@dataclass
class Process:
    ready: bool = False
    hung: bool = False
    still_s: float | None = None              # its loop hangs, but another thread answers
    draining: bool = False
    killed: bool = False
    heard: Heard = NOTHING_HEARD
    served: bool = False                      # and has said so: before that nobody tells it anything


@dataclass
class World:
    """What a runtime does, with processes that are dataclasses."""

    controller: Controller
    now_s: float = 0.0
    processes: dict[tuple[PlaceName, Epoch], Process] = field(default_factory=dict)
    membership: Membership | None = None

    def tick(self, seconds: float = 0.25) -> None:
        self.now_s += seconds
        for (name, epoch), process in list(self.processes.items()):
            if process.killed:
                self.die(name, epoch)
            elif not process.hung:
                here = presence(name, epoch) if process.ready else None
                process.still_s = None if process.still_s is None or here is None else process.still_s + seconds
                process.served = process.served or process.ready
                drained = process.draining and process.still_s is None
                self.controller.observe(Answered(name, epoch, here, drained, process.still_s or 0.0, process.heard), self.now_s)
        for action in self.controller.decide(self.now_s):
            self.do(action)

    def do(self, action: object) -> None:
        match action:
            case Start(name, epoch):
                assert all(other != name for other, _ in self.processes), f"{name} lives twice"
                self.processes[name, epoch] = Process()
            case Drain(name, epoch):
                self.processes[name, epoch].draining = True
            case Kill(name, epoch):
                self.processes[name, epoch].killed = True
            case Publish(membership):
                self.membership = membership
                for process in self.processes.values():
                    assert membership.version > process.heard.version, "it would be taken for an older one"
                    process.heard = Heard(membership.version, membership.next_epoch) if process.served else process.heard

    def die(self, name: PlaceName, epoch: Epoch) -> None:
        del self.processes[name, epoch]
        self.controller.observe(Died(name, epoch, "killed"), self.now_s)

    def make_ready(self) -> None:
        for process in self.processes.values():
            process.ready, process.hung, process.still_s = True, False, None

    def settle(self) -> None:
        """Faults have ended: whoever starts comes up."""
        for _ in range(400):
            self.make_ready()
            self.tick()


def world(desired: frozenset[PlaceName] = ALL) -> World:
    return World(Controller(desired, TIMEOUTS, FIRST, FIRST_VERSION))


def ready_world(desired: frozenset[PlaceName] = ALL) -> World:
    made = world(desired)
    made.settle()
    assert made.controller.phase is Phase.READY
    return made


def epoch_of(made: World, name: PlaceName) -> Epoch:
    return next(epoch for other, epoch in made.processes if other == name)


def lives(made: World) -> set[PlaceName]:
    return {name for name, _ in made.processes}


class Chaos(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = world()
        self.max_epoch: dict[PlaceName, Epoch] = {}
        self.clock_was_set_back = False
        self.ever_published: set[tuple[WorkerId, Epoch]] = set()

    def pick(self, index: int) -> tuple[PlaceName, Epoch] | None:
        keys = sorted(self.world.processes)
        return keys[index % len(keys)] if keys else None

    @rule(seconds=st.sampled_from([0.1, 0.25, 3.0, 30.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)
        self.assert_the_dead_are_declared()

    @rule(index=st.integers(0, 7))
    def become_ready(self, index: int) -> None:
        if key := self.pick(index):
            self.world.processes[key].ready = True

    @rule(index=st.integers(0, 7))
    def hang(self, index: int) -> None:
        if key := self.pick(index):
            self.world.processes[key].hung = True

    @rule(index=st.integers(0, 7))
    def hang_the_loop(self, index: int) -> None:
        if key := self.pick(index):
            self.world.processes[key].still_s = 0.0

    @rule(index=st.integers(0, 7))
    def die(self, index: int) -> None:
        if key := self.pick(index):
            self.world.die(*key)

    @rule(index=st.integers(0, 7))
    def late_news(self, index: int) -> None:
        if key := self.pick(index):
            name, epoch = key
            self.world.controller.observe(Died(name, Epoch(epoch - 1), "an older life"), self.world.now_s)

    @rule(desired=st.frozensets(st.sampled_from(sorted(ALL))))
    def rescale(self, desired: frozenset[PlaceName]) -> None:
        self.world.controller.desired = desired

    @rule(later=st.sampled_from([1000, -500]))
    def replace_controller(self, later: int) -> None:
        """It dies and another adopts what lives; the clock may have been set back meanwhile, which only members can tell."""
        self.clock_was_set_back |= later < 0
        old = self.world.controller
        self.world.controller = Controller(old.desired, TIMEOUTS, Epoch(old.next_epoch + later), old.next_version + later)
        self.world.membership = None
        for (name, epoch), process in self.world.processes.items():
            self.world.controller.observe(Adopted(name, epoch, process.served), self.world.now_s)

    @invariant()
    def epochs_only_grow(self) -> None:
        for name, epoch in self.world.processes:
            assert epoch >= self.max_epoch.get(name, 0) or self.clock_was_set_back
            self.max_epoch[name] = epoch

    @invariant()
    def who_was_published_and_lives_is_never_declared_dead(self) -> None:
        published = self.world.membership
        if published is None:
            return
        self.ever_published |= {(member.ref.worker_id, member.ref.epoch) for member in published.workers}
        for name, epoch in self.world.processes:
            worker_id = WorkerId(str(name))
            assert published.lives(worker_id, epoch) or (worker_id, epoch) not in self.ever_published
            assert name.kind is PlaceKind.GATEWAY or not published.has_ended(WorkerRef(worker_id, epoch, Address("")))

    def assert_the_dead_are_declared(self) -> None:
        """Of all lives that somebody who lives has ever heard of; unless nothing may be published yet."""
        alive = {(WorkerId(str(name)), epoch) for name, epoch in self.world.processes}
        heard = max((process.heard.next_epoch for process in self.world.processes.values()), default=Epoch(0))
        if self.world.membership is not None:
            for worker_id, epoch in self.ever_published - alive:
                assert self.world.membership.has_ended(WorkerRef(worker_id, epoch, Address(""))) or epoch >= heard

    def teardown(self) -> None:
        for key in [key for key, process in self.world.processes.items() if process.killed]:
            self.world.die(*key)
        for place in list(self.world.controller.places.values()):
            if place.failed:
                return                                        # given up is a legal end
        self.world.settle()
        assert lives(self.world) == self.world.controller.desired
        wanted = {WorkerId(str(name)) for name in self.world.controller.desired if name.kind is not PlaceKind.GATEWAY}
        assert self.world.membership is not None
        assert {member.ref.worker_id for member in self.world.membership.workers} == wanted
        assert not any(member.draining for member in self.world.membership.workers)


Chaos.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestChaos = Chaos.TestCase


def test_the_property_test_lets_who_is_being_killed_be_given_up() -> None:
    """A history that it found: the third start was too slow when the faults ended."""
    chaos, places = Chaos(), {}
    while not places or not all(place.num_failures == MAX_FIRST_STARTS - 1 and place.life for place in places.values()):
        chaos.tick(30.0)
        places = chaos.world.controller.places
    while not all(process.killed for process in chaos.world.processes.values()):
        chaos.tick(30.0)
    chaos.teardown()
    assert chaos.world.controller.phase is Phase.FAILED


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


def test_backoff_grows_and_ends() -> None:
    assert [backoff_s(n) for n in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert backoff_s(5000) == 15.0


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


def test_start_timeout() -> None:
    made = world()
    made.tick()
    made.tick(TIMEOUTS.start_s + 1)
    assert all(process.killed for process in made.processes.values())
    made.tick()
    assert made.controller.places[D0].error == "not ready within 60 s"


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


def test_an_adopted_life_that_was_starting_may_go_on_and_holds_nothing_up() -> None:
    """Ray may not have made its process yet, or its threads wait for Python's lock while libraries load."""
    controller = Controller(frozenset({D0}), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    controller.observe(Adopted(D0, FIRST, served=False), 0.0)
    published = [action.membership for action in controller.decide(0.0) if isinstance(action, Publish)]
    assert not published[0].has_ended(WorkerRef(WorkerId(str(D0)), FIRST, Address("")))
    assert controller.decide(TIMEOUTS.start_s) == []
    assert [type(action) for action in controller.decide(TIMEOUTS.start_s + 1)] == [Kill]


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


@pytest.mark.parametrize("here", [None, presence(D0, FIRST)])
def test_who_was_drained_by_an_earlier_controller_is_replaced(here: Member | None) -> None:
    """It has ended, or takes no more requests: nothing brings it back."""
    controller = Controller(frozenset({D0}), TIMEOUTS, Epoch(FIRST + 7), next_version=1)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    controller.observe(Answered(D0, FIRST, here, drained=True), 0.1)
    assert [action for action in controller.decide(0.1) if isinstance(action, Kill)] == [Kill(D0, FIRST, "drained")]


def test_versions_and_epochs_go_on_from_what_members_have_heard() -> None:
    """They come from the clock, which may have been set back: members would ignore all news as older than what they know."""
    controller = Controller(ALL, TIMEOUTS, Epoch(10), next_version=10)
    controller.observe(Adopted(D0, FIRST, served=True), 0.0)
    heard = Heard(FIRST_VERSION, Epoch(FIRST + 7))
    controller.observe(Answered(D0, FIRST, presence(D0, FIRST), heard=heard), 0.1)
    actions = controller.decide(0.1)
    assert [action.membership.version for action in actions if isinstance(action, Publish)] == [heard.version + 1]
    assert min(action.epoch for action in actions if isinstance(action, Start)) == heard.next_epoch


def test_illegal_transition_names_both_states() -> None:
    made = ready_world()
    life = made.controller.places[D0].life
    assert life is not None
    with pytest.raises(IllegalTransition, match="ready → starting"):
        life.moved(LifeState.STARTING, 0.0)
