"""What a worker takes of its host, and whether the hosts have it. Values in, values out; Ray's resources are plain dicts here.

    spec, hosts ──► reserving_order()      worker places, in the order in which to ask for room
         ──► bundle_of(pool)       what one of them reserves: its ranks' GPUs, or their threads' CPUs, all of one host
         ──► actor_options(pool)   what its actor takes of that
    spec, hosts ──► what_is_missing()      before anything starts
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .places import PlaceKind, PlaceName, gpus_each, num_gpus, places_of, pool_of
from .spec import Device, Hosts, PoolSpec, Spec

CPUS_PER_ACTOR = 0.01
"""Ray counts CPUs to place actors and does not bind them; the spec's num_threads says what a rank uses. Where there are hosts to choose
from, that is what a place on a CPU takes."""

A_LITTLE = 0.001                              # of a resource that hosts offer to be told apart by

Offer = Mapping[str, float]
"""A host's resources, as Ray counts them."""


def bundle_of(spec: Spec, pool: PoolSpec, node_ip: str) -> dict[str, float]:
    """What a worker's host must have. `node_ip`: the controller's host's."""
    num = gpus_each(spec, pool)
    gpus = {"GPU": float(num)} if num else {}
    if spec.hosts is Hosts.ONE:
        return {"CPU": CPUS_PER_ACTOR, f"node:{node_ip}": A_LITTLE, **gpus}
    node = {pool.node: A_LITTLE} if pool.node is not None else {}
    return {"CPU": CPUS_PER_ACTOR if gpus else float(_cpus_each(pool)), **node, **gpus}


def actor_options(spec: Spec, pool: PoolSpec) -> dict[str, Any]:
    return {"num_cpus": CPUS_PER_ACTOR, "num_gpus": gpus_each(spec, pool)}


def reserving_order(spec: Spec, offers: Sequence[Offer]) -> list[PlaceName]:
    """Those that fewest hosts will do for come first, then those that take most of one: Ray spreads the small, and then no host has room
    for the large any more."""

    def key(place: PlaceName) -> tuple[int, int, PlaceName]:
        pool = pool_of(spec, place.kind)
        return len(_fitting(pool, offers)), -(gpus_each(spec, pool) or _cpus_each(pool)), place

    return sorted((place for place in places_of(spec) if place.kind is not PlaceKind.GATEWAY), key=key)


def what_is_missing(spec: Spec, offers: Sequence[Offer]) -> str:
    """The first thing that the hosts lack, empty if all workers find room. `offers`: the controller's host's alone, if not `hosts: any`."""
    if problem := _too_few_gpus(spec, offers):
        return problem
    if spec.hosts is Hosts.ONE:
        return _too_few_cpus(spec, offers)
    problems = [_pool_problem(spec, name, pool, offers) for name, pool in spec.pools.by_name.items()]
    return next(filter(None, problems), "") or _crowded(spec, offers)


def _too_few_gpus(spec: Spec, offers: Sequence[Offer]) -> str:
    needed, there = num_gpus(spec), sum(_whole(each, "GPU") for each in offers)
    if needed <= there:
        return ""
    whose = "this Ray cluster" if spec.hosts is Hosts.ANY else "this host"
    each = ", ".join(f"{name} {pool.workers} × {pool.tp}" for name, pool in spec.pools.by_name.items())
    return f"model.device: cuda: the workers need {needed} GPU(s), {each}; {whose} has {there}"


def _too_few_cpus(spec: Spec, offers: Sequence[Offer]) -> str:
    """To place actors by. Of one host."""
    num = sum(pool.workers for pool in spec.pools.by_name.values())
    if (there := sum(each.get("CPU", 0.0) for each in offers)) >= num * CPUS_PER_ACTOR:
        return ""
    return f"hosts: one: Ray has {there:g} CPUs to give on this host, and {num} worker(s) take {num * CPUS_PER_ACTOR:g} (`--num-cpus`)"


def _pool_problem(spec: Spec, name: str, pool: PoolSpec, offers: Sequence[Offer]) -> str:
    fitting = _fitting(pool, offers)
    if not fitting:
        return f"pools.{name}.node: none of the {len(offers)} hosts of this Ray cluster offers {pool.node!r}"
    if spec.model.device is Device.CUDA:
        if pool.workers <= (room := _room(fitting, pool.tp)):
            return ""
        where = "this Ray cluster has" if pool.node is None else f"the hosts that offer {pool.node!r} have"
        return f"pools.{name}.workers: {pool.workers} need {pool.tp} GPU(s) of one host each, and {where} room for {room}"
    if _cpus_each(pool) <= (most := max(_whole(each, "CPU") for each in fitting)):
        return ""
    threads = f"{pool.num_threads}" if pool.tp == 1 else f"{pool.num_threads} for each of {pool.tp} ranks"
    return f"pools.{name}.num_threads: {threads}, but no host has more than {most} CPUs that Ray may give"


def _crowded(spec: Spec, offers: Sequence[Offer]) -> str:
    """Each pool has room, but perhaps not beside the other. Exact, since one's tp is a multiple of the other's: whichever host that both
    may have a wide worker takes, it costs the narrow ones as much room."""
    if spec.model.device is Device.CPU or spec.pools.prefill is None:
        return ""
    (wide_name, wide), (name, narrow) = sorted(spec.pools.by_name.items(), key=lambda item: -item[1].tp)
    elsewhere = [each for each in _fitting(wide, offers) if each not in _fitting(narrow, offers)]
    num_beside = max(0, wide.workers - _room(elsewhere, wide.tp))
    room = _room(_fitting(narrow, offers), narrow.tp) - num_beside * wide.tp // narrow.tp
    if narrow.workers <= room:
        return ""
    asked = f"{narrow.workers} need {narrow.tp} GPU(s) of one host each"
    return f"pools.{name}.workers: {asked}; beside pools.{wide_name} there is room for {room}"


def _fitting(pool: PoolSpec, offers: Sequence[Offer]) -> list[Offer]:
    return [each for each in offers if pool.node is None or pool.node in each]


def _room(offers: Sequence[Offer], num_gpus: int) -> int:
    """Workers of so many GPUs."""
    return sum(_whole(each, "GPU") // num_gpus for each in offers)


def _cpus_each(pool: PoolSpec) -> int:
    return pool.num_threads * pool.tp


def _whole(offer: Offer, resource: str) -> int:
    return int(offer.get(resource, 0))
