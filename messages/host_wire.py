"""Frames between members of one host, over Unix sockets: the sender's own system call wakes the receiver's thread.

    listen, named after one's address ─► accept ─────────── hears a nonce, answers with its own and a proof ─► hears a proof ─► frames
    send ─► connect, once a peer ─► says a nonce ─► hears and says a proof ─► into the kernel's buffer ─► full: queued here
                │                      └─ until then all is queued here; no proof in time: given back
                └► refused: it is of another host, or gone

ZeroMQ gives a frame to a thread of its own, which gives it to one of the receiver's, which wakes the receiver: two wakings more, and
a waking takes as long as all else that happens to a small message. For that same reason, some frames may be sent together (`gather`).

Names live in the network namespace and end with the last process that holds them, so nothing is left behind. Anybody there can read
them, connect, and take the name of one who has died. So both ends must belong to one user, by the kernel's word, and each shows that it
holds the cluster's secret, for this connection and this name, before a frame leaves the other. Frames pass through the kernel alone.
"""

import hmac
import logging
import os
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Final

from .errors import ClusterError
from .ids import Address

logger = logging.getLogger(__name__)

PROTOCOL: Final = b"1"                        # in the name: members of two versions do not meet here
SIZE: Final = struct.Struct("<I")             # in front of a frame: its bytes
CREDENTIALS: Final = struct.Struct("3i")      # SO_PEERCRED: pid, uid, gid
NONCE_BYTES, PROOF_BYTES = 16, 32
BACKLOG: Final = 1024
BUFFER_BYTES: Final = 4 << 20                 # of the kernel's, asked for; it gives what it allows
CHUNK_BYTES: Final = 256 << 10
MAX_TOGETHER: Final = 8                       # frames that wait for one another: the next takes a fifth of a millisecond to come
MAX_AT_ONCE: Final = 64                       # frames in a system call
MAX_CHUNKS: Final = 16                        # of one peer at a time; the others' turn is next
MAX_ACCEPTED: Final = 16                      # at a time, and so for connections
MAX_UNPROVEN: Final = 64                      # connections; the oldest gives way
FULL_S: Final = 0.1                           # so long no connection is taken once there are no files left
PROOF_S: Final = 2.0                          # a listener that has said nothing by then is taken for none


@dataclass(eq=False)
class _Outgoing:
    peer: Address
    socket: socket.socket
    nonce: bytes
    due_at: float                             # its proof
    queued: deque[memoryview] = field(default_factory=deque)
    unread: bytearray = field(default_factory=bytearray)
    is_proven: bool = False
    awaits_room: bool = False


@dataclass
class _Incoming:
    socket: socket.socket
    nonces: bytes = b""                       # the caller's and ours; empty: nothing was heard yet
    unread: bytearray = field(default_factory=bytearray)
    is_proven: bool = False


class HostWires:
    """For one thread. If the name is taken it says so and only calls others. Raises ClusterError: the process has no files left."""

    def __init__(
        self, address: Address, public: str, secret: str, max_frame_bytes: int, max_queued: int,
        give_back: Callable[[Address, list[bytes]], None],
    ) -> None:  # fmt: skip
        """`give_back` gets, in order, what was still queued for a peer that has gone or turned out to be none."""
        self._give_back = give_back
        self._public, self._secret = public.encode(), secret.encode()
        self._address, self._max_frame_bytes, self._max_queued = address, max_frame_bytes, max_queued
        self._outgoing: dict[Address, _Outgoing] = {}
        self._far: set[Address] = set()       # once refused, so that a peer's frames stay in one order
        self._ends: dict[int, _Outgoing | _Incoming] = {}
        self._unproven: deque[_Incoming] = deque()
        self._awaited: deque[_Outgoing] = deque()               # whose proof is still due, or was
        self._num_dropped = self._num_refused = 0
        self._deaf_until: float | None = None
        self._due: list[_Outgoing] = []       # of each frame that waits for others, its wire
        self._soon: Callable[[Callable[[], None]], object] | None = None
        try:
            self._epoll = select.epoll()
            self._listener = _unix_socket()
        except OSError as error:
            raise ClusterError(f"cannot talk to members of this host: {error}") from None
        try:
            self._listener.bind(self._name(address))
            self._listener.listen(BACKLOG)
            self._epoll.register(self._listener, select.EPOLLIN)
        except OSError as error:
            self._listener.close()
            logger.warning("members of this host reach %s over ZeroMQ only: %s", address, error)

    @property
    def num_dropped(self) -> int:
        """Frames of members that were too large."""
        return self._num_dropped

    def fileno(self) -> int:
        """Readable while `receive` has something to do."""
        return self._epoll.fileno()

    def reaches(self, peer: Address) -> bool:
        """Connects at the first call for a peer; then the answer holds until it is forgotten or has gone."""
        if peer in self._outgoing:
            return True
        if peer in self._far or self._epoll.closed:
            return False
        wire = self._connect(peer)
        if wire is None:
            self._far.add(peer)
            return False
        self._outgoing[peer] = self._ends[wire.socket.fileno()] = wire
        self._awaited.append(wire)
        return True

    def send(self, peer: Address, frame: bytes) -> bool:
        """To a peer that it reaches. False: its queue is full."""
        wire = self._outgoing[peer]
        if len(wire.queued) >= self._max_queued:
            return False
        wire.queued.append(_framed(frame))
        if not wire.is_proven:
            return True
        self._due.append(wire)
        if self._soon is None or len(self._due) >= MAX_TOGETHER:
            self.flush()
        elif len(self._due) == 1:
            self._soon(self.flush)
        return True

    def gather(self, soon: Callable[[Callable[[], None]], object] | None) -> None:
        """Frames wait for others, MAX_TOGETHER at most, until `soon` calls what it is given or `receive` is called. None: no longer."""
        self._soon = soon
        self.flush()

    def flush(self) -> None:
        due, self._due = self._due, []
        for wire in dict.fromkeys(due):
            if wire.queued and self._outgoing.get(wire.peer) is wire:
                self._flush(wire)

    def expire(self) -> None:
        """To be called now and then: those that have proved nothing in time."""
        while self._awaited and ((wire := self._awaited[0]).is_proven or time.monotonic() >= wire.due_at):
            self._awaited.popleft()
            if not wire.is_proven and self._outgoing.get(wire.peer) is wire:
                self._lose(wire)

    def receive(self) -> list[bytes]:
        """All frames that are here; sends on what is queued."""
        self.flush()
        if self._deaf_until is not None and time.monotonic() >= self._deaf_until:
            self._deaf_until = None
            self._epoll.modify(self._listener, select.EPOLLIN)
        frames: list[bytes] = []
        for fd, events in self._epoll.poll(0):
            end = self._ends.get(fd)
            if isinstance(end, _Incoming):
                frames += self._hear(end)
            elif isinstance(end, _Outgoing):
                self._go_on(end, events)
            elif fd == self._listener.fileno():
                frames += self._accept()
        return frames

    def forget(self, peer: Address) -> None:
        self.flush()
        self._far.discard(peer)
        if peer in self._outgoing:
            self._close(self._outgoing.pop(peer))

    def close(self, linger_s: float) -> None:
        """Waits at most `linger_s` for room for what is queued. Reaches nobody from now on."""
        give_up_at = time.monotonic() + linger_s
        self.flush()
        while any(wire.queued for wire in self._outgoing.values()) and (left_s := give_up_at - time.monotonic()) > 0:
            self._epoll.poll(left_s)
            self.receive()
        for end in list(self._ends.values()):
            self._close(end)
        self._outgoing.clear()
        self._listener.close()
        self._epoll.close()

    def _name(self, address: Address) -> bytes:
        return b"\0diptych/" + blake2b(b"/".join((PROTOCOL, self._public, address.encode())), digest_size=16).hexdigest().encode()

    def _proof(self, who: bytes, nonces: bytes, listener: Address) -> bytes:
        """That `who`, "listener" or "caller", holds the secret, for one connection."""
        return blake2b(b"/".join((who, nonces, listener.encode())), key=self._secret, digest_size=PROOF_BYTES).digest()

    # to others

    def _connect(self, peer: Address) -> _Outgoing | None:
        try:
            made = _unix_socket()
        except OSError:
            return None
        nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            made.connect(self._name(peer))
            if not _is_ours(made):
                raise ConnectionRefusedError
            made.sendall(_framed(nonce))                             # a new connection's buffer has room for it
            self._epoll.register(made, select.EPOLLIN)
        except OSError:
            made.close()
            return None
        return _Outgoing(peer, made, nonce, time.monotonic() + PROOF_S)

    def _go_on(self, wire: _Outgoing, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not self._is_answered(wire):
            self._lose(wire)
        elif wire.is_proven:
            self._flush(wire)

    def _is_answered(self, wire: _Outgoing) -> bool:
        """By the listener's proof, and by no more than that."""
        if _read(wire):
            return False
        try:
            answers = _whole(wire.unread, NONCE_BYTES + PROOF_BYTES)
        except ValueError:
            return False
        for answer in answers:
            nonces, proof = wire.nonce + answer[:NONCE_BYTES], answer[NONCE_BYTES:]
            if wire.is_proven or not hmac.compare_digest(proof, self._proof(b"listener", nonces, wire.peer)):
                return False
            if not _says(wire, self._proof(b"caller", nonces, wire.peer)):
                return False
            wire.is_proven = True
        return True

    def _flush(self, wire: _Outgoing) -> None:
        try:
            while wire.queued:
                sent = wire.socket.sendmsg(islice(wire.queued, MAX_AT_ONCE))
                while wire.queued and sent >= len(wire.queued[0]):
                    sent -= len(wire.queued.popleft())
                if sent:
                    wire.queued[0] = wire.queued[0][sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._lose(wire)
            return
        if wire.awaits_room != bool(wire.queued):
            wire.awaits_room = bool(wire.queued)
            self._epoll.modify(wire.socket, select.EPOLLIN | (select.EPOLLOUT if wire.awaits_room else 0))

    def _lose(self, wire: _Outgoing) -> None:
        """The peer has gone, or is another; what is said to it from now on is ZeroMQ's to bring or to swallow."""
        self._close(self._outgoing.pop(wire.peer))
        self._far.add(wire.peer)
        self._give_back(wire.peer, [bytes(frame.obj)[SIZE.size :] for frame in wire.queued])        # whole, whatever of it has left

    # from others

    def _accept(self) -> list[bytes]:
        """What those that come have said already."""
        frames: list[bytes] = []
        for _ in range(MAX_ACCEPTED):
            try:
                made, _ = self._listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                self._deaf_until = time.monotonic() + FULL_S
                self._epoll.modify(self._listener, 0)
                self._tell(f"cannot take a connection of this host: {error}")
                break
            if not _is_ours(made):
                made.close()
                self._tell("hung up on another user's connection of this host")
                continue
            made.setblocking(False)
            end = _Incoming(made)
            try:
                self._epoll.register(made, select.EPOLLIN)
            except OSError as error:
                made.close()
                self._tell(f"cannot watch a connection of this host: {error}")
                continue
            self._ends[made.fileno()] = end
            self._unproven.append(end)
            if len(self._unproven) > MAX_UNPROVEN:
                self._refuse(self._unproven[0], "that has proved nothing for long")
            frames += self._hear(end)
        return frames

    def _hear(self, end: _Incoming) -> list[bytes]:
        has_ended = _read(end)
        frames: list[bytes] = []
        try:
            for frame in _whole(end.unread, self._max_frame_bytes):
                if end.is_proven:
                    frames.append(frame)
                elif not self._is_introduced(end, frame):
                    self._refuse(end, "without the cluster's proof")
                    return frames
        except ValueError as error:
            self._num_dropped += end.is_proven
            self._refuse(end, f"with {error}")
            return frames
        if not end.is_proven and len(end.unread) > SIZE.size + PROOF_BYTES:
            self._refuse(end, "without the cluster's proof")
        elif has_ended:
            self._close(end)
        return frames

    def _is_introduced(self, end: _Incoming, frame: bytes) -> bool:
        """As far as one frame more of a caller can: first a nonce, which is answered, then the proof."""
        if not end.nonces:
            ours = secrets.token_bytes(NONCE_BYTES)
            end.nonces = frame + ours
            return len(frame) == NONCE_BYTES and _says(end, ours + self._proof(b"listener", end.nonces, self._address))
        end.is_proven = hmac.compare_digest(frame, self._proof(b"caller", end.nonces, self._address))
        if end.is_proven:
            self._unproven.remove(end)
        return end.is_proven

    def _refuse(self, end: _Incoming, why: str) -> None:
        end.unread.clear()
        self._close(end)
        self._tell(f"hung up on a connection of this host {why}")

    def _tell(self, what: str) -> None:
        """At 1, 2, 4, 8, …: whoever may connect must not be able to fill the disk."""
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:
            logger.warning("%s (%d such so far)", what, self._num_refused)

    def _close(self, end: _Outgoing | _Incoming) -> None:
        if self._ends.pop(end.socket.fileno(), None) is None:
            return
        if isinstance(end, _Incoming) and not end.is_proven:
            self._unproven.remove(end)
        self._epoll.unregister(end.socket)
        end.socket.close()


def _framed(frame: bytes) -> memoryview:
    return memoryview(SIZE.pack(len(frame)) + frame)


def _says(end: _Outgoing | _Incoming, frame: bytes) -> bool:
    """All at once: a connection on which nothing but an introduction was said has room for it."""
    whole = _framed(frame)
    try:
        return end.socket.send(whole) == len(whole)
    except OSError:
        return False


def _read(end: _Outgoing | _Incoming) -> bool:
    """What is there, into `unread`; True: and the peer has ended."""
    try:
        for _ in range(MAX_CHUNKS):
            chunk = end.socket.recv(CHUNK_BYTES)
            end.unread += chunk
            if len(chunk) < CHUNK_BYTES:
                return not chunk
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def _whole(unread: bytearray, max_bytes: int) -> list[bytes]:
    """The frames that are there, taken out. Raises ValueError for one that is too large."""
    frames: list[bytes] = []
    start = 0
    while len(unread) - start >= SIZE.size:
        (num_bytes,) = SIZE.unpack_from(unread, start)
        if num_bytes > max_bytes:
            raise ValueError(f"a frame of {num_bytes} bytes; the limit is {max_bytes}")
        first = start + SIZE.size
        if len(unread) - first < num_bytes:
            break
        start = first + num_bytes
        frames.append(bytes(unread[first:start]))
    del unread[:start]
    return frames


def _unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return made


def _is_ours(connected: socket.socket) -> bool:
    _, uid, _ = CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return bool(uid == os.geteuid())
