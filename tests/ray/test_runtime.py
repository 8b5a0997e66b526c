"""What the runtime makes of members' answers. Ray carries them; the members are played."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import msgspec

from diptych.cluster.controller import Publish
from diptych.cluster.lives import Answered, Heard
from diptych.cluster.places import PlaceKind, PlaceName
from diptych.cluster.pulse import Pulse, ShellState
from diptych.cluster.ray_join import join
from diptych.cluster.records import Record
from diptych.cluster.spec import Spec, parse_spec
from diptych.messages.ids import Address, Epoch
from diptych.messages.membership import Membership
from diptych.messages.zmq_post import Keyring

if TYPE_CHECKING:                             # Ray reads its environment when it is imported: not before the head is there
    from diptych.cluster.ray_runtime import RayRuntime

GATEWAY = PlaceName(PlaceKind.GATEWAY, 0)
NEWS = Membership(7, (), ())


class Member:
    """Answers as it was told to; hears a membership unless the call is lost."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.loses_calls = False
        self.error: Exception | None = None
        self.pulse = SimpleNamespace(remote=self._pulse)
        self.update_membership = SimpleNamespace(remote=self._hear)

    def _pulse(self) -> object:
        import ray

        if self.error is not None:
            return ray.remote(_raise).options(num_cpus=0).remote(self.error)
        version = self.heard[-1] if self.heard else -1
        heard = Heard(version, Epoch(1))
        return ray.put(msgspec.msgpack.encode(Pulse(1, 0.0, ShellState.SERVING, heard, address=Address("tcp://here"))))

    def _hear(self, encoded: bytes) -> None:
        if not self.loses_calls:
            self.heard.append(msgspec.msgpack.decode(encoded, type=Membership).version)


def _niceness() -> int:
    return os.nice(0)


def _raise(error: Exception) -> None:
    raise error


def runtime_of(member: Member, ray_head: str) -> "RayRuntime":
    join(Record("played", ray_head, None))
    from diptych.cluster.ray_runtime import RayRuntime, _Process

    runtime = RayRuntime(Spec.model_construct(name="alone"), Keyring.new(), node_id="", node_ip="")
    runtime.processes[GATEWAY, Epoch(1)] = _Process(GATEWAY, Epoch(1), member)
    return runtime


def poll(runtime: "RayRuntime", now_s: float) -> list[object]:
    """A question and its answer."""
    import ray

    process = runtime.processes[GATEWAY, Epoch(1)]
    events = list(runtime.poll(now_s))
    while process.answer is not None:
        ray.wait([process.answer])
        events += runtime.poll(now_s)
    return events


def test_what_runs_here_gives_way_to_nobody(ray_head: str) -> None:
    join(Record("nice", ray_head, None))
    import ray

    assert ray.get(ray.remote(_niceness).options(num_cpus=0).remote(), timeout=60) == _niceness()


def test_room_is_reserved_once_for_all_lives_of_a_place(ray_head: str) -> None:
    join(Record("played", ray_head, None))
    import ray

    from diptych.cluster.ray_runtime import RayRuntime

    tree = {"name": "ranks", "model": {"path": "embedded"}, "hosts": "any", "pools": {"decode": {"workers": 1, "tp": 2}}}
    runtime = RayRuntime(parse_spec(tree, Path()), Keyring.new(), node_id="", node_ip="")
    try:
        runtime.reserve()
        runtime.reserve()
        groups = [each for each in ray.util.placement_group_table().values() if each["name"] == "diptych-ranks/decode-0"]
        assert [(each["strategy"], each["bundles"]) for each in groups] == [("STRICT_PACK", {0: {"CPU": 2.0}})]
    finally:
        runtime.close()


def test_a_membership_that_was_lost_on_the_way_is_told_again(ray_head: str) -> None:
    member = Member()
    runtime = runtime_of(member, ray_head)
    member.loses_calls = True
    runtime.act(Publish(NEWS), 0.0)
    assert member.heard == []
    member.loses_calls = False
    poll(runtime, 1.0)
    assert member.heard == [7]
    poll(runtime, 2.0)
    assert member.heard == [7], "once is enough"


def test_who_raises_instead_of_answering_is_silent_and_not_dead(ray_head: str) -> None:
    member = Member()
    runtime = runtime_of(member, ray_head)
    member.error = TimeoutError("the loop is busy")
    assert poll(runtime, 1.0) == []
    assert not runtime.processes[GATEWAY, Epoch(1)].dying
    member.error = None
    assert poll(runtime, 2.0) == [Answered(GATEWAY, Epoch(1), Address("tcp://here"), heard=Heard(-1, Epoch(1)))]
