"""Policies by name, as the spec gives them. Today's pick each pool's worker apart; a policy over pairs implements `Policy` itself."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from ...messages.errors import SpecError
from ...messages.requests import Route
from .goodput import Goodput, GoodputOptions
from .pickers import LeastLoaded, LoadKey, Picker, PowerOfTwo, Random, RoundRobin, decode_load, prefill_load
from .policy import ClusterView, Decision, Explanation, Policy, Queue, Refuse, RoutingRequest, WorkerLoad, prefill_pool, what_is_missing
from .prefix_aware import PrefixAware

RETRY_AFTER_S = 1.0


class PolicyOptions(Struct, frozen=True):
    local_path: bool = False                  # decode workers prefill by themselves, even if there are prefill workers
    max_requests_per_worker: int = 1024       # a pool whose workers all have so many refuses
    seed: int = 0                             # of policies that draw
    serves_late: bool = False                 # goodput: what cannot keep its objectives is served late instead of refused


class PerPool:
    """One picker for each pool; the local path where there is no prefill worker, or where it is asked for."""

    def __init__(self, prefill: Picker, decode: Picker, options: PolicyOptions) -> None:
        self._prefill = prefill
        self._decode = decode
        self._options = options

    def choose(self, request: RoutingRequest, view: ClusterView, now: float) -> Decision:
        prefill = prefill_pool(request, view, self._options.local_path)
        if (missing := what_is_missing(request, view)) is not None:
            return Queue(missing)
        for name, pool in (("decode", view.decode), ("prefill", prefill)):
            if pool and not self._below_limit(pool):
                limit = self._options.max_requests_per_worker
                return Refuse(f"each of {len(pool)} {name} workers has {limit} requests or more", RETRY_AFTER_S)
        decode = self._decode.pick(request, self._candidates(request, view.decode)).ref
        if not prefill:
            return Route(decode=decode)
        return Route(decode=decode, prefill=self._prefill.pick(request, self._candidates(request, prefill)).ref)

    def decide(self, request: RoutingRequest, view: ClusterView, now: float) -> Explanation:
        return Explanation(self.choose(request, view, now))

    def _below_limit(self, pool: Sequence[WorkerLoad]) -> list[WorkerLoad]:
        return [worker for worker in pool if worker.num_requests < self._options.max_requests_per_worker]

    def _candidates(self, request: RoutingRequest, pool: Sequence[WorkerLoad]) -> list[WorkerLoad]:
        below = self._below_limit(pool)
        return [worker for worker in below if worker.ref not in request.avoid] or below


def _per_pool(make: Callable[[LoadKey, int], Picker]) -> Callable[[PolicyOptions], Policy]:
    return lambda options: PerPool(make(prefill_load, options.seed), make(decode_load, options.seed + 1), options)


POLICIES: dict[str, Callable[[PolicyOptions], Policy]] = {
    "round_robin": _per_pool(lambda load, seed: RoundRobin()),
    "random": _per_pool(lambda load, seed: Random(seed)),
    "least_loaded": _per_pool(lambda load, seed: LeastLoaded(load)),
    "power_of_two": _per_pool(lambda load, seed: PowerOfTwo(load, seed)),
    "prefix_aware": _per_pool(lambda load, seed: PrefixAware(load)),
    "goodput": lambda options: Goodput(
        GoodputOptions(options.local_path, options.max_requests_per_worker, options.serves_late, options.seed)
    ),
}


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """Raises SpecError for a name that is none of POLICIES."""
    if name not in POLICIES:
        raise SpecError(f"router.policy: {name!r} is unknown; known: {', '.join(POLICIES)}")
    return POLICIES[name](options)
