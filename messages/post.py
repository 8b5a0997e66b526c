"""How members send each other messages: an address book of mailboxes. `zmq_post` is the real one, `fake_post` a virtual network.

A Post has one address, at which everybody sends to it. Sending never blocks and never promises delivery: a peer that is gone
swallows messages. Whoever waits for an answer has a deadline.
"""

from typing import Protocol

from .codec import Message
from .ids import Address


class Post(Protocol):
    @property
    def address(self) -> Address:
        """Where others reach this member."""
        ...

    @property
    def num_dropped(self) -> int:
        """Frames dropped so far: malformed, too large, or for a peer whose queue is full."""
        ...

    def send(self, to: Address, message: Message) -> None:
        """Queues `message`; drops it, counted, if the peer's queue is full. Raises TooLarge."""
        ...

    def receive(self, timeout_s: float) -> list[Message]:
        """All messages that are here, waiting at most `timeout_s` for the first."""
        ...

    def forget(self, peer: Address) -> None:
        """Drops what is queued for a peer that will not come back."""
        ...

    def close(self) -> None: ...
