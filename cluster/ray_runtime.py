"""Does what the controller decides, with Ray: one detached named actor a life, one placement group a worker's place.

    Start ──► actor `diptych-NAME/decode-0@EPOCH`      poll() asks every actor for its pulse, without ever waiting for one,
    Drain ──► drain()                                  and turns answers, errors and vanished processes into events
    Kill  ──► leave(), Ray's kill, SIGKILL ──► Died once the process table has it no more
    Publish ► update_membership() of all, and again of who has not heard it: Ray may lose a call

Actors are detached so that they outlive their controller: the next one finds them by name (`adopt`) and goes on. Whether a process is gone
is looked for in the process table of its host (`ray_nodes.py`): Ray's word for a death is not taken (it reports it when it has sent the
signal). For that the next controller finds their processes, too: a Trace of each lies in Ray's key-value store, from its first answer,
before anybody hears of it, until its death is confirmed. There lies, too, that the deployment is to stop.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
from msgspec import Struct
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..messages.ids import Epoch
from ..messages.membership import Membership, Role
from ..messages.zmq_post import Keyring
from .controller import Action, Drain, Kill, Publish, Start
from .gateway_shell import GatewayShell
from .hosts import actor_options, bundle_of, reserving_order
from .lives import Adopted, Answered, Died, Event, StartFailed
from .places import PlaceKind, PlaceName, pool_of, worker_config
from .pulse import Pulse, ShellState
from .ray_nodes import Nodes, here, offers
from .spec import Spec
from .worker_shell import WorkerShell

logger = logging.getLogger(__name__)

NAMESPACE = "diptych"
ASK_PERIOD_S = 0.4
LEAVE_GRACE_S = 1.5                           # from being asked to leave until Ray is told to kill it
SIGKILL_AFTER_S = 0.5                         # Ray's kill is a message; a process that hangs does not read it


def controller_name(deployment: str) -> str:
    return f"diptych-{deployment}"


def actor_name(deployment: str, place: PlaceName, epoch: Epoch) -> str:
    return f"{controller_name(deployment)}/{place}@{epoch}"


def actors_of(deployment: str) -> list[tuple[PlaceName, Epoch, Any]]:
    """The lives of a deployment that Ray knows by name."""
    found = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(_prefix(deployment)):
            actor = ray.get_actor(entry["name"], namespace=NAMESPACE)
            found.append((*_parse_actor_name(deployment, entry["name"]), actor))
    return found


def _prefix(deployment: str) -> str:
    return controller_name(deployment) + "/"


def _parse_actor_name(deployment: str, name: str) -> tuple[PlaceName, Epoch]:
    place, _, epoch_text = name.removeprefix(_prefix(deployment)).rpartition("@")
    return PlaceName.parse(place), Epoch(int(epoch_text))


class Trace(Struct, frozen=True):
    """A life's process, as the next controller finds it even if Ray has given the actor up."""

    pid: int
    began_s: float                            # since boot
    served: bool                              # so others may know the life
    node_id: str = ""                         # of the host whose process it is; empty: the controller's own


def write_trace(deployment: str, place: PlaceName, epoch: Epoch, trace: Trace) -> None:
    internal_kv._internal_kv_put(actor_name(deployment, place, epoch), msgspec.msgpack.encode(trace), namespace=NAMESPACE)


def remove_trace(deployment: str, place: PlaceName, epoch: Epoch) -> None:
    internal_kv._internal_kv_del(actor_name(deployment, place, epoch), namespace=NAMESPACE)


def traces_of(deployment: str) -> dict[tuple[PlaceName, Epoch], Trace]:
    keys = internal_kv._internal_kv_list(_prefix(deployment), namespace=NAMESPACE)
    values = {key: internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {_parse_actor_name(deployment, key.decode()): msgspec.msgpack.decode(value, type=Trace) for key, value in values.items()}


def write_stop(deployment: str) -> None:
    """For the next controller, should this one die before all is down."""
    internal_kv._internal_kv_put(controller_name(deployment), b"stop", namespace=NAMESPACE)


def remove_stop(deployment: str) -> None:
    internal_kv._internal_kv_del(controller_name(deployment), namespace=NAMESPACE)


def is_to_stop(deployment: str) -> bool:
    return bool(internal_kv._internal_kv_exists(controller_name(deployment), namespace=NAMESPACE))


def remove_placements(deployment: str) -> None:
    for entry in ray.util.placement_group_table().values():
        if entry["name"].startswith(_prefix(deployment)) and entry["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(entry["name"]))


@dataclass
class _Process:
    """One life as Ray and the process table see it."""

    name: PlaceName
    epoch: Epoch
    actor: Any                                # ray.actor.ActorHandle of a Shell; None if an earlier controller's is lost
    trace: Trace | None = None                # once it has answered anybody
    answer: Any = None                        # ObjectRef of the pulse under way
    asked_s: float = float("-inf")
    pulse: Pulse | None = None
    dying: str = ""                           # why
    kill_at_s: float = 0.0
    lost: bool = False                        # Ray has given the actor up, or was told to

    @property
    def served(self) -> bool:
        return self.trace is not None and self.trace.served


@dataclass
class RayRuntime:
    spec: Spec
    keyring: Keyring
    node_id: str                              # where the controller and the gateways stand; without `hosts: any` the workers, too
    node_ip: str
    news: Membership | None = None            # published last
    processes: dict[tuple[PlaceName, Epoch], _Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = Nodes(self.node_id)
        self._ports: dict[PlaceName, int] = {}                   # of gateways, as they were last

    def reserve(self) -> None:
        """Asks for the room of all workers, before the first of them starts."""
        for name in reserving_order(self.spec, offers(self.spec)):
            self._placement(name)

    def adopt(self) -> list[Event]:
        """The lives that an earlier controller left, and those whose death it has not confirmed."""
        traces = traces_of(self.spec.name)
        for name, epoch, actor in actors_of(self.spec.name):
            self.processes[name, epoch] = _Process(name, epoch, actor, traces.get((name, epoch)))
        for name, epoch in traces.keys() - self.processes.keys():
            process = _Process(name, epoch, None, traces[name, epoch], dying="Ray has given it up", lost=True)
            self.processes[name, epoch] = process
        return [Adopted(name, epoch, process.served) for (name, epoch), process in self.processes.items()]

    def act(self, action: Action, now_s: float) -> None:
        logger.info("%s", action)
        match action:
            case Start(name, epoch):
                self.processes[name, epoch] = _Process(name, epoch, self._start(name, epoch))
            case Drain(name, epoch):
                self.processes[name, epoch].actor.drain.remote()
            case Kill(name, epoch, why):
                process = self.processes[name, epoch]
                process.dying, process.kill_at_s = why, now_s + LEAVE_GRACE_S
                if not process.lost:
                    process.actor.leave.remote()
            case Publish(membership):
                self._publish(membership)

    def poll(self, now_s: float) -> list[Event]:
        """What has happened since; never waits."""
        for process in self.processes.values():
            if process.answer is None and not process.lost and now_s - process.asked_s >= self._ask_period_s(process):
                process.answer, process.asked_s = process.actor.pulse.remote(), now_s
        asked = {process.answer: process for process in self.processes.values() if process.answer is not None}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
        events = [event for answer in answered for event in self._hear(asked[answer], now_s)]
        for key, process in list(self.processes.items()):
            if process.dying and self._is_gone(process, now_s):
                del self.processes[key]
                remove_trace(self.spec.name, *key)
                events.append(Died(process.name, process.epoch, process.dying))
        return events

    def pulse(self, name: PlaceName, epoch: Epoch) -> Pulse | None:
        process = self.processes.get((name, epoch))
        return process.pulse if process else None

    def close(self) -> None:
        """Gives the places back."""
        remove_placements(self.spec.name)

    def _start(self, name: PlaceName, epoch: Epoch) -> Any:
        options: dict[str, Any] = {
            "name": actor_name(self.spec.name, name, epoch),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,                # a new life is a new actor with a new epoch
            "num_cpus": 0,
        }
        if name.kind is PlaceKind.GATEWAY:
            beside_us = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
            gateway = ray.remote(GatewayShell).options(**options, scheduling_strategy=beside_us)
            return gateway.remote(self.spec, name, self.keyring, here, self._ports.get(name, 0))
        config = worker_config(self.spec, name, epoch)
        options |= actor_options(self.spec, pool_of(self.spec, name.kind))
        place = PlacementGroupSchedulingStrategy(self._placement(name), placement_group_bundle_index=0)
        return ray.remote(WorkerShell).options(**options, scheduling_strategy=place).remote(Role(name.kind), config, self.keyring, here)

    def _placement(self, name: PlaceName) -> PlacementGroup:
        """A place's own, kept over its lives."""
        group_name = f"{controller_name(self.spec.name)}/{name}"
        group: PlacementGroup
        try:
            group = ray.util.get_placement_group(group_name)
        except ValueError:
            bundle = bundle_of(self.spec, pool_of(self.spec, name.kind), self.node_ip)
            group = ray.util.placement_group([bundle], strategy="STRICT_PACK", name=group_name, lifetime="detached")
        return group

    def _publish(self, membership: Membership) -> None:
        self.news = membership
        for process in self.processes.values():
            if process.served and not process.lost:
                self._tell(process, membership)

    def _tell(self, process: _Process, membership: Membership) -> None:
        process.actor.update_membership.remote(msgspec.msgpack.encode(membership))

    def _ask_period_s(self, process: _Process) -> float:
        is_serving = process.pulse is not None and process.pulse.state is ShellState.SERVING
        return ASK_PERIOD_S if is_serving and not process.dying else 0.0

    def _hear(self, process: _Process, now_s: float) -> list[Event]:
        answer, process.answer = process.answer, None
        try:
            process.pulse = msgspec.msgpack.decode(ray.get(answer), type=Pulse)
        except ActorUnavailableError:
            return []                         # Ray cannot reach it just now; if that lasts, it is killed for its silence
        except RayTaskError as error:         # it lives, but could not say how it is: silence, too
            logger.warning("%s epoch %d does not answer: %s", process.name, process.epoch, error)
            return []
        except RayError as error:
            logger.warning("%s epoch %d is lost: %s", process.name, process.epoch, error)
            process.lost = isinstance(error, RayActorError)
            process.dying = process.dying or f"its process ended: {type(error).__name__}"
            return []
        self._trace(process, process.pulse)
        if process.pulse.gateway is not None:
            self._ports[process.name] = process.pulse.gateway.port
        if process.pulse.state is ShellState.FAILED:
            return [StartFailed(process.name, process.epoch, process.pulse.error, hopeless=process.pulse.is_typed)]
        if process.pulse.state is ShellState.SERVING and self.news is not None and process.pulse.heard.version < self.news.version:
            self._tell(process, self.news)
        pulse = process.pulse
        return [Answered(process.name, process.epoch, pulse.member or pulse.address, pulse.drained, pulse.still_s, pulse.heard)]

    def _trace(self, process: _Process, pulse: Pulse) -> None:
        """Before anything is done with the answer: whoever is known has a trace, also if this controller dies here."""
        served = process.served or pulse.state is ShellState.SERVING
        trace = Trace(pulse.pid, pulse.began_s, served, pulse.node_id)
        if trace != process.trace:
            write_trace(self.spec.name, process.name, process.epoch, trace)
            process.trace = trace

    def _is_gone(self, process: _Process, now_s: float) -> bool:
        """Helps a dying process along. One that never answered, neither us nor an earlier controller, is known through Ray alone, to us
        as to everybody."""
        pulse = process.pulse
        has_left = pulse is not None and pulse.state is ShellState.ENDED
        if not process.lost and (has_left or now_s >= process.kill_at_s):
            ray.kill(process.actor)
            process.lost, process.kill_at_s = True, now_s + SIGKILL_AFTER_S
        if process.trace is None:
            return process.lost and process.answer is None
        end_it = process.lost and now_s >= process.kill_at_s
        return self._nodes.is_gone(process.trace.node_id, process.trace.pid, process.trace.began_s, end_it)
