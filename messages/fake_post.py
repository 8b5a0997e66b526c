"""A network in one process: messages wait in flight until the test (or the simulator) delivers, drops, doubles, delays or reorders them.

Every message takes the way through the codec, so that what the fake carries the real wire carries too.
"""

from collections import defaultdict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from .codec import Message, decode, encode
from .ids import Address
from .post import Leavers


@dataclass(frozen=True)
class InFlight:
    sender: Address
    to: Address
    frame: bytes

    @property
    def message(self) -> Message:
        return decode(self.frame)


@dataclass
class FakeNetwork:
    in_flight: list[InFlight] = field(default_factory=list)
    mailboxes: dict[Address, list[Message]] = field(default_factory=lambda: defaultdict(list))
    gone: set[Address] = field(default_factory=set)

    def post(self, name: str) -> "FakePost":
        return FakePost(self, Address(f"fake://{name}"))

    def deliver(self, index: int = 0) -> None:
        """Moves one message from flight into its mailbox; a dead addressee swallows it."""
        letter = self.in_flight.pop(index)
        if letter.to not in self.gone:
            self.mailboxes[letter.to].append(letter.message)

    def deliver_all(self) -> None:
        while self.in_flight:
            self.deliver()

    def drop(self, index: int = 0) -> InFlight:
        return self.in_flight.pop(index)

    def double(self, index: int = 0) -> None:
        self.in_flight.append(self.in_flight[index])

    def kill(self, address: Address) -> None:
        """The member is gone with all that it had not read."""
        self.gone.add(address)
        self.mailboxes.pop(address, None)


@dataclass
class FakePost:
    network: FakeNetwork
    address: Address
    num_dropped: int = 0
    leavers: Leavers = field(default_factory=Leavers)

    def send(self, to: Address, message: Message) -> None:
        if self.address not in self.network.gone and to not in self.leavers:
            self.network.in_flight.append(InFlight(self.address, to, encode(message)))

    def receive(self, timeout_s: float) -> list[Message]:
        return self.network.mailboxes.pop(self.address, [])

    def forget(self, peer: Address) -> None:
        ours = (self.address, peer)
        self.network.in_flight = [letter for letter in self.network.in_flight if (letter.sender, letter.to) != ours]

    def update_members(self, members: AbstractSet[Address]) -> None:
        for peer in self.leavers.update(members):
            self.forget(peer)

    def close(self) -> None:
        self.network.kill(self.address)
