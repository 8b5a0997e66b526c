"""Post over ZeroMQ: the one place that knows it.

A ROUTER socket is bound for all that comes in; a DEALER per peer carries what goes out. Both ends authenticate with CURVE: the
cluster has one key pair, made and handed out by the controller. A socket that does not hold the secret key can neither connect nor
be connected to.
"""

import logging
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from .codec import MAX_FRAME_BYTES, Message, decode, encode
from .errors import ClusterError, Malformed, WireError
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
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=_OnlyOurs(keyring.public))
        self._inbox = self._socket(zmq.ROUTER)
        self._inbox.curve_server = True
        self._inbox.maxmsgsize = MAX_RAW_BYTES
        self._outboxes: dict[Address, zmq.Socket[bytes]] = {}
        self._leavers = Leavers()
        self._num_dropped = 0
        try:
            self._inbox.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise ClusterError(f"cannot listen on {host}:{port}: {error}") from None
        endpoint = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._address = Address(f"tcp://{host}:{endpoint.rsplit(':', 1)[1]}")

    @property
    def address(self) -> Address:
        return self._address

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def fileno(self) -> int:
        """Becomes readable, edge-triggered, when messages may be here: then call `receive(0)`."""
        return int(self._inbox.fd)

    def send(self, to: Address, message: Message) -> None:
        frame = encode(message)
        if to in self._leavers:                        # or a late word would open a socket again that nobody closes
            return
        try:
            self._outbox(to).send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self._drop(f"{type(message).__name__} to {to}: {MAX_QUEUED_MESSAGES} messages are queued already")
        except zmq.ZMQError as error:                  # an address that a peer sent us need not be one
            self._drop(f"{type(message).__name__} to {to!r}: {error}")

    def receive(self, timeout_s: float) -> list[Message]:
        received: list[Message] = []
        if timeout_s > 0 and not self._inbox.poll(round(timeout_s * 1000)):
            return received
        while True:
            try:
                frames = self._inbox.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return received
            try:
                received.append(decode(_only_frame(frames)))
            except WireError as error:
                self._drop(str(error))

    def forget(self, peer: Address) -> None:
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            outbox.close(linger=0)

    def update_members(self, members: AbstractSet[Address]) -> None:
        for peer in self._leavers.update(members):
            self.forget(peer)

    def close(self) -> None:
        for peer in list(self._outboxes):
            self._outboxes.pop(peer).close(linger=LINGER_MS)
        self._inbox.close(linger=0)
        self._authenticator.stop()
        self._context.term()

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


def _only_frame(frames: list[bytes]) -> bytes:
    """ROUTER puts the sender's routing id in front of the one frame that a message has."""
    if len(frames) != 2:
        raise Malformed(f"message of {len(frames) - 1} frames")
    return frames[1]
