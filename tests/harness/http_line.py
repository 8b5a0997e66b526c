"""A client, a connection of the gateway's and a clock: requests to send over it, and handlers that answer them."""

import asyncio
import re
from collections.abc import Callable

from harness.http_bytes import Socket

from diptych.cluster.gateway.connection import Connection
from diptych.cluster.gateway.errors import BadRequest
from diptych.cluster.gateway.exchange import ClientGone, Exchange

MAX_BODY = 1000
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /b?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: z\r\n\r\n"
LONG = b"GET /long HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (i, b"y" * 20) for i in range(7)) + b"\r\n"
SETTINGS = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
GET_UPGRADE = b"GET /up HTTP/1.1\r\n" + SETTINGS + b"\r\n"
POST_UPGRADE = b"POST /up HTTP/1.1\r\n" + SETTINGS + b"Content-Length: 5\r\n\r\nhello"
CHUNKED_UPGRADE = b"POST /up HTTP/1.1\r\n" + SETTINGS + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"
OLD = b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"


class Line:
    """A client, a connection and a clock."""

    def __init__(self, handle: Callable | None = None, *, once: bool = False) -> None:
        self.now = 0.0
        self.socket = Socket()
        self.exchanges: list[Exchange] = []
        self.lost: list[Connection] = []
        self._handle = handle or echo
        self.connection = Connection(self.handle, lambda: self.now, self.lost.append, once=once)
        self.socket.connect(self.connection)

    async def handle(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        await self._handle(exchange)

    async def feed(self, *pieces: bytes) -> bytes:
        """What has come back by now, dates left out."""
        for piece in pieces:
            if not self.socket.is_closing():
                self.connection.data_received(piece)
            await turns()
        return self.output

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.connection.check(self.now)
        await turns()

    @property
    def output(self) -> bytes:
        return re.sub(rb"date: [^\r]*\r\n", b"", b"".join(self.socket.written))

    @property
    def closed(self) -> bool:
        return self.socket.is_closing()

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", self.output)]


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def echo(exchange: Exchange) -> None:
    try:
        body = await exchange.read(MAX_BODY)
    except ClientGone:
        return
    except BadRequest as error:
        exchange.respond(error.status, (), str(error).encode())
    else:
        exchange.respond(200, (), f"{exchange.method} {exchange.path} ".encode() + body)


async def swallow(exchange: Exchange) -> None:
    await exchange.read(1 << 30)
    exchange.respond(200, (), b"")


async def refuse(exchange: Exchange) -> None:
    exchange.respond(401, (), b"")


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(header + b"\r\n" for header in (b"content-length: %d" % len(body), *headers)) + b"\r\n" + body
