"""HTTP on a listening socket: connections come and go; when it is told to stop, those that are being answered may finish.

    serve() ──► accept … ──► stop() ──► no new connections, idle ones closed ──► the rest end, within grace_s, or are cut ──► it returns
"""

import asyncio
import socket
from collections.abc import Callable

from .connection import Connection, Handler

CHECK_S = 1.0


class HttpServer:
    def __init__(self, handle: Handler, grace_s: float) -> None:
        self._handle = handle
        self._grace_s = grace_s
        self._connections: set[Connection] = set()
        self._stopping = asyncio.Event()
        self._empty = asyncio.Event()

    def stop(self) -> None:
        """In the loop; `serve` returns soon."""
        self._stopping.set()

    async def serve(self, listening: socket.socket, backlog: int) -> None:
        """Closes `listening` at its end."""
        clock = asyncio.get_running_loop().time
        server = await asyncio.get_running_loop().create_server(lambda: self._connect(clock), sock=listening, backlog=backlog)
        checking = asyncio.create_task(self._check(clock))
        try:
            await self._stopping.wait()
        finally:
            server.close()
            checking.cancel()
        await self._drain()

    def _connect(self, clock: Callable[[], float]) -> Connection:
        connection = Connection(self._handle, clock, self._lost)
        self._connections.add(connection)
        self._empty.clear()
        return connection

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def _check(self, clock: Callable[[], float]) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            for connection in list(self._connections):
                connection.check(clock())

    async def _drain(self) -> None:
        for connection in list(self._connections):
            connection.drain()
        if not await self._emptied(self._grace_s):
            for connection in list(self._connections):
                connection.abort()
            await self._emptied(self._grace_s)

    async def _emptied(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while self._connections:
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True
