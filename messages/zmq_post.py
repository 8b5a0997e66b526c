"""Post over ZeroMQ: the one place that knows it.

    send ─► a peer of this host: a Unix socket (host_wire) ─┐
         └► any other: a DEALER of its own ─► its ROUTER ───┴─► receive

A ROUTER socket is bound for all that comes in; a DEALER per peer carries what goes out. Both ends authenticate with CURVE: the
cluster has one key pair, made and handed out by the controller. A socket that does not hold the secret key can neither connect nor
be connected to; nor can one of this host's.
"""

import logging
import select
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from typing import Final

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from .codec import MAX_FRAME_BYTES, Message, decode, encode
from .errors import ClusterError, WireError
from .host_wire import HostWires
from .ids import Address
from .post import Leavers

logger = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES: Final = 100_000
LINGER_MS: Final = 200          # for the last words of a member that leaves in order
MAX_RAW_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Over this ZeroMQ hangs up before it takes the memory. Up to it `decode` refuses, and counts; CURVE adds some bytes to a frame, too."""


class Keyring(msgspec.Struct, frozen=True):
    """The cluster's CURVE key pair, Z85 text."""

    public: str
    secret: str

    @staticmethod
    def new() -> "Keyring":
        public, secret = zmq.curve_keypair()
        return Keyring(public.decode(), secret.decode())

    def __repr__(self) -> str:
        return f"Keyring({self.public})"


class _OnlyOurs:
    """ZAP credentials: the cluster's own public key and no other."""

    def __init__(self, public: str) -> None:
        self._public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class ZmqPost:
    """`host` is the interface to listen on and the name under which peers reach it. Raises ClusterError if it cannot be bound."""

    def __init__(self, keyring: Keyring, host: str = "127.0.0.1", port: int = 0) -> None:
        self._keyring = keyring
        self._outboxes: dict[Address, zmq.Socket[bytes]] = {}
        self._leavers = Leavers()
        self._num_dropped = 0
        with ExitStack() as opened:
            self._context = zmq.Context()
            opened.callback(self._context.term)
            self._inbox = self._bound(opened, host, port)
            endpoint = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
            self._address = Address(f"tcp://{host}:{endpoint.rsplit(':', 1)[1]}")
            self._wires = HostWires(self._address, keyring.public, keyring.secret, MAX_RAW_BYTES, MAX_QUEUED_MESSAGES, self._send_far)
            opened.callback(self._close_outboxes)                  # after the wires, which may give messages back
            opened.callback(self._wires.close, LINGER_MS / 1e3)
            self._sources = opened.enter_context(select.epoll())
            for source in (int(self._inbox.fd), self._wires.fileno()):
                self._sources.register(source, select.EPOLLIN)
            self._opened = opened.pop_all()

    def _bound(self, opened: ExitStack, host: str, port: int) -> "zmq.Socket[bytes]":
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        opened.callback(authenticator.stop)
        authenticator.configure_curve_callback(domain="*", credentials_provider=_OnlyOurs(self._keyring.public))
        inbox = self._socket(zmq.ROUTER)
        opened.callback(inbox.close, linger=0)
        inbox.curve_server = True
        inbox.maxmsgsize = MAX_RAW_BYTES
        try:
            inbox.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise ClusterError(f"cannot listen on {host}:{port}: {error}") from None
        return inbox

    @property
    def address(self) -> Address:
        return self._address

    @property
    def num_dropped(self) -> int:
        return self._num_dropped + self._wires.num_dropped

    def fileno(self) -> int:
        """Readable while messages may be here: then call `receive(0)`."""
        return self._sources.fileno()

    def send(self, to: Address, message: Message) -> None:
        frame = encode(message)
        if to in self._leavers:                        # or a late word would open a socket again that nobody closes
            return
        try:
            if not self._wires.reaches(to):
                self._outbox(to).send(frame, zmq.NOBLOCK)
            elif not self._wires.send(to, frame):
                raise zmq.Again
        except zmq.ZMQError as error:                  # an address that a peer sent us need not be one
            self._unsent(type(message).__name__, to, error)

    def receive(self, timeout_s: float) -> list[Message]:
        give_up_at = time.monotonic() + timeout_s
        received = self._take(timeout_s)
        while not received and (left_s := round(give_up_at - time.monotonic(), 3)) > 0:       # what woke us was no message: a handshake
            received = self._take(left_s)
        return received

    def _take(self, timeout_s: float) -> list[Message]:
        self._wires.expire()
        self._wires.flush()
        received: list[Message] = []
        for source, _ in self._sources.poll(round(timeout_s, 3)):                   # or a fraction of a millisecond would be a whole one
            for frame in self._wires.receive() if source == self._wires.fileno() else self._arrived():
                try:
                    received.append(decode(frame))
                except WireError as error:
                    self._drop(str(error))
        return received

    def gather(self, soon: Callable[[Callable[[], None]], object] | None) -> None:
        """For a loop, whose `soon` is called before it waits: what is said to members of this host meanwhile leaves together."""
        self._wires.gather(soon)

    def forget(self, peer: Address) -> None:
        self._wires.forget(peer)
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            outbox.close(linger=0)

    def update_members(self, members: AbstractSet[Address]) -> None:
        for peer in self._leavers.update(members):
            self.forget(peer)

    def close(self) -> None:
        self._opened.close()

    def _close_outboxes(self) -> None:
        for peer in list(self._outboxes):
            self._outboxes.pop(peer).close(linger=LINGER_MS)

    def _arrived(self) -> Iterator[bytes]:
        """All that ZeroMQ has: its descriptor tells of news, not of what was left."""
        while True:
            try:
                frames = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:                       # ROUTER puts the sender's routing id in front of the one that a message has
                yield frames[1]
            else:
                self._drop(f"message of {len(frames) - 1} frames")

    def _send_far(self, to: Address, frames: list[bytes]) -> None:
        """What was still queued for a peer of this host that has gone, or turned out to be none."""
        for frame in frames:
            try:
                self._outbox(to).send(frame, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                self._unsent("a message", to, error)

    def _unsent(self, what: str, to: Address, error: zmq.ZMQError) -> None:
        if isinstance(error, zmq.Again):
            self._drop(f"{what} to {to}: {MAX_QUEUED_MESSAGES} messages are queued already")
        else:
            self._wires.forget(to)
            self._drop(f"{what} to {to!r}: {error}")

    def _outbox(self, peer: Address) -> "zmq.Socket[bytes]":
        if peer not in self._outboxes:
            outbox = self._socket(zmq.DEALER)
            outbox.curve_serverkey = self._keyring.public.encode()
            try:
                outbox.connect(peer)
            except zmq.ZMQError:
                outbox.close(linger=0)
                raise
            self._outboxes[peer] = outbox
        return self._outboxes[peer]

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        made = self._context.socket(kind)
        made.curve_publickey = self._keyring.public.encode()
        made.curve_secretkey = self._keyring.secret.encode()
        made.sndhwm = made.rcvhwm = MAX_QUEUED_MESSAGES
        made.setsockopt(zmq.RECONNECT_IVL, 20)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        return made

    def _drop(self, why: str) -> None:
        """Counted always; told at 1, 2, 4, 8, … so that a flood does not fill the disk."""
        self._num_dropped += 1
        if self._num_dropped & (self._num_dropped - 1) == 0:
            logger.warning("dropped %s (%d so far)", why, self._num_dropped)
