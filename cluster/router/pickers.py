"""Ways to pick one worker of one pool. Each pool has a picker of its own, so that no state is shared between prefill and decode."""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from .policy import RoutingRequest, WorkerLoad

LoadKey = Callable[[WorkerLoad], tuple[float, float]]


def prefill_load(worker: WorkerLoad) -> tuple[float, float]:
    """What a prompt waits for: the prompt tokens before it."""
    return worker.num_waiting_tokens, worker.num_requests


def decode_load(worker: WorkerLoad) -> tuple[float, float]:
    """What a sequence competes for: KV memory, then a place in the step."""
    return worker.used_share, worker.num_requests


class Picker(Protocol):
    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        """One of `workers`, which is not empty."""
        ...


class RoundRobin:
    def __init__(self) -> None:
        self._turn = 0

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        self._turn += 1
        return workers[(self._turn - 1) % len(workers)]


class Random:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        return self._random.choice(workers)


class LeastLoaded:
    def __init__(self, load: LoadKey) -> None:
        self._load = load

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        return min(workers, key=self._load)


class PowerOfTwo:
    """The less loaded of two drawn at random: gateways that share a stale snapshot do not all run to the same worker.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """

    def __init__(self, load: LoadKey, seed: int) -> None:
        self._load = load
        self._random = random.Random(seed)

    def pick(self, request: RoutingRequest, workers: Sequence[WorkerLoad]) -> WorkerLoad:
        return min(self._random.sample(workers, min(2, len(workers))), key=self._load)
