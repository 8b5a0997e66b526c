"""A connection's bytes → its requests.

    data ──► httptools ──► a head ──► on_request(Exchange)
                           a body ──────► feed … completed
    no HTTP, or too large a head ──► the request whose body it is in fails, or it is a `refusal`; nothing more is read

A client's requests begin alike: a head that differs from the last in its Content-Length alone is not parsed again.

httptools refuses most of what requests are smuggled with: two lengths, a length beside chunks, spaces before a colon, bare line feeds,
folded lines. What it leaves to its caller is refused here: other versions, other codings than chunked, chunks in HTTP/1.0. Trailers are
dropped, and what asks for an upgrade is answered as though it had not.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

import httptools

from .errors import BadRequest
from .exchange import Channel, Exchange

MAX_HEAD_BYTES = 64 << 10
MAX_KNOWN_BYTES = 2 << 10                     # of a head that is remembered, one for each connection
MAX_LENGTH_DIGITS = 9
_LENGTH = re.compile(rb"(?<=\r\ncontent-length: )[0-9]{1,%d}(?=\r\n)" % MAX_LENGTH_DIGITS, re.IGNORECASE)


class _KnownHead(NamedTuple):
    """As the parser took it, with any number for its length."""

    before: bytes                             # up to its Content-Length
    after: bytes                              # and on to its end
    method: str
    path: str
    headers: dict[bytes, bytes]               # exchanges share it, and only read it


class RequestReader:
    def __init__(self, channel: Channel, clock: Callable[[], float], on_request: Callable[[Exchange], None]) -> None:
        self.reading: Exchange | None = None                  # whose body is coming in
        self.in_head = False
        self.is_last = False                                  # whatever comes now is not a request
        self.refusal: BadRequest | None = None                # for what came after the last Exchange
        self.heard_at = self.since = clock()                  # the last byte; the last progress with a request
        self._channel = channel
        self._clock = clock
        self._on_request = on_request
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0                  # of its target and headers
        self._untold_bytes = 0                # came since the parser last told of part of a head or body
        self._known: _KnownHead | None = None
        self._piece = b""                     # what is being fed, until the parser tells of the head that it begins with

    @property
    def is_between(self) -> bool:
        """No request is here in part."""
        return not self.in_head and self.reading is None

    def feed(self, data: bytes) -> None:
        self.heard_at = self._clock()
        if self.is_between and not self.is_last:
            if self._known is not None and self._is_like(self._known, data):
                return
            self._piece = data
        self._untold_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError as error:
            self.fail(BadRequest(f"this is not HTTP/1.1: {error}", code="invalid_http"))
        self._check_head()                    # a header without an end is none that the parser tells of
        self._piece = b""

    def fail(self, failure: BadRequest) -> None:
        """What is being read fails, and nothing after it is read."""
        if self.is_last:
            return
        self.is_last, self.in_head = True, False
        if self.reading is not None:
            self.reading.fail(failure)
            self.reading = None
        else:
            self.refusal = failure

    # httptools

    def on_message_begin(self) -> None:
        if self.is_last:
            return
        self._url, self._headers, self.in_head = b"", [], True
        self._head_bytes = self._untold_bytes = 0
        self.since = self.heard_at

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._head_bytes += len(url)
        self._untold_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self._headers.append((name.lower(), value))
            self._head_bytes += len(name) + len(value)
            self._untold_bytes = 0

    def on_headers_complete(self) -> None:
        self._untold_bytes = 0                # what follows is no longer the head
        self._check_head()
        self.in_head = False
        if self.is_last or self._parser.should_upgrade():
            return
        try:
            exchange = self._exchange(self._parser.get_http_version())
        except BadRequest as refusal:
            self.fail(refusal)
        else:
            self.reading = exchange
            self._on_request(exchange)

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        if self.reading is not None:
            self.since = self.heard_at
            self.reading.feed(body)

    def on_message_complete(self) -> None:
        if self.reading is not None:
            self.is_last = not self.reading.keeps_alive
            self.reading.completed()
            self.reading = None

    def _is_like(self, known: _KnownHead, data: bytes) -> bool:
        """With all of its body and no more, it is a request. The parser, which is between two, need not know."""
        first = len(known.before)
        end = data.find(b"\r", first, first + MAX_LENGTH_DIGITS + 1)
        length, start = data[first:end], end + len(known.after)
        # Without a `\r` there `end` is -1, and what follows a length is longer than the one byte from there on.
        is_alike = data.startswith(known.before) and data.startswith(known.after, end) and length.isdigit()
        if not is_alike or int(length) != len(data) - start:
            return False
        self.since, self._untold_bytes, self._head_bytes = self.heard_at, 0, 0
        headers = known.headers if known.headers[b"content-length"] == length else known.headers | {b"content-length": length}
        exchange = Exchange(self._channel, known.method, known.path, headers)
        exchange.feed(data[start:])
        exchange.completed()
        self._on_request(exchange)
        return True

    def _parse(self, data: bytes) -> None:
        """A parser takes no body after a head that asks for an upgrade: a new one gets that head without the wish."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._parser.get_method() == b"CONNECT":
                    self.fail(BadRequest("CONNECT is not supported here: this is no proxy", code="invalid_http"))
                if self.is_last:
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
        if (num_hosts := sum(name == b"host" for name, _ in self._headers)) > 1:
            raise BadRequest(f"a request names one Host, not {num_hosts}", code="invalid_http")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (coding.lower() != b"chunked" or version == "1.0"):
            text = f"the transfer coding {coding.decode('latin-1')!r} of HTTP/{version} is not supported, only 'chunked' of HTTP/1.1"
            raise BadRequest(text, code="invalid_http", status=501)
        method, path, is_11 = self._parser.get_method().decode(), _path(self._url), version == "1.1"
        keep_alive = self._parser.should_keep_alive()
        if is_11 and keep_alive and coding is None:
            self._known = _known_head(self._piece, method, path, headers)
        self._piece = b""
        return Exchange(self._channel, method, path, headers, chunked=is_11, keep_alive=keep_alive)

    def _check_head(self) -> None:
        if self._head_bytes + self._untold_bytes > MAX_HEAD_BYTES:
            text = f"the head, with trailers, has more than {MAX_HEAD_BYTES} bytes"
            self.fail(BadRequest(text, code="head_too_large", status=431))


def _known_head(piece: bytes, method: str, path: str, headers: dict[bytes, bytes]) -> _KnownHead | None:
    """None: `piece` is not one request as a whole, with a body of known length, or has a long head."""
    end = piece.find(b"\r\n\r\n", 0, MAX_KNOWN_BYTES) + 4
    length = _LENGTH.search(piece, 0, end)
    if length is None or int(length[0]) != len(piece) - end:
        return None
    return _KnownHead(piece[: length.start()], piece[length.end() : end], method, path, headers)


@lru_cache(maxsize=64)
def _path(url: bytes) -> str:
    """Decoded, without the query. Raises BadRequest."""
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError:
        path = None
    if path is None:
        raise BadRequest(f"the request target {url.decode('latin-1')!r} has no path", code="invalid_http")
    return unquote(path.decode())
