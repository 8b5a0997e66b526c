"""Bytes in, bytes out: the HTTP of a connection, with a handler that says what it was asked."""

import asyncio

import pytest
from harness.gateway import in_loop
from harness.http_bytes import Response
from harness.http_line import (
    CHUNKED,
    CHUNKED_UPGRADE,
    GET,
    GET_UPGRADE,
    LAST,
    MAX_BODY,
    OLD,
    POST,
    POST_UPGRADE,
    Line,
    ok,
    refuse,
    swallow,
    turns,
)

from diptych.cluster.gateway.connection import MAX_AHEAD_BYTES
from diptych.cluster.gateway.exchange import CONTINUE, ClientGone, Exchange
from diptych.cluster.gateway.response_head import response_head


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


async def tell(exchange: Exchange) -> None:
    exchange.open((("x-a", "b"),))
    exchange.write(b"one ")
    exchange.write(b"two ")
    exchange.end(b"three")


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


@pytest.mark.parametrize("value", ["a\r\nInjected: b", "a\nb", "a\rb"])
def test_no_header_is_two(value):
    with pytest.raises(ValueError, match="line break"):
        response_head(200, (("x-a", value),))
