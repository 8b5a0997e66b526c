"""One client's connection: bytes → Exchanges, which are answered one at a time, in the order they came.

    data ──► httptools ──► a head ──► Exchange ──► its turn ──► handle(exchange)
                           a body ──────► feed … completed
    answered ──► the next one, or closed if either side wants it so
    no HTTP, or too large a head ──► what came before is answered, then this with a 4xx; nothing more is read

A client that ends its side together with its last request is answered; one that does so later has left, as far as anybody can tell, and
what it asked for is cancelled.

Requests sent ahead of their turn wait. Reading goes on, or a client that leaves would not be noticed, until MAX_AHEAD_BYTES of them are
held. `check`, called every second, ends what is idle or too slow.

httptools refuses most of what requests are smuggled with: two lengths, a length beside chunks, spaces before a colon, bare line feeds,
folded lines. What it leaves to its caller is refused here: other versions, other codings than chunked, chunks in HTTP/1.0. Trailers are
dropped, and what asks for an upgrade is answered as though it had not.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast
from urllib.parse import unquote

import httptools

from .eager import start
from .errors import BadRequest, to_http
from .exchange import Exchange
from .response_head import response_head

MAX_HEAD_BYTES = 64 << 10
MAX_AHEAD_BYTES = 64 << 10                    # and the piece that goes over it
KEEP_ALIVE_S = 75.0                           # between requests, and for a client that does not take the end of its answer
READ_S = 30.0                                 # for a head, and for each piece of a body
BODY_S = 120.0                                # for all of a body, from its turn on: 8 MiB at 70 KB/s
END_S = 0.1                                   # after the last byte, that a client's end of sending belongs to it
LINGER_S = 5.0                                # for a client that goes on sending: a reset would take its answer from it; and `once`

Handler = Callable[[Exchange], Coroutine[Any, Any, None]]


class Connection(asyncio.Protocol):
    """A Channel. `handle` raises nothing."""

    def __init__(
        self, handle: Handler, clock: Callable[[], float], on_lost: Callable[["Connection"], None], *, once: bool = False
    ) -> None:
        """`once`: the first answer is the last, and its request is not waited for long."""
        self._handle = handle
        self._clock = clock
        self._on_lost = on_lost
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None      # while there is one
        self._queue: deque[Exchange] = deque()
        self._current: Exchange | None = None                 # whose turn it is
        self._reading: Exchange | None = None                 # whose body is coming in
        self._refusal: BadRequest | None = None               # for what came after the last Exchange
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0                  # of its target and headers
        self._untold_bytes = 0                # came since the parser last told of part of a head or body
        self._in_head = False
        self._ahead_bytes = 0                 # came while requests waited for their turn
        self._is_last = False                 # whatever comes now is not a request
        self._leaving = False                 # the last answer is written
        self._holding = False                 # nothing is read
        self._advancing = False
        self._draining = once                 # what is being answered, or comes next, is the last
        self._since = clock()                 # the last progress
        self._turn_at = self._since           # the current one's
        self._heard_at = self._since          # the last byte's
        self._unsent = 0                      # bytes, at the last check
        self.writable = True

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._is_last:
            return
        self._heard_at = self._clock()
        self._untold_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError as error:
            self._break(BadRequest(f"this is not HTTP/1.1: {error}", code="invalid_http"))
        self._check_head()                    # a header without an end is none that the parser tells of
        if self._queue:
            self._ahead_bytes += len(data)
        self._advance()

    def eof_received(self) -> bool:
        """Whether the transport stays open, for answers: it would not tell if the client left now, but writing does."""
        is_due = self._current is not None or bool(self._queue)
        is_whole = not self._in_head and self._reading is None
        if not (is_due and is_whole and self._clock() - self._heard_at <= END_S):
            return False
        self._is_last = True
        return True

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._current is not None:
            self._current.on_writable()
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self._is_last = None, True
        if self._current is not None:
            self._current.lost()
        self._queue.clear()
        self._on_lost(self)

    # httptools

    def on_message_begin(self) -> None:
        if self._is_last:
            return
        self._url, self._headers, self._in_head = b"", [], True
        self._head_bytes = self._untold_bytes = 0
        self._since = self._clock()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._headers.append((name.lower(), value))
            self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._is_last or self._parser.should_upgrade():
            return
        try:
            exchange = self._exchange(self._parser.get_http_version())
        except BadRequest as refusal:
            self._break(refusal)
        else:
            self._reading = exchange
            self._queue.append(exchange)

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        if self._reading is not None:
            self._since = self._clock()
            self._reading.feed(body)

    def on_message_complete(self) -> None:
        if self._reading is not None:
            self._is_last = not self._reading.keeps_alive
            self._reading.completed()
            self._reading = None

    # Channel

    @property
    def stays(self) -> bool:
        is_last = self._is_last and not self._queue and self._refusal is None
        return not (is_last or self._draining)

    def send(self, raw: bytes) -> None:
        if self._transport is not None:
            self._transport.write(raw)

    def answered(self) -> None:
        exchange, self._current = self._current, None
        if exchange is None or self._transport is None:
            return
        self._since = self._clock()
        if not (exchange.keeps_alive and self.stays):
            self._leave(whole=exchange.complete)
        self._advance()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # the server

    def drain(self) -> None:
        """What is being answered is the last."""
        self._draining = True
        if self._current is None and not self._leaving:
            self._leave(whole=True)

    def check(self, now: float) -> None:
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._since = now
        self._unsent = unsent
        if self._awaits_request:
            if now - self._since > READ_S:
                self._time_out(f"nothing more of the request has come for {READ_S:g} s")
            elif self._current is not None and now - self._turn_at > BODY_S:
                self._time_out(f"the body is not here as a whole after {BODY_S:g} s")
        elif now - self._since > self._patience_s():
            self.abort()

    @property
    def _awaits_request(self) -> bool:
        """The one whose turn it is."""
        if self._leaving:
            return False
        return self._in_head if self._current is None else self._current is self._reading

    def _time_out(self, text: str) -> None:
        self._break(BadRequest(text, code="request_timeout", status=408))
        self._advance()

    def _patience_s(self) -> float:
        if self._current is not None:
            return math.inf                   # the answer has its own deadline
        is_short = not self._unsent if self._leaving else self._draining
        return LINGER_S if is_short else KEEP_ALIVE_S

    def _parse(self, data: bytes) -> None:
        """A parser takes no body after a head that asks for an upgrade: a new one gets that head without the wish."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._parser.get_method() == b"CONNECT":
                    self._break(BadRequest("CONNECT is not supported here: this is no proxy", code="invalid_http"))
                if self._is_last:
                    return
                head, rest = self._head_without_upgrade(), rest[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                self._parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self._parser.get_method(), self._url, self._parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self._headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"\r\n"])

    def _exchange(self, version: str) -> Exchange:
        """Raises BadRequest."""
        if version not in ("1.0", "1.1"):
            raise BadRequest(f"HTTP/{version} is not spoken here, but HTTP/1.1", code="invalid_http", status=505)
        headers = dict(reversed(self._headers))               # of equal ones the first counts
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (coding.lower() != b"chunked" or version == "1.0"):
            text = f"the transfer coding {coding.decode('latin-1')!r} of HTTP/{version} is not supported, only 'chunked' of HTTP/1.1"
            raise BadRequest(text, code="invalid_http", status=501)
        method, is_11 = self._parser.get_method().decode(), version == "1.1"
        return Exchange(self, method, _path(self._url), headers, chunked=is_11, keep_alive=self._parser.should_keep_alive())

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        self._untold_bytes = 0
        self._check_head()

    def _check_head(self) -> None:
        if self._head_bytes + self._untold_bytes > MAX_HEAD_BYTES:
            text = f"the head, with trailers, has more than {MAX_HEAD_BYTES} bytes"
            self._break(BadRequest(text, code="head_too_large", status=431))

    def _break(self, failure: BadRequest) -> None:
        """What is being read fails, and nothing after it is read."""
        if self._is_last:
            return
        self._is_last, self._in_head = True, False
        if self._reading is not None:
            self._reading.fail(failure)
            self._reading = None
        else:
            self._refusal = failure

    def _advance(self) -> None:
        """Whoever's turn it is gets it. (In a loop: an answer that is there at once would come back here, as deep as requests are many.)"""
        if self._advancing or self._transport is None:
            return
        self._advancing = True
        while self._queue and self._current is None and self.writable:
            self._current, self._turn_at = self._queue.popleft(), self._clock()
            start(self._handle(self._current))
        self._advancing = False
        if self._refusal is not None and self._current is None and not self._queue:
            self._refuse(self._refusal)
        if not self._queue:
            self._ahead_bytes = 0
        self._hold(self._ahead_bytes > MAX_AHEAD_BYTES)

    def _hold(self, holding: bool) -> None:
        if holding is self._holding or self._transport is None or self._transport.is_closing():
            return
        self._holding, self._since = holding, self._clock()
        if holding:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _refuse(self, refusal: BadRequest) -> None:
        error, self._refusal = to_http(refusal), None
        headers = (("content-type", "application/json"), ("content-length", str(len(error.body))), ("connection", "close"))
        self.send(response_head(error.status, headers) + error.body)
        self._leave(whole=False)

    def _leave(self, *, whole: bool) -> None:
        """`whole`: the client has sent all it will."""
        self._is_last = self._leaving = True
        self._queue.clear()
        if self._transport is None:
            return
        if whole:
            self._transport.close()
        else:
            self._transport.write_eof()


def _path(url: bytes) -> str:
    """Decoded, without the query. Raises BadRequest."""
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError:
        path = None
    if path is None:
        raise BadRequest(f"the request target {url.decode('latin-1')!r} has no path", code="invalid_http")
    return unquote(path.decode())
