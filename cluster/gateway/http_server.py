"""HTTP on a listening socket: connections come and go; when it is told to stop, those that are being answered may finish.

    serve() ──► accept … ──► stop() ──► no new connections, idle ones closed ──► the rest end, within grace_s, or are cut ──► it returns

    of open connections:   ──► max_connections: served ──► SPARE more: one answer each, by `turn_away` ──► the others wait unaccepted

It accepts by itself, not through the loop's server: that one can neither be told to pause nor does it when there are no files left, but
asks the kernel without end.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import NamedTuple

from .connection import Connection, Handler
from .eager import start
from .outbox import Outbox

CHECK_S = 1.0
SPARE = 64
"""Connections over the limit at a time that are told so."""

ACCEPTS = 64
"""In one turn of the loop: streams that run must not wait for more."""

logger = logging.getLogger(__name__)


class Doors(NamedTuple):
    handle: Handler
    turn_away: Handler                        # the same, of connections over the limit
    max_connections: int
    grace_s: float                            # for open answers at the end
    outbox: Outbox                            # of all connections


class HttpServer:
    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._connections: set[Connection] = set()
        self._served: set[Connection] = set()                 # of them, those within the limit
        self._stopping = asyncio.Event()
        self._empty = asyncio.Event()
        self._listening: socket.socket | None = None          # while it serves
        self._accepting = False
        self._said_full = False               # since the last check

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def stop(self) -> None:
        """In the loop; `serve` returns soon."""
        self._stopping.set()

    async def serve(self, listening: socket.socket) -> None:
        """Closes `listening` at its end."""
        listening.setblocking(False)
        self._listening = listening
        self._accept_on()
        checking = asyncio.create_task(self._check(asyncio.get_running_loop().time))
        try:
            await self._stopping.wait()
        finally:
            checking.cancel()
            self._pause()
            self._listening = None
            listening.close()
        await self._drain()

    # who comes

    def _accept_on(self) -> None:
        if not self._accepting and self._listening is not None:
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listening, self._accept, self._listening)

    def _pause(self) -> None:
        """Who comes now waits in the kernel's queue."""
        if self._accepting and self._listening is not None:
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS):
            if len(self._connections) >= self._doors.max_connections + SPARE:
                if not self._said_full:
                    logger.warning("%d connections are open: no more are accepted until one ends", len(self._connections))
                self._said_full = True
                self._pause()
                return
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue                      # it has left again
            except OSError as error:          # no files or no memory: `_check` tries again
                logger.error("no connection can be accepted beside %d: %s", len(self._connections), error)
                self._pause()
                return
            start(self._connect(accepted))

    async def _connect(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        is_over = len(self._served) >= self._doors.max_connections
        handle = self._doors.turn_away if is_over else self._doors.handle
        connection = Connection(handle, loop.time, self._lost, outbox=self._doors.outbox, once=is_over)
        self._connections.add(connection)
        if not is_over:
            self._served.add(connection)
        self._empty.clear()
        try:
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:
            logger.warning("a connection was lost before it began: %s", error)
            accepted.close()
            self._lost(connection)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._served.discard(connection)
        self._accept_on()
        if not self._connections:
            self._empty.set()

    # who stays

    async def _check(self, clock: Callable[[], float]) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._said_full = False
            for connection in list(self._connections):
                connection.check(clock())
            self._accept_on()

    async def _drain(self) -> None:
        for connection in list(self._connections):
            connection.drain()
        if not await self._emptied(self._doors.grace_s):
            for connection in list(self._connections):
                connection.abort()
            await self._emptied(self._doors.grace_s)

    async def _emptied(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while self._connections:
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True
