"""How connections end: by their client, after one answer, for want of patience, in a drain."""

import asyncio

import pytest
from harness.gateway import in_loop
from harness.http_bytes import Socket
from harness.http_line import CHUNKED, GET, POST, Line, echo, ok, refuse, turns

from diptych.cluster.gateway.connection import BODY_S, END_S, KEEP_ALIVE_S, LINGER_S, READ_S, Connection
from diptych.cluster.gateway.exchange import Exchange
from diptych.cluster.gateway.request_reader import MAX_HEAD_BYTES


async def open_only(exchange: Exchange) -> None:
    exchange.open(())
    exchange.write(b"begun")


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
