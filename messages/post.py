"""How members send each other messages: an address book of mailboxes. `zmq_post` is the real one, `fake_post` a virtual network.

A Post has one address, at which everybody sends to it. Sending never blocks and never promises delivery: a peer that is gone
swallows messages. Whoever waits for an answer has a deadline. Members receive all the time: what a first message or a burst leaves queued
is sent on meanwhile.
"""

from collections.abc import Set as AbstractSet
from typing import Protocol

from .codec import Message
from .ids import Address


class Leavers:
    """Who was a member once and is none any more; a few bytes for each, for ever."""

    def __init__(self) -> None:
        self._members: AbstractSet[Address] = frozenset()
        self._left: set[Address] = set()

    def __contains__(self, peer: Address) -> bool:
        return peer in self._left

    def update(self, members: AbstractSet[Address]) -> AbstractSet[Address]:
        """Those that have left just now."""
        gone = self._members - members
        self._left = (self._left | gone) - members
        self._members = frozenset(members)
        return gone


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

    def update_members(self, members: AbstractSet[Address]) -> None:
        """Forgets who was a member and is none any more, and drops all that is sent there, until it is named again."""
        ...

    def close(self) -> None: ...
