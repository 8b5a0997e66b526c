"""The controller against a world of processes that start, answer, hang and die as hypothesis likes, on a virtual clock."""

from harness.controller_world import ALL, TIMEOUTS, lives, world
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diptych.cluster.controller import Controller, Phase
from diptych.cluster.lives import MAX_FIRST_STARTS, Adopted, Died
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import WorkerRef


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
