"""Frames between members of one host, over Unix sockets: the sender's own system call wakes the receiver's thread.

    listen, named after one's address ─► accept ─► the right proof ─► frames
    send ─► connect, once a peer ─► refused: it is of another host, or gone
                                 └► into the kernel's buffer ─► full: queued here, sent on when there is room

ZeroMQ gives a frame to a thread of its own, which gives it to one of the receiver's, which wakes the receiver: two wakings more, and
a waking takes as long as all else that happens to a small message. Names live in the network namespace and end with their process,
so nothing is left behind. Both ends must belong to one user, by the kernel's word, and who connects shows that he holds the
cluster's secret.
"""

import hmac
import logging
import os
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from .errors import ClusterError
from .ids import Address

logger = logging.getLogger(__name__)

PROTOCOL: Final = b"1"                        # in the name: members of two versions do not meet here
SIZE: Final = struct.Struct("<I")             # in front of a frame: its bytes
CREDENTIALS: Final = struct.Struct("3i")      # SO_PEERCRED: pid, uid, gid
BACKLOG: Final = 1024
CHUNK_BYTES: Final = 256 << 10
MAX_CHUNKS: Final = 16                        # of one peer at a time; the others' turn is next


@dataclass
class _Outgoing:
    peer: Address
    socket: socket.socket
    queued: deque[memoryview] = field(default_factory=deque)
    awaits_room: bool = False


@dataclass
class _Incoming:
    socket: socket.socket
    proven: bool = False
    unread: bytearray = field(default_factory=bytearray)


class HostWires:
    """Not for several threads. Raises ClusterError if another process has this address's name."""

    def __init__(self, address: Address, public: str, secret: str, max_frame_bytes: int, max_queued: int) -> None:
        self._public, self._secret = public.encode(), secret.encode()
        self._address, self._max_frame_bytes, self._max_queued = address, max_frame_bytes, max_queued
        self._outgoing: dict[Address, _Outgoing] = {}
        self._far: set[Address] = set()       # once refused, so that a peer's frames stay in one order
        self._ends: dict[int, _Outgoing | _Incoming] = {}
        self._num_dropped = 0
        self._epoll = select.epoll()
        self._listener = _unix_socket()
        try:
            self._listener.bind(self._name(address))
        except OSError as error:
            self._listener.close()
            self._epoll.close()
            raise ClusterError(f"cannot listen for peers of this host as {address}: {error}") from None
        self._listener.listen(BACKLOG)
        self._epoll.register(self._listener, select.EPOLLIN | select.EPOLLET)         # or a process out of files would spin

    @property
    def num_dropped(self) -> int:
        """Frames that were too large and connections without the right proof."""
        return self._num_dropped

    def fileno(self) -> int:
        """Readable while `receive` has something to do."""
        return self._epoll.fileno()

    def reaches(self, peer: Address) -> bool:
        """Connects at the first call for a peer; then the answer holds until it is forgotten or has gone."""
        if peer in self._outgoing:
            return True
        if peer in self._far:
            return False
        wire = self._connect(peer)
        if wire is None:
            self._far.add(peer)
            return False
        self._outgoing[peer] = self._ends[wire.socket.fileno()] = wire
        self._epoll.register(wire.socket, 0)                                          # its end is told all the same
        self.send(peer, self._proof(peer))
        return peer in self._outgoing

    def send(self, peer: Address, frame: bytes) -> bool:
        """To a peer that it reaches. False: its queue is full. One that has gone swallows the frame."""
        wire = self._outgoing[peer]
        if len(wire.queued) >= self._max_queued:
            return False
        wire.queued.append(memoryview(SIZE.pack(len(frame)) + frame))
        if len(wire.queued) == 1:
            self._flush(wire)
        return True

    def receive(self) -> list[bytes]:
        """All frames that are here; sends on what is queued."""
        frames: list[bytes] = []
        for fd, events in self._epoll.poll(0):
            end = self._ends.get(fd)
            if isinstance(end, _Incoming):
                frames += self._read(end)
            elif end is None:
                frames += self._accept()
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._lose(end)
            else:
                self._flush(end)
        return frames

    def forget(self, peer: Address) -> None:
        self._far.discard(peer)
        if peer in self._outgoing:
            self._close(self._outgoing.pop(peer))

    def close(self, linger_s: float) -> None:
        """Waits at most `linger_s` for room for what is queued."""
        give_up_at = time.monotonic() + linger_s
        while any(wire.queued for wire in self._outgoing.values()) and (left_s := give_up_at - time.monotonic()) > 0:
            self._epoll.poll(left_s)
            self.receive()
        for end in list(self._ends.values()):
            self._close(end)
        self._listener.close()
        self._epoll.close()

    def _name(self, address: Address) -> bytes:
        return b"\0diptych/" + blake2b(b"/".join((PROTOCOL, self._public, address.encode())), digest_size=16).hexdigest().encode()

    def _proof(self, listener: Address) -> bytes:
        return blake2b(listener.encode(), key=self._secret, digest_size=32).digest()

    def _connect(self, peer: Address) -> _Outgoing | None:
        made = _unix_socket()
        try:
            made.connect(self._name(peer))
        except OSError:
            made.close()
            return None
        if not _is_ours(made):
            made.close()
            return None
        return _Outgoing(peer, made)

    def _accept(self) -> list[bytes]:
        """What those that come have said already."""
        frames: list[bytes] = []
        while True:
            try:
                made, _ = self._listener.accept()
            except BlockingIOError:
                return frames
            except OSError as error:
                logger.warning("cannot accept a peer of this host: %s", error)
                return frames
            if not _is_ours(made):
                self._refuse(made, "of another user")
                continue
            made.setblocking(False)
            self._ends[made.fileno()] = end = _Incoming(made)
            self._epoll.register(made, select.EPOLLIN)
            frames += self._read(end)

    def _read(self, end: _Incoming) -> list[bytes]:
        has_ended = False
        try:
            for _ in range(MAX_CHUNKS):
                chunk = end.socket.recv(CHUNK_BYTES)
                end.unread += chunk
                has_ended = not chunk
                if len(chunk) < CHUNK_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError:
            has_ended = True
        frames = self._frames(end)
        if has_ended:
            self._close(end)
        return frames

    def _frames(self, end: _Incoming) -> list[bytes]:
        """The whole ones, taken out of `end.unread`; who sends no frames of ours is hung up on."""
        frames: list[bytes] = []
        start, stop = 0, len(end.unread)
        while stop - start >= SIZE.size:
            (num_bytes,) = SIZE.unpack_from(end.unread, start)
            if num_bytes > self._max_frame_bytes:
                self._refuse(end, f"with a frame of {num_bytes} bytes; the limit is {self._max_frame_bytes}")
                return frames
            first = start + SIZE.size
            if stop - first < num_bytes:
                break
            frame, start = bytes(end.unread[first : first + num_bytes]), first + num_bytes
            if end.proven:
                frames.append(frame)
            elif hmac.compare_digest(frame, self._proof(self._address)):
                end.proven = True
            else:
                self._refuse(end, "without the cluster's proof")
                return frames
        del end.unread[:start]
        return frames

    def _flush(self, wire: _Outgoing) -> None:
        try:
            while wire.queued:
                sent = wire.socket.send(wire.queued[0])
                if sent < len(wire.queued[0]):
                    wire.queued[0] = wire.queued[0][sent:]
                else:
                    wire.queued.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._lose(wire)
            return
        if wire.awaits_room != bool(wire.queued):
            wire.awaits_room = bool(wire.queued)
            self._epoll.modify(wire.socket, select.EPOLLOUT if wire.awaits_room else 0)

    def _lose(self, wire: _Outgoing) -> None:
        """The peer has gone; what is said to it from now on is ZeroMQ's to swallow."""
        self._close(self._outgoing.pop(wire.peer))
        self._far.add(wire.peer)

    def _refuse(self, end: _Incoming | socket.socket, why: str) -> None:
        self._num_dropped += 1
        logger.warning("hung up on a connection of this host %s (%d dropped so far)", why, self._num_dropped)
        if isinstance(end, _Incoming):
            end.unread.clear()
            self._close(end)
        else:
            end.close()

    def _close(self, end: _Outgoing | _Incoming) -> None:
        if self._ends.pop(end.socket.fileno(), None) is not None:
            self._epoll.unregister(end.socket)
            end.socket.close()


def _unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _is_ours(connected: socket.socket) -> bool:
    _, uid, _ = CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return bool(uid == os.geteuid())
