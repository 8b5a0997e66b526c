"""A small HTTP/1.1 client that stamps time well: one Protocol per connection, httptools, keep-alive, nothing buffered.

    acquire an idle connection (the last used first), or connect ─> write the request ─> sink.receive(status, piece) per socket
    read, on the spot ─> message complete ─> idle again, if the server keeps it alive

TCP_NODELAY is set, quick-ack is not: a server that leaves Nagle's algorithm on shows it here as 40 ms on keep-alive connections.
A connection that the server closed while it was idle is not a failure: the request goes out once more on another. Proxy
variables of the environment are ignored. Deadlines are the caller's (`asyncio.timeout`); a cancelled exchange closes its
connection, which is how a server learns that its client has gone.
"""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from .errors import EndpointError


class ExchangeFailed(Exception):
    """No complete response came; the load generator writes it in the request's record."""


class CannotConnect(ExchangeFailed):
    pass


class ConnectionDropped(ExchangeFailed):
    pass


class NotHttp(ExchangeFailed):
    pass


class BodySink(Protocol):
    def receive(self, status: int, body: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    tls: bool
    prefix: str                         # path before /v1, without a final slash
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Address":
        """Takes http(s)://host[:port][/prefix][/v1]; raises EndpointError for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port
            (parts.hostname or "").encode("idna")             # as the resolver will
        except ValueError as error:
            raise EndpointError(f"{url!r} is not a URL: {error}") from error
        more = parts.query or parts.fragment or "@" in parts.netloc or " " in url or not url.isprintable()
        if parts.scheme not in ("http", "https") or not parts.hostname or more:
            raise EndpointError(f"{url!r} is not of the form http://host:port")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise EndpointError("the API key holds characters that no HTTP header may have")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"), api_key)

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self._authority}{self.prefix}"

    @property
    def _authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def request(self, method: str, path: str, body: bytes = b"", headers: tuple[str, ...] = ()) -> bytes:
        """The whole request as bytes; `headers` are whole lines."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self._authority}", "User-Agent: diptych-bench", "Accept: */*"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, *headers, "", ""]).encode() + body


class Connection(asyncio.Protocol):
    """Carries one exchange at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._sink: BodySink | None = None
        self._finished: asyncio.Future[int] | None = None
        self._keep_alive = True
        self.answered = False           # at least one byte of this exchange's response has come

    @property
    def reusable(self) -> bool:
        return self._keep_alive and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, sink: BodySink) -> int:
        """Returns the status when the whole response has come. Raises ExchangeFailed."""
        assert self._transport is not None, "exchange before connection_made"
        self._sink, self.answered = sink, False
        self._finished = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            raise ConnectionDropped("closed before the request was sent")
        self._transport.write(request)
        try:
            return await self._finished
        finally:
            self._sink = self._finished = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)        # uvloop's is none by inheritance
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(NotHttp(f"not HTTP: {error}"))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(ConnectionDropped(f"connection lost: {error}" if error else "the server closed the connection"))

    def _fail(self, failure: ExchangeFailed) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(failure)

    # httptools

    def on_headers_complete(self) -> None:
        self.on_body(b"")

    def on_body(self, body: bytes) -> None:
        if self._sink is not None:
            self._sink.receive(self._parser.get_status_code(), body)

    def on_message_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(self._parser.get_status_code())


class HttpClient:
    """A pool of connections to one address, as many as there are requests at once."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, sink: BodySink) -> int:
        """Sends the bytes and feeds the sink; returns the status. Raises ExchangeFailed."""
        while True:                     # ends: every turn but the last takes one from the idle list
            reused = self._take_idle()
            connection = reused or await self._connect()
            try:
                status = await connection.exchange(request, sink)
            except ConnectionDropped:
                if reused is None or connection.answered:
                    raise
                continue
            except BaseException:
                connection.abort()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()
            return status

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self.address.host, self.address.port, ssl=self._tls)
        except OSError as error:
            raise CannotConnect(f"{self.address.host}:{self.address.port}: {error}") from error
        return connection
