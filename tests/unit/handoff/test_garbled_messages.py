"""One field of a handoff's message is wrong, as a peer of another version might have it: no worker ends for it, and its books stay right.

Whether the tokens are right cannot be asked then: who names other blocks gets his pages there. What gateways and engines tell (tokens,
sampling) is not garbled: workers rely on it.
"""

import random
import types
import typing
from collections.abc import Callable
from enum import Enum

import msgspec
from harness.fake_cluster import FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.messages import handoff
from diptych.messages.codec import Message
from diptych.messages.handoff import KVLanded, Ticket
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, TokenDelta, WorkerRef

KINDS: tuple[type[msgspec.Struct], ...] = tuple(kind for kind in typing.get_args(Message) if kind.__module__ == handoff.__name__)
RELIED_ON = (GenerateRequest, TokenDelta)
INTEGERS = [-1, 0, 1, 2, 13, 14, 4096, 2**63]


class Garbler:
    """Values of a type, drawn with one seed; what names something mostly names something real."""

    def __init__(self, choose: random.Random, cluster: FakeCluster) -> None:
        self._choose = choose
        refs = [worker.ref for worker in cluster.workers.values()]
        self._values: dict[object, Callable[[], object]] = {
            int: lambda: choose.choice(INTEGERS),
            str: lambda: choose.choice(["", "fake", "layout"]),
            bytes: lambda: choose.choice([b"", b"x", bytes(16)]),
            RequestId: lambda: choose.choice([RequestId("none"), *cluster.answers]),
            WorkerId: lambda: choose.choice([WorkerId("none"), *cluster.workers]),
            Address: lambda: choose.choice([ref.address for ref in refs]),
            Epoch: lambda: choose.choice([Epoch(0), *(ref.epoch for ref in refs), Epoch(99)]),
            WorkerRef: lambda: choose.choice(refs),
        }

    def garbled(self, message: msgspec.Struct) -> msgspec.Struct:
        hints = typing.get_type_hints(type(message))
        name = self._choose.choice([name for name, hint in hints.items() if hint not in RELIED_ON])
        old = getattr(message, name)
        return msgspec.structs.replace(message, **{name: self._another(old, hints[name])})

    def _another(self, old: object, hint: object) -> object:
        """Of what has parts, mostly with one of them wrong."""
        if isinstance(old, Ticket):
            return self.garbled(old)
        if isinstance(old, tuple) and old and self._choose.random() < 0.8:
            index = self._choose.randrange(len(old))
            return (*old[:index], self.value(typing.get_args(hint)[0]), *old[index + 1 :])
        return self.value(hint)

    def value(self, hint: object) -> object:
        if hint in self._values:
            return self._values[hint]()
        if isinstance(hint, typing.NewType):
            return self.value(hint.__supertype__)
        if typing.get_origin(hint) is tuple:
            return tuple(self.value(typing.get_args(hint)[0]) for _ in range(self._choose.choice([0, 1, 2, 5])))
        if isinstance(hint, types.UnionType):
            return self.value(self._choose.choice(typing.get_args(hint)))
        if isinstance(hint, type) and issubclass(hint, Enum):
            return self._choose.choice(list(hint))
        assert isinstance(hint, type)
        return hint(**{name: self.value(each) for name, each in typing.get_type_hints(hint).items()})


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_no_worker_ends_for_a_message_with_a_wrong_field(seed: int) -> None:
    choose = random.Random(seed)
    cluster = FakeCluster(num_blocks=14)
    garbler = Garbler(choose, cluster)
    for _ in range(150):
        letters = cluster.network.in_flight
        handoffs = [letter for letter in letters if isinstance(letter.message, KINDS)]
        match choose.choices(["submit", "garble", "deliver", "land", "turn"], [10, 25, 25, 10, 30])[0]:
            case "submit" if len(cluster.answers) < 6:
                cluster.submit([choose.randrange(900) for _ in range(choose.randint(1, 20))], choose.randint(2, 5))
            case "garble" if handoffs:
                letter = choose.choice(handoffs)
                cluster.gateway.send(letter.to, garbler.garbled(letter.message))
            case "deliver" if letters:
                cluster.network.deliver(choose.randrange(len(letters)))
            case "land" if cluster.fabric.in_flight:
                cluster.fabric.land()
            case "turn":
                cluster.gateway.receive(0)
                for worker in cluster.workers.values():
                    worker.turn(0.0)
                cluster.now += choose.choice([0.001, 0.1, 3.0])
        for worker in cluster.workers.values():
            pool = worker.engine.pool
            assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks


def test_all_that_a_handoff_says_is_garbled() -> None:
    assert KVLanded in KINDS
    assert len(KINDS) == 12
