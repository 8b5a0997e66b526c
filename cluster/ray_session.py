"""A command's side of Ray: joins a cluster, or starts one; finds, starts and stops a deployment's controller.

    launch(spec) ──► the running Ray, or a head of our own ──► controller actor (detached) ──► Deployment
    find(name)   ──► the same one later, from another command

A Deployment is a handle: `status()`, `wait_until_ready()`, `stop()`. Ray is imported here and in `ray_join`, `ray_nodes`, `ray_runtime`
alone.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from ..messages.errors import ClusterError, SpecError, TakenDown
from ..messages.zmq_post import Keyring
from . import records
from .controller import Phase
from .gateway.decisions import RequestExplanation
from .hosts import what_is_missing
from .own_name import own_name
from .places import PlaceKind
from .pulse import DeploymentStatus
from .ray_head import start_head, stop_head
from .ray_join import accepts, join, leave, running_ray
from .records import Record
from .spec import Spec

ANSWER_TIMEOUT_S = 20.0
POLL_S = 0.1
STOP_MARGIN_S = 20.0
CLEAR_TIMEOUT_S = 5.0
LAUNCH_TIMEOUT_S = 90.0                       # of an `up` until its controller is there, for which a `down` waits


@dataclass(frozen=True)
class Deployment:
    """A running (or starting) deployment, as this process reaches it."""

    record: Record
    controller: Any                           # ray.actor.ActorHandle of a ControllerShell

    def status(self) -> DeploymentStatus:
        """Raises ClusterError if the controller does not answer."""
        from .controller_shell import decode_status

        return decode_status(_ask(self.controller.status))

    def explain(self, some_id: str) -> RequestExplanation | None:
        """Asks every gateway, of which one has had the request. Raises ClusterError if none knows it and some do not answer."""
        from .ray_runtime import actors_of

        gateways = [(place, actor) for place, _, actor in actors_of(self.record.name) if place.kind is PlaceKind.GATEWAY]
        asked = [(place, actor.explain.remote(some_id)) for place, actor in gateways]
        silent = []
        for place, answer in asked:
            try:
                found = _decode_explanation(_answer(answer))
            except ClusterError as error:
                silent.append(f"{place}: {error}")
                continue
            if found is not None:
                return found
        if silent:
            raise ClusterError("\n".join(silent))
        return None

    def wait_until_ready(self, timeout_s: float, watch: Callable[[DeploymentStatus], None] = lambda status: None) -> DeploymentStatus:
        """Raises ClusterError with the places' own words as soon as one will not come up, or when the time is up; TakenDown."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                status = self.status()
            except ClusterError:
                if _is_taken_down(self.record):
                    raise TakenDown(f"{self.record.name} was taken down by another command") from None
                raise
            watch(status)
            if status.phase in (Phase.STOPPING, Phase.STOPPED):
                raise TakenDown(f"{self.record.name} is being taken down by another command")
            if is_serving(status):
                records.write(msgspec.structs.replace(self.record, endpoint=status.endpoint))
                return status
            if status.phase is Phase.FAILED:
                raise ClusterError("\n".join(status.errors))
            if time.monotonic() > deadline:
                waiting = [f"{place.name} ({place.state or 'no process'})" for place in status.places if place.state != "ready"]
                raise ClusterError("\n".join([f"not ready within {timeout_s:g} s: {', '.join(waiting)}", *status.errors]))
            time.sleep(POLL_S)

    def stop(self, watch: Callable[[DeploymentStatus], None] = lambda status: None) -> None:
        """Gateways end their answers, then workers leave; then the controller, and the Ray head if it is ours and nobody else's."""
        import ray

        status = self.status()
        timeout_s = 2 * status.drain_s + STOP_MARGIN_S        # of the gateways, then of the workers
        deadline = time.monotonic() + timeout_s
        _ask(self.controller.stop)
        while (status := self.status()).phase is not Phase.STOPPED:
            watch(status)
            if time.monotonic() > deadline:
                raise ClusterError("\n".join([f"{self.record.name} is not down after {timeout_s:g} s", *status.errors]))
            time.sleep(POLL_S)
        ray.kill(self.controller)
        _forget(self.record)


def is_serving(status: DeploymentStatus) -> bool:
    """All is up, and every gateway knows workers."""
    return status.phase is Phase.READY and all(place.gateway.ready for place in status.places if place.gateway is not None)


def launch(spec: Spec, own_ray: bool = False) -> Deployment:
    """`own_ray`: not even a running Ray is joined. Raises ClusterError, SpecError."""
    with records.hold(spec.name):
        _refuse_a_second(spec.name, own_ray)
        try:
            return _launch(spec, own_ray)
        except BaseException:
            if (record := records.find(spec.name)) is not None:
                _forget(record)
            raise


def _refuse_a_second(name: str, own_ray: bool) -> None:
    """Raises SpecError. A record of what a Ray that is not ours does not run any more is forgotten."""
    record = next((record for record in records.read_all() if record.name == name), None)
    if record is None:
        return
    if record.head is None:
        if not accepts(record.address):
            where = f"Ray at {record.address}, where nothing listens"
            raise SpecError(f"name: a deployment {name!r} is recorded on {where}; `{own_name()} down {name}` forgets it")
        join(record)
        if _find_controller(name) is None:
            _forget(record)
            if own_ray or running_ray()[0] != record.address:
                leave()
            return
    raise SpecError(f"name: a deployment {name!r} is running already; `{own_name()} down {name}` stops it")


def _launch(spec: Spec, own_ray: bool) -> Deployment:
    address, head = (None, None) if own_ray else running_ray()
    if address is None:
        head = start_head(begun=lambda head: records.write(Record(spec.name, "", head)))
        address = head.address
    record = Record(spec.name, address, head)
    records.write(record)
    join(record)
    if _find_controller(spec.name) is not None:
        raise ClusterError(f"a deployment {spec.name!r} is running on Ray at {address} already")
    _check_hosts(spec)
    return Deployment(record, _start_controller(spec))


def _check_hosts(spec: Spec) -> None:
    """Raises ClusterError: placement would wait until `start_s` for what no host has, and then could not say why."""
    from .ray_nodes import offers

    if problem := what_is_missing(spec, offers(spec)):
        raise ClusterError(problem)


def _check_port(spec: Spec, wait_s: float) -> None:
    """Of gateways that share one: they would share it with a stranger who allows that, too, and the stranger get some of the clients.
    `wait_s`: for gateways that have been killed. Raises ClusterError."""
    host, port = spec.router.host, spec.router.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if spec.router.processes == 1:
        return                                                # its gateway finds out by itself
    deadline = time.monotonic() + wait_s
    while True:
        try:
            alone = socket.create_server((host, port), family=family, dualstack_ipv6=family is socket.AF_INET6)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ClusterError(f"router.port: the gateways cannot listen on {host}:{port}: {error.strerror}") from None
            time.sleep(POLL_S)
        else:
            alone.close()
            return


def find(name: str | None) -> Deployment:
    """Raises ClusterError if there is none."""
    record = records.find(name)
    if record is None:
        address, head = running_ray()
        if address is None or name is None:
            raise ClusterError(f"no deployment {name or ''} is running".replace("  ", " "))
        record = Record(name, address, head)
    join(record)
    controller = _find_controller(record.name)
    if controller is None:
        raise ClusterError(f"no deployment {record.name!r} is running on Ray at {record.address}")
    return Deployment(record, controller)


def take_down(name: str | None, watch: Callable[[DeploymentStatus], None]) -> str:
    """Stops a deployment in order; or, if its controller cannot do that any more, clears away what is left of it: with the Ray head below
    it, if it is ours alone. Returns what came of it."""
    if name is None:
        recorded = records.find(None)
        if recorded is None:
            raise ClusterError("no deployment is running")
        name = recorded.name
    with records.hold(name, LAUNCH_TIMEOUT_S):
        if (left := _without_controller(name)) is not None:
            return left
        try:
            find(name).stop(watch)
        except ClusterError as error:
            record = records.find(name)
            if record is None:
                raise ClusterError(f"{error}{_swept(records.sweep_shared_memory(name))}") from None
            if record.head is None or _is_shared(record):
                raise
            _forget(record)
        return f"{name} is down"


def _without_controller(name: str) -> str | None:
    """Clears away what is recorded on a Ray that is not ours alone, and is not there any more. None: there is nothing of the kind."""
    record = records.find(name)
    if record is None or not (record.head is None or _is_shared(record)):
        return None
    if record.head is None and not accepts(record.address):
        return f"{name} is forgotten: nothing listens at {record.address}, where its Ray was{_swept(_forget(record))}"
    join(record)
    if _find_controller(name) is not None:
        return None
    num_ended = _clear_away(name)
    num_removed = _forget(record)
    deadline = time.monotonic() + CLEAR_TIMEOUT_S
    while num_ended and records.shared_memory_of(name) and time.monotonic() < deadline:       # held until its owner is dead
        time.sleep(POLL_S)
        num_removed += records.sweep_shared_memory(name)
    members = f"; {num_ended} member(s) that it has left are ended" if num_ended else ""
    return f"{name} is forgotten: Ray at {record.address} has no controller of it{members}{_swept(num_removed)}"


def _swept(num_segments: int) -> str:
    return f"; {num_segments} segment(s) of its shared memory removed" if num_segments else ""


def _is_taken_down(record: Record) -> bool:
    try:
        with records.hold(record.name):
            return not records.is_there(record)
    except SpecError:                                         # who does it is still at it
        return True


def _is_shared(record: Record) -> bool:
    return any(other.head == record.head for other in records.read_all() if other.name != record.name)


def _forget(record: Record) -> int:
    """Returns how many segments of shared memory it has left."""
    if record.head is not None and not _is_shared(record):
        leave()
        stop_head(record.head)
    records.remove(record)
    return records.sweep_shared_memory(record.name)


def _start_controller(spec: Spec) -> Any:
    """On this machine, as the gateways: who calls `up` on a host finds the endpoint there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .controller_shell import ControllerShell
    from .ray_nodes import here
    from .ray_runtime import NAMESPACE, controller_name

    _check_port(spec, CLEAR_TIMEOUT_S if _clear_away(spec.name) else 0.0)
    node_id, node_ip = here()
    options = {
        "name": controller_name(spec.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    try:
        return ray.remote(ControllerShell).options(**options).remote(spec.model_dump_json(), Keyring.new(), node_id, node_ip)
    except BaseException:                                     # a signal may come when it has been started
        if (started := _find_controller(spec.name)) is not None:
            ray.kill(started)
        raise


def _clear_away(name: str) -> int:
    """What a controller that is gone for good has left, and its keys with it. Returns how many members are ended."""
    import ray

    from .ray_runtime import actors_of, remove_placements, remove_stop

    remove_stop(name)
    leftovers = actors_of(name)
    for _, _, leftover in leftovers:
        ray.kill(leftover)
    remove_placements(name)                                   # they may be of another spec
    return len(leftovers)


def _find_controller(name: str) -> Any | None:
    import ray

    from .ray_runtime import NAMESPACE, controller_name

    try:
        return ray.get_actor(controller_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def _answer(reference: Any) -> bytes:
    """Of a member, whose death is no reason to ask again."""
    import ray

    try:
        answer: bytes = ray.get(reference, timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError as error:                  # its GetTimeoutError is one
        raise ClusterError(f"does not answer: {error}") from None
    return answer


def _decode_explanation(encoded: bytes) -> RequestExplanation | None:
    try:
        return msgspec.msgpack.decode(encoded, type=RequestExplanation | None)
    except msgspec.DecodeError as error:
        raise ClusterError(f"runs another version of diptych: {error}") from None


def _ask(method: Any) -> Any:
    """What the controller's `method` returns. One that is being restarted is asked again."""
    import ray

    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            return ray.get(method.remote(), timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"the controller has not answered for {ANSWER_TIMEOUT_S:g} s") from None
        except ray.exceptions.RayError as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError) or time.monotonic() > deadline:
                raise ClusterError(f"the controller cannot answer: {error}") from None
        time.sleep(POLL_S)
