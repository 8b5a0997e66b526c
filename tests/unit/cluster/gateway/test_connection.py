"""Bytes in, bytes out: the HTTP of a connection, with a handler that says what it was asked."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from harness.gateway import in_loop
from harness.http_bytes import Response, Socket
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway import request_reader as module
from diptych.cluster.gateway.connection import BODY_S, END_S, KEEP_ALIVE_S, LINGER_S, MAX_AHEAD_BYTES, READ_S, Connection
from diptych.cluster.gateway.errors import BadRequest
from diptych.cluster.gateway.exchange import CONTINUE, ClientGone, Exchange
from diptych.cluster.gateway.request_reader import MAX_HEAD_BYTES, MAX_KNOWN_BYTES
from diptych.cluster.gateway.response_head import response_head

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


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(header + b"\r\n" for header in (b"content-length: %d" % len(body), *headers)) + b"\r\n" + body


class TestRequests:
    @in_loop
    async def test_one_after_the_other_on_one_connection(self):
        line = Line()
        assert await line.feed(GET) == ok(b"GET /a ")
        assert await line.feed(POST) == ok(b"GET /a ") + ok(b"POST /b hello")
        await line.feed(CHUNKED)
        assert line.output.endswith(ok(b"POST /c hello world"))
        assert not line.closed

    @pytest.mark.parametrize("last", [LAST, OLD])
    @in_loop
    async def test_the_last_closes(self, last):
        line = Line()
        await line.feed(GET + last + GET)
        assert line.statuses == [200, 200]
        assert b"connection: close" in line.output
        assert await line.socket.closed

    @in_loop
    async def test_head_is_a_get_without_a_body(self):
        line = Line()
        assert await line.feed(GET.replace(b"GET", b"HEAD") + GET) == ok(b"HEAD /a ").removesuffix(b"HEAD /a ") + ok(b"GET /a ")

    @pytest.mark.parametrize(
        ("target", "path"),
        [(b"/a%20b/%C3%BC?x=%20", "/a b/ü"), (b"http://host:80/x?y", "/x"), (b"/%ff", "/\ufffd"), (b"//a", "//a"), (b"*", "*")],
    )
    @in_loop
    async def test_paths(self, target, path):
        line = Line()
        await line.feed(b"GET %b HTTP/1.1\r\n\r\n" % target)
        assert [exchange.path for exchange in line.exchanges] == [path]

    @in_loop
    async def test_of_equal_headers_the_first_counts_and_trailers_do_not(self):
        line = Line()
        await line.feed(b"GET / HTTP/1.1\r\nX-A: 1\r\nx-a: 2\r\n\r\n", CHUNKED)
        assert line.exchanges[0].header("x-a") == "1"
        assert line.exchanges[1].header("trailer") is None

    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    @in_loop
    async def test_an_upgrade_is_not_taken_up(self, version):
        line = Line()
        await line.feed(GET_UPGRADE * 2 + POST_UPGRADE + CHUNKED_UPGRADE + GET_UPGRADE.replace(b"1.1", version) + GET)
        assert line.output.startswith(ok(b"GET /up ") * 2 + ok(b"POST /up hello") + ok(b"POST /up hello world") + ok(b"GET /up ")[:15])
        assert line.statuses == [200] * (6 if version == b"1.1" else 5)
        assert line.exchanges[2].header("http2-settings") == "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"
        assert line.exchanges[2].header("upgrade") is None

    @in_loop
    async def test_ever_so_many_upgrades(self):
        line = Line()
        await line.feed(GET_UPGRADE * 5000)
        assert line.output == ok(b"GET /up ") * 5000


class TestAnySplit:
    @given(
        requests=st.lists(st.sampled_from([GET, POST, CHUNKED, LONG, GET_UPGRADE, POST_UPGRADE, CHUNKED_UPGRADE]), max_size=4),
        last=st.sampled_from(
            [
                b"", LAST, OLD, LAST + GET, b"nonsense\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
                b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nx\r\n",
                b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
                b"GET / HTTP/1.1\r\nX: " + b"x" * 300 + b"\r\n\r\n" + GET,
            ]
        ),
        data=st.data(),
    )  # fmt: skip
    def test_of_the_bytes_gives_the_same_answers(self, requests, last, data):
        raw = b"".join(requests) + last
        cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=12))) if len(raw) > 1 else []
        pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

        async def answered(pieces: list[bytes]) -> tuple[bytes, bool]:
            line = Line()
            return await line.feed(*pieces), line.closed

        before = module.MAX_HEAD_BYTES
        module.MAX_HEAD_BYTES = 200
        try:
            assert asyncio.run(answered(pieces)) == asyncio.run(answered([raw]))
        finally:
            module.MAX_HEAD_BYTES = before


BODIES = st.sampled_from([b"", b"x", b"hello", b"y" * 12, b"z" * MAX_BODY])
ODD_NUMBERS = [b"0%d", b"+%d", b"-%d", b" %d", b"%d ", b"%d, 5", b"0x%d", b"1%d", b"_%d", b"%d\r\nX: y", b"%d\r\n\tz"]
NUMBERS = st.just(b"%d") | st.sampled_from(ODD_NUMBERS)
HEADS = st.sampled_from(
    [
        b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\n\r\n", b"POST /b HTTP/1.1\r\nHost: x\r\ncontent-length: %b\r\nX: 1\r\n\r\n",
        b"POST /b HTTP/1.1\r\nX-Content-Length: 5\r\nContent-Length: %b\r\n\r\n", b"POST /b HTTP/1.0\r\nContent-Length: %b\r\n\r\n",
        b"POST /b HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: %b\r\n\r\n", b"\r\nPOST /b HTTP/1.1\r\nContent-Length: %b\r\n\r\n",
        b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: %b\r\n\r\n", b"GET /b HTTP/1.1\r\nContent-Length: %b\r\n\r\n",
        b"POST /b HTTP/1.1\r\nConnection: close\r\nContent-Length: %b\r\n\r\n", b"PRI * HTTP/2.0\r\nContent-Length: %b\r\n\r\n",
        b"POST /b HTTP/1.1\r\n" + SETTINGS + b"Content-Length: %b\r\n\r\n", b"POST /b HTTP/1.1\r\nX: \r\nContent-Length: %b\r\n\r\n",
    ]
)  # fmt: skip


@st.composite
def requests_alike(draw: st.DrawFn) -> list[bytes]:
    """Pieces, most of which are a whole request."""
    heads = draw(st.lists(HEADS, min_size=1, max_size=2))
    pieces = []
    for _ in range(draw(st.integers(1, 6))):
        body = draw(BODIES)
        raw = draw(st.sampled_from(heads)) % (draw(NUMBERS) % len(body)) + body
        if draw(st.integers(0, 4)) == 0:
            start, junk = draw(st.integers(0, len(raw))), draw(st.sampled_from([b"", b"\r\n", b"\r", b"x", b"0"]))
            raw = raw[:start] + junk + raw[draw(st.integers(start, len(raw))) :]
        cut = draw(st.sampled_from([0, 0, 0, 0, draw(st.integers(0, len(raw)))]))
        pieces += [piece for piece in (raw[:cut], raw[cut:]) if piece]
    return pieces


class TestKnownHeads:
    """One that is known is not parsed again, and nobody can tell."""

    @given(pieces=requests_alike())
    def test_they_are_answered_as_those_that_are_not(self, pieces):
        async def answered() -> tuple[Any, ...]:
            line = Line()
            output = await line.feed(*pieces)
            reader = line.connection._reader
            asked = [(exchange.method, exchange.path, exchange._headers, exchange.keeps_alive) for exchange in line.exchanges]
            return output, line.closed, asked, reader.in_head, reader.is_last, reader.is_between

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_known_head", lambda *_: None)
            wanted = asyncio.run(answered())
        assert asyncio.run(answered()) == wanted

    @pytest.mark.parametrize("body", [b"hello", b"", b"x" * 987])
    @in_loop
    async def test_whatever_the_length(self, body, monkeypatch):
        line = Line()
        await line.feed(POST)
        monkeypatch.setattr(line.connection._reader, "_parse", lambda data: pytest.fail(f"{data!r} is parsed"))
        await line.feed(POST[:-5].replace(b"5", b"%d" % len(body)) + body)
        assert line.output == ok(b"POST /b hello") + ok(b"POST /b " + body)
        assert line.exchanges[1].header("content-length") == str(len(body))

    @in_loop
    async def test_long_ones_are_not_kept(self):
        line = Line()
        await line.feed(POST.replace(b"Host", b"X: " + b"y" * MAX_KNOWN_BYTES + b"\r\nHost"))
        assert line.statuses == [200]
        assert line.connection._reader._known is None

    @in_loop
    async def test_blank_lines_between_them_do_not_add_up(self):
        line = Line()
        for _ in range(MAX_HEAD_BYTES // 1000):
            await line.feed(POST, b"\r\n" * 1000)
        assert set(line.statuses) == {200}

    @in_loop
    async def test_a_request_whose_body_is_yet_to_come_is_parsed(self):
        line = Line()
        await line.feed(POST, POST[:-2])
        assert line.statuses == [200]
        await line.feed(POST[-2:] + POST)
        assert line.statuses == [200] * 3


class TestAnyBytes:
    @given(
        requests=st.lists(st.sampled_from([GET, POST, CHUNKED, LONG, LAST, OLD]), min_size=1, max_size=4),
        junk=st.binary(max_size=20) | st.sampled_from([b"\r\n", b"\r", b":", b" ", b"\x00", b"0\r\n\r\n", b"Content-Length: 1\r\n"]),
        data=st.data(),
    )
    def test_in_a_request_are_answered_or_waited_for(self, requests, junk, data):
        raw = b"".join(requests)
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, len(raw)))

        async def scenario() -> None:
            line = Line()
            await line.feed(raw[:start] + junk + raw[end:])
            assert set(line.statuses) <= {200, 400, 413, 501, 505}
            assert line.closed or not set(line.statuses) - {200}
            await line.pass_time(KEEP_ALIVE_S + 1)
            assert line.closed

        asyncio.run(scenario())


class TestRefusals:
    @pytest.mark.parametrize(
        ("raw", "status"),
        [
            (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\nhello", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\nhello", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
            (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
            (b"GET / HTTP/1.1\nHost: x\n\n", 400),
            (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: a\rInjected: b\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n", 400),
            (b"GET /\xc3\xbc HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT host:80 HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT http://host/path HTTP/1.1\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + SETTINGS + b"\r\n0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n" + SETTINGS + b"\r\n0\r\n\r\n", 501),
            (b"BREW / HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 505),
            (b"GET /\r\n\r\n", 505),
            (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        ],
    )  # fmt: skip
    @in_loop
    async def test_what_is_no_request_of_ours_is_told_so_and_ends_the_connection(self, raw, status):
        line = Line()
        await line.feed(GET + raw + GET)
        first, second = Response(), Response()
        first.feed(ok(b"GET /a "))
        assert line.output.startswith(ok(b"GET /a "))
        second.feed(line.output.removeprefix(ok(b"GET /a ")))
        assert (second.status, second.complete, second.headers["connection"]) == (status, True, "close")
        assert b'"type":"invalid_request_error"' in second.body
        assert len(line.exchanges) == 1
        assert line.closed

    @pytest.mark.parametrize("piece", [1 << 20, 1000])
    @pytest.mark.parametrize("line_of", [b"X-%d: y\r\n", b"x"])
    @in_loop
    async def test_a_head_without_an_end(self, piece, line_of):
        raw = b"GET / HTTP/1.1\r\n" + (b"".join(line_of % i for i in range(20_000)) if b"%" in line_of else b"X: " + line_of * 300_000)
        if piece > len(raw):
            raw += b"\r\n\r\n"
        line = Line()
        for start in range(0, len(raw), piece):
            if not line.closed:
                line.connection.data_received(raw[start : start + piece])
        assert line.statuses == [431]
        assert str(MAX_HEAD_BYTES) in line.output.decode()
        assert line.exchanges == []

    @in_loop
    async def test_what_follows_the_end_of_a_head_in_the_same_read_is_not_of_it(self):
        line = Line(swallow)
        body = b"x" * 2 * MAX_HEAD_BYTES
        await line.feed(b"GET / HTTP/1.1\r\n", b"\r\nPOST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert 431 not in line.statuses
        assert line.exchanges[0].method == "GET"

    @pytest.mark.parametrize("trailers", [b"X: " + b"x" * 2 * MAX_HEAD_BYTES, b"X: y\r\n" * MAX_HEAD_BYTES])
    @in_loop
    async def test_trailers_without_an_end(self, trailers):
        line = Line()
        await line.feed(CHUNKED[: CHUNKED.index(b"Trailer")])
        for start in range(0, MAX_HEAD_BYTES - 1000, 1000):
            await line.feed(trailers[start : start + 1000])
        assert not line.closed
        await line.feed(trailers[start + 1000 : start + 2000], trailers[start + 2000 : start + 3000])
        assert line.statuses == [431]
        assert line.closed

    @in_loop
    async def test_a_body_and_requests_without_a_head_to_speak_of_are_of_any_size(self):
        line = Line(swallow)
        await line.feed(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(MAX_HEAD_BYTES // 500):
            await line.feed(b"3e8\r\n", b"x" * 1000, b"\r\n")
        await line.feed(b"0\r\n\r\n" + GET * MAX_HEAD_BYTES)
        assert set(line.statuses) == {200}

    @in_loop
    async def test_a_broken_body_fails_its_own_request(self):
        line = Line()
        await line.feed(GET, CHUNKED[:60], b"no chunk")
        assert line.statuses == [200, 400]
        assert b"not HTTP/1.1" in line.output
        assert line.closed

    @in_loop
    async def test_a_fault_in_a_callback_is_not_the_clients(self, monkeypatch):
        line = Line()
        monkeypatch.setattr(Exchange, "feed", lambda exchange, body: 1 / 0)
        with pytest.raises(Exception, match="on_body"):
            line.connection.data_received(POST)


class TestBodies:
    @pytest.mark.parametrize("head", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
    @in_loop
    async def test_too_large_a_one_is_refused_before_it_is_here(self, head):
        line = Line()
        await line.feed(b"POST / HTTP/1.1\r\n" + head + b"\r\n\r\n", b"7d0\r\n" if b"chunked" in head else b"", b"x" * 1001)
        assert line.statuses == [413]
        assert b"connection: close" in line.output
        line.connection.data_received(b"x" * 999)
        assert line.statuses == [413]

    @in_loop
    async def test_it_is_waited_for_only_by_who_reads_it(self):
        line = Line(lambda exchange: refuse(exchange))
        await line.feed(b"POST / HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert line.statuses == [401]
        assert line.closed

    @in_loop
    async def test_a_client_that_asks_before_it_sends_is_told_to(self):
        line = Line()
        head, body = POST.replace(b"Host", b"Expect: 100-Continue\r\nHost")[:-5], POST[-5:]
        assert await line.feed(head) == CONTINUE
        assert await line.feed(body) == CONTINUE + ok(b"POST /b hello")
        assert await line.feed(head + body) == CONTINUE + 2 * ok(b"POST /b hello")


    @in_loop
    async def test_one_of_http_1_0_knows_of_no_such_answer(self):
        line = Line()
        assert await line.feed(b"POST / HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n") == b""


async def swallow(exchange: Exchange) -> None:
    await exchange.read(1 << 30)
    exchange.respond(200, (), b"")


async def refuse(exchange: Exchange) -> None:
    exchange.respond(401, (), b"")


class TestPipelining:
    @in_loop
    async def test_answers_come_in_order(self):
        doors = {f"/{i}": asyncio.Event() for i in range(3)}

        async def wait(exchange: Exchange) -> None:
            await doors[exchange.path].wait()
            exchange.respond(200, (), exchange.path.encode())

        line = Line(wait)
        await line.feed(b"".join(GET.replace(b"/a", b"/%d" % i) for i in range(3)))
        for i in (2, 1):
            doors[f"/{i}"].set()
            await turns()
            assert line.output == b""
        doors["/0"].set()
        await turns()
        assert line.output == b"".join(ok(b"/%d" % i) for i in range(3))

    @in_loop
    async def test_reading_goes_on_until_much_is_held(self):
        door = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            await door.wait()
            exchange.respond(200, (), b"")

        line = Line(wait)
        await line.feed(GET)
        for _ in range(MAX_AHEAD_BYTES // len(GET)):
            await line.feed(GET)
        assert line.socket.reads_requests
        await line.feed(GET)
        assert not line.socket.reads_requests
        door.set()
        await turns()
        assert line.statuses == [200] * (2 + MAX_AHEAD_BYTES // len(GET))
        assert line.socket.reads_requests
        await line.feed(GET)
        assert line.socket.reads_requests

    @in_loop
    async def test_a_large_body_is_not_ahead_of_its_turn(self):
        line = Line(swallow)
        await line.feed(POST[:-5].replace(b"5", b"%d" % (4 * MAX_AHEAD_BYTES)), *[b"x" * MAX_AHEAD_BYTES] * 3)
        assert line.socket.reads_requests
        await line.feed(b"x" * MAX_AHEAD_BYTES + GET)
        assert line.statuses == [200, 200]

    @in_loop
    async def test_ever_so_many(self):
        line = Line()
        await line.feed(GET * 5000)
        assert line.output == ok(b"GET /a ") * 5000

    @in_loop
    async def test_who_does_not_read_answers_gets_no_more(self):
        line = Line()
        line.socket.reading = False
        await line.feed(GET * 3)
        assert len(line.exchanges) == 1
        line.socket.read_on()
        assert line.output == ok(b"GET /a ") * 3


class TestStreams:
    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @in_loop
    async def test_each_write_is_one_chunk(self, version):
        line = Line(tell)
        await line.feed(LAST.replace(b"1.1", version.encode()))
        response = Response()
        response.feed(line.output)
        assert (response.status, response.body) == (200, b"one two three")
        assert ("transfer-encoding" in response.headers) == (version == "1.1")
        assert len(line.socket.written) == 3
        assert line.closed

    @in_loop
    async def test_a_client_that_does_not_read_is_waited_for(self):
        told: list[str] = []

        async def open_only(exchange: Exchange) -> None:
            exchange.open(())
            exchange.on_writable = lambda: told.append("writable")

        line = Line(open_only)
        await line.feed(GET)
        [exchange] = line.exchanges
        line.socket.reading = False
        assert exchange.writable
        exchange.write(b"one")
        assert (exchange.writable, told) == (False, [])
        line.socket.read_on()
        assert (exchange.writable, told) == (True, ["writable"])

    @in_loop
    async def test_a_client_that_leaves_is_told_of_once_and_written_to_no_more(self):
        told: list[str] = []

        async def open_only(exchange: Exchange) -> None:
            exchange.open(())
            exchange.write(b"one")
            exchange.on_gone = lambda: told.append("gone")

        line = Line(open_only)
        await line.feed(GET + GET)
        line.socket.close()
        await turns()
        [exchange] = line.exchanges
        before = list(line.socket.written)
        exchange.write(b"two")
        exchange.end(b"three")
        assert (told, line.socket.written, exchange.gone, line.lost) == (["gone"], before, True, [line.connection])

    @in_loop
    async def test_a_client_that_leaves_before_its_body_is_here(self):
        left: list[bool] = []

        async def read(exchange: Exchange) -> None:
            try:
                await exchange.read(MAX_BODY)
            except ClientGone:
                left.append(exchange.gone)

        line = Line(read)
        await line.feed(POST[:-1])
        line.socket.close()
        await turns()
        assert left == [True]


class TestTheClientsEnd:
    """It sends no more; whether it still reads is another matter."""

    @in_loop
    async def test_together_with_its_requests_leaves_them_their_answers(self):
        door = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            await door.wait()
            await echo(exchange)

        line = Line(wait)
        await line.feed(GET + POST + GET)
        line.now += END_S
        line.socket.end()
        await line.pass_time(10 * KEEP_ALIVE_S)
        assert line.output == b""
        door.set()
        await turns()
        assert line.output == ok(b"GET /a ") + ok(b"POST /b hello") + ok(b"GET /a ", b"connection: close")
        assert await line.socket.closed

    @in_loop
    async def test_after_the_head_of_its_answer_ends_with_the_answer(self):
        line = Line(lambda exchange: open_only(exchange))
        await line.feed(GET)
        line.socket.end()
        assert not line.closed
        [exchange] = line.exchanges
        assert (exchange.gone, exchange.keeps_alive) == (False, True)
        exchange.end(b"whole")
        assert line.output.endswith(b"whole\r\n0\r\n\r\n")
        assert await line.socket.closed

    @in_loop
    async def test_later_is_its_leaving(self):
        line = Line(lambda exchange: open_only(exchange))
        await line.feed(GET + GET)
        line.now += END_S * 1.01
        line.socket.end()
        await turns()
        assert [exchange.gone for exchange in line.exchanges] == [True]
        assert line.lost == [line.connection]

    @pytest.mark.parametrize("rest", [GET[:5], POST[:-1], CHUNKED[:-3]])
    @in_loop
    async def test_in_the_middle_of_a_request_is_its_leaving(self, rest):
        line = Line(lambda exchange: open_only(exchange))
        await line.feed(GET + rest)
        line.socket.end()
        await turns()
        assert [exchange.gone for exchange in line.exchanges] == [True]
        assert line.closed

    @pytest.mark.parametrize("raw", [b"", GET, GET + GET[:5]])
    @in_loop
    async def test_without_anything_to_answer_closes(self, raw):
        line = Line()
        await line.feed(raw)
        line.socket.end()
        assert line.output == ok(b"GET /a ") * raw.count(GET)
        assert await line.socket.closed

    @in_loop
    async def test_before_a_refusal_that_is_due_leaves_it_that(self):
        door = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            await door.wait()
            await echo(exchange)

        line = Line(wait)
        await line.feed(GET + b"nonsense\r\n\r\n")
        line.socket.end()
        door.set()
        await turns()
        assert line.statuses == [200, 400]
        assert line.closed

    @in_loop
    async def test_with_a_client_that_does_not_read_is_waited_for_no_longer_than_without(self):
        line = Line()
        line.socket.reading = False
        await line.feed(GET * 2)
        line.socket.end()
        await line.pass_time(KEEP_ALIVE_S)
        assert not line.closed
        await line.pass_time(1)
        assert line.closed


class TestOnce:
    @in_loop
    async def test_the_first_answer_is_the_last(self):
        line = Line(once=True)
        assert await line.feed(GET + GET) == ok(b"GET /a ", b"connection: close")
        assert await line.socket.closed

    @pytest.mark.parametrize("asked", [b"", b"GET / HT"])
    @in_loop
    async def test_who_asks_nothing_whole_is_not_waited_for_long(self, asked):
        line = Line(once=True)
        await line.feed(asked)
        await line.pass_time(LINGER_S)
        assert not line.closed
        await line.pass_time(1)
        assert line.closed


async def open_only(exchange: Exchange) -> None:
    exchange.open(())
    exchange.write(b"begun")


async def tell(exchange: Exchange) -> None:
    exchange.open((("x-a", "b"),))
    exchange.write(b"one ")
    exchange.write(b"two ")
    exchange.end(b"three")


class TestPatience:
    @in_loop
    async def test_with_an_idle_connection(self):
        line = Line()
        await line.feed(GET)
        await line.pass_time(KEEP_ALIVE_S)
        await line.feed(GET)
        await line.pass_time(KEEP_ALIVE_S)
        assert not line.closed
        await line.pass_time(1)
        assert line.closed

    @pytest.mark.parametrize("raw", [GET[:-2], POST[:-1], CHUNKED[:-3]])
    @in_loop
    async def test_with_a_request_that_does_not_come(self, raw):
        line = Line()
        await line.feed(raw)
        await line.pass_time(READ_S)
        assert line.output == b""
        await line.pass_time(1)
        assert line.statuses == [408]
        assert line.closed

    @in_loop
    async def test_with_a_head_in_drips_but_not_with_a_body_in_pieces(self):
        line = Line()
        await line.feed(POST[:-5])
        for byte in b"hello":
            await line.pass_time(READ_S * 0.75)
            await line.feed(bytes([byte]))
        assert line.statuses == [200]
        for byte in GET[:5]:
            await line.feed(bytes([byte]))
            await line.pass_time(READ_S / 4)
        await line.pass_time(1)
        assert line.statuses == [200, 408]

    @pytest.mark.parametrize("waits_s", [0.0, 2 * BODY_S])
    @in_loop
    async def test_with_a_body_in_drips_from_its_turn_on(self, waits_s):
        door = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            if exchange.method == "GET":
                await door.wait()
            await echo(exchange)

        line = Line(wait)
        await line.feed(GET + POST[:-5].replace(b"5", b"500"))
        await line.pass_time(waits_s)
        door.set()
        await turns()
        for _ in range(int(BODY_S)):
            await line.feed(b"x")
            await line.pass_time(1)
        assert line.statuses == [200]
        await line.pass_time(1)
        assert line.statuses == [200, 408]
        assert line.closed

    @in_loop
    async def test_has_no_end_while_an_answer_is_made(self):
        line = Line(lambda exchange: asyncio.Event().wait())
        await line.feed(GET + POST[:-1])
        await line.pass_time(10 * KEEP_ALIVE_S)
        assert not line.closed

    @in_loop
    async def test_with_a_client_that_goes_on_sending(self, monkeypatch):
        line = Line(refuse)
        monkeypatch.setattr(line.socket, "write_eof", lambda: None)
        await line.feed(POST[:-1])
        await line.pass_time(LINGER_S)
        await line.feed(b"x")
        assert not line.closed
        await line.pass_time(1)
        assert line.closed

    @pytest.mark.parametrize(
        "refused",
        [
            b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        ],
    )
    @in_loop
    async def test_with_a_refused_client_that_began_another_request_and_vanished(self, refused, monkeypatch):
        line = Line()
        monkeypatch.setattr(line.socket, "write_eof", lambda: None)
        await line.feed(refused + b"GET /")
        await line.pass_time(LINGER_S + 1)
        assert line.closed

    @in_loop
    async def test_with_a_client_that_does_not_take_its_answer(self):
        line = Line()
        line.socket.reading = False
        await line.feed(GET)
        await line.pass_time(KEEP_ALIVE_S)
        line.socket.held[0] = line.socket.held[0][1:]
        await line.pass_time(1)
        await line.pass_time(KEEP_ALIVE_S)
        assert not line.closed
        await line.pass_time(1)
        assert line.closed


class TestDrain:
    @in_loop
    async def test_ends_what_is_idle(self):
        line = Line()
        await line.feed(GET)
        line.connection.drain()
        assert await line.socket.closed

    @in_loop
    async def test_lets_an_answer_end(self):
        door = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            await door.wait()
            await echo(exchange)

        line = Line(wait)
        await line.feed(GET + GET)
        line.connection.drain()
        await turns()
        assert not line.closed
        door.set()
        await turns()
        assert line.output == ok(b"GET /a ", b"connection: close")
        assert await line.socket.closed

    @in_loop
    async def test_ends_what_has_not_begun(self):
        connection, socket = Connection(echo, lambda: 0.0, lambda connection: None), Socket()
        connection.drain()
        socket.connect(connection)
        assert await socket.closed


@pytest.mark.parametrize("value", ["a\r\nInjected: b", "a\nb", "a\rb"])
def test_no_header_is_two(value):
    with pytest.raises(ValueError, match="line break"):
        response_head(200, (("x-a", value),))
