"""Hosts of a Ray cluster, beyond the controller's own: where a process stands, and whether it is still there.

    controller ── own host ─────► the process table
               └─ another one ──► a Warden there, which looks into its own ──► gone, or not; unknown until it has answered

A host that Ray has given up counts as gone with all of its processes, though some may go on for a while (behind a cut cable, or until a
raylet that hangs is ended). They are strangers by then: each receiver on another host has fenced a writer's link for good before it uses
the blocks again, and what they say is of lives that are listed nowhere.
"""

import logging
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .hosts import Offer
from .processes import Standing, find_process, is_dead, kill
from .spec import Hosts, Spec

logger = logging.getLogger(__name__)


def here() -> Standing:
    node_id = ray.get_runtime_context().get_node_id()
    return Standing(node_id, next(node["NodeManagerAddress"] for node in _nodes() if node["NodeID"] == node_id))


def look(pid: int, began_s: float, end_it: bool) -> bool:
    """Whether that process is gone from this host. With `end_it` one that is not is sent SIGKILL."""
    running = find_process(pid, began_s)
    if running is None or is_dead(running):
        return True
    if end_it:
        kill(running)
    return False


class Warden:
    """An actor, one a host; it goes with the controller that has started it."""

    def look(self, pid: int, began_s: float, end_it: bool) -> bool:
        return look(pid, began_s, end_it)


class Nodes:
    """The process tables of all hosts. Never waits."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._make_warden = ray.remote(Warden)
        self._wardens: dict[str, Any] = {}                       # by node: ray.actor.ActorHandle
        self._asked: dict[tuple[str, int, float], Any] = {}      # ObjectRef of the look under way

    def is_gone(self, node_id: str, pid: int, began_s: float, end_it: bool) -> bool:
        """False, too, while nobody knows: to be asked again. An empty `node_id` is the controller's own."""
        if node_id in ("", self._own):
            return look(pid, began_s, end_it)
        key = (node_id, pid, began_s)
        if key not in self._asked:
            self._asked[key] = self._warden(node_id).look.remote(pid, began_s, end_it)
        answer = self._asked[key]
        if not ray.wait([answer], timeout=0)[0]:
            return False
        del self._asked[key]
        try:
            return bool(ray.get(answer))
        except RayTaskError:
            logger.exception("the warden of node %s cannot look for process %d", node_id, pid)
            return False
        except RayError as error:
            self._wardens.pop(node_id, None)
            if _is_alive(node_id):
                return False
            logger.warning("node %s has gone, and process %d with it: %s", node_id, pid, type(error).__name__)
            return True

    def _warden(self, node_id: str) -> Any:
        if node_id not in self._wardens:
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._wardens[node_id] = self._make_warden.options(num_cpus=0, scheduling_strategy=there).remote()
        return self._wardens[node_id]


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in _nodes())


def offers(spec: Spec) -> list[Offer]:
    """Of the hosts on which workers may stand."""
    own = ray.get_runtime_context().get_node_id()
    return [node["Resources"] for node in _nodes() if node["Alive"] and (spec.hosts is Hosts.ANY or node["NodeID"] == own)]


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes
