"""One HTTP request and the way back, as the handlers see it; a Connection makes it and feeds it.

    read() ────────────────────► the whole body, some of which may still be on its way
    respond() ─────────────────► an answer of known length
    open(), write() …, end() ──► a streamed one: what each call hands over is one write to the socket
    on_gone ◄── the client has left        on_writable ◄── it reads again; until then `writable` is False
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from .errors import BadRequest
from .response_head import Headers, response_head

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientGone(Exception):
    """The client left before its request was complete. Nobody is there to be told."""


class Channel(Protocol):
    """What an exchange needs of its connection."""

    @property
    def stays(self) -> bool:
        """Another request may follow on it."""
        ...

    def send(self, raw: bytes) -> None: ...

    def answered(self) -> None:
        """All of the current exchange's answer is sent."""
        ...

    def abort(self) -> None: ...


class Exchange:
    def __init__(
        self, channel: Channel, method: str, path: str, headers: dict[bytes, bytes], *, chunked: bool = True, keep_alive: bool = True
    ) -> None:
        """`headers` by lower-case name; of equal names the first. `chunked`: the client understands it, being no HTTP/1.0."""
        self.method = method
        self.path = path
        self.status: int | None = None        # of the answer that has begun
        self.complete = False                 # the request is here as a whole
        self.gone = False                     # the client
        self.writable = True                  # it has taken most of what was written: the connection's to say
        self.on_status: Callable[[int], None] = _ignore
        self.on_gone: Callable[[], None] = nothing
        self.on_writable: Callable[[], None] = nothing
        self._channel = channel
        self._headers = headers
        self._chunked = chunked
        self._keep_alive = keep_alive
        self._body = bytearray()
        self._unsent = b""                    # a streamed answer's head, until its first chunk
        self._failure: BadRequest | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: str) -> str | None:
        """By lower-case name."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    async def read(self, max_bytes: int) -> bytes:
        """The whole body, once. Raises BadRequest (413 as soon as it is known to be larger, 408, 400), ClientGone."""
        if not self.complete:
            self._check_size(int(self.header("content-length") or 0), max_bytes)
            if self._chunked and (self.header("expect") or "").lower() == "100-continue":
                self._send(CONTINUE)
        while True:
            self._check_size(len(self._body), max_bytes)
            if self.complete:
                body = bytes(self._body)
                self._body.clear()
                return body
            await self._more()

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        head = self._start(status, (*headers, ("content-length", str(len(body)))))
        self._send(head if self.method == "HEAD" else head + body)
        self._channel.answered()

    def open(self, headers: Headers) -> None:
        """Starts a streamed 200."""
        self._unsent = self._start(200, (*headers, ("transfer-encoding", "chunked")) if self._chunked else headers)

    def write(self, chunk: bytes) -> None:
        if not self.gone:
            self._channel.send(self._framed(chunk))

    def end(self, chunk: bytes) -> None:
        """The stream ends in order after `chunk`."""
        self._send(self._framed(chunk) + b"0\r\n\r\n" if self._chunked else self._framed(chunk))
        self._channel.answered()

    def abort(self) -> None:
        """Cuts the connection: the client must not take this for an end."""
        self._channel.abort()

    # by the connection

    def feed(self, body: bytes) -> None:
        if self.status is None:               # else nobody will read it
            self._body += body
            self._wake()

    def completed(self) -> None:
        self.complete = True
        self._wake()

    def fail(self, failure: BadRequest) -> None:
        """The request will never be complete."""
        self._failure = failure
        self._wake()

    def lost(self) -> None:
        self.gone = True
        self._wake()
        self.on_gone()

    async def _more(self) -> None:
        """Until there is more of the body."""
        if not self.gone and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        if self.gone:
            raise ClientGone

    def _check_size(self, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            self._keep_alive = False          # the rest is not worth reading
            raise BadRequest(f"the body has {num_bytes} bytes or more; the limit is {max_bytes}", code="request_too_large", status=413)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _start(self, status: int, headers: Headers) -> bytes:
        self.status = status
        self.on_status(status)
        self._keep_alive = self._keep_alive and self.complete and self._chunked and self._channel.stays
        closing: Headers = () if self._keep_alive else (("connection", "close"),)
        return response_head(status, headers + closing)

    @property
    def keeps_alive(self) -> bool:
        """As the client wants it; from the answer's first byte on, as its head says."""
        return self._keep_alive

    def _framed(self, chunk: bytes) -> bytes:
        head, self._unsent = self._unsent, b""
        if not chunk:                         # as a chunk it would be the last
            return head
        return b"%b%x\r\n%b\r\n" % (head, len(chunk), chunk) if self._chunked else head + chunk

    def _send(self, raw: bytes) -> None:
        if not self.gone:
            self._channel.send(raw)


def nothing() -> None:
    pass


def _ignore(status: int) -> None:
    pass
