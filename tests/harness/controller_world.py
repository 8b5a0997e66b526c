"""A world for a controller: places, processes that answer as a test likes, and a clock."""

from dataclasses import dataclass, field

from diptych.cluster.controller import Controller, Drain, Kill, Phase, Publish, Start, Timeouts
from diptych.cluster.lives import NOTHING_HEARD, Answered, Died, Heard
from diptych.cluster.places import PlaceKind, PlaceName
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
