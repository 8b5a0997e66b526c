"""Real sockets and uvloop, with handlers of a few lines."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop
from harness.http_bytes import Response

from diptych.cluster.gateway import connection, http_server
from diptych.cluster.gateway.connection import Handler
from diptych.cluster.gateway.exchange import Exchange
from diptych.cluster.gateway.http_server import Doors, HttpServer
from diptych.cluster.gateway.outbox import Outbox

GET = b"GET / HTTP/1.1\r\n\r\n"
PIECE = b"x" * (1 << 16)


@contextlib.asynccontextmanager
async def serving(
    handle: Handler, grace_s: float = 20.0, max_connections: int = 100, listening: socket.socket | None = None
) -> AsyncIterator[tuple[HttpServer, int]]:
    listening = listening or socket.create_server(("127.0.0.1", 0))
    server = HttpServer(Doors(handle, turn_away, max_connections, grace_s, Outbox()))
    task = asyncio.create_task(server.serve(listening))
    try:
        yield server, listening.getsockname()[1]
    finally:
        server.stop()
        async with asyncio.timeout(20):
            await task


async def turn_away(exchange: Exchange) -> None:
    exchange.respond(503, (), b"")


async def ok(exchange: Exchange) -> None:
    exchange.respond(200, (), b"")


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while True:
            await asyncio.sleep(0.001)
            if condition():
                return


async def receive(reader: asyncio.StreamReader) -> Response:
    response = Response()
    while not response.complete:
        piece = await reader.read(1 << 20)
        assert piece, "the connection ended in mid-answer"
        response.feed(piece)
    return response


def test_a_client_that_does_not_read_holds_its_stream_up_and_reading_lets_it_go_on():
    async def scenario() -> None:
        held = asyncio.Event()
        num_bytes = 0

        async def flood(exchange: Exchange) -> None:
            nonlocal num_bytes
            exchange.open(())
            exchange.on_writable = lambda: exchange.end(b"end")
            while exchange.writable:
                exchange.write(PIECE)
                num_bytes += len(PIECE)
                await asyncio.sleep(0)
            held.set()

        async with serving(flood) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(GET)
            async with asyncio.timeout(20):
                await held.wait()
                response = await receive(reader)
            assert response.body == b"x" * num_bytes + b"end"
            writer.close()

    uvloop.run(scenario())


def test_a_client_that_ends_its_side_with_its_requests_reads_all_answers(monkeypatch):
    monkeypatch.setattr(connection, "END_S", 20.0)

    async def scenario() -> None:
        async def later(exchange: Exchange) -> None:
            await asyncio.sleep(0.01)
            exchange.respond(200, (), exchange.path.encode())

        async with serving(later) as (server, port), asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(GET.replace(b"/ ", b"/%d " % i) for i in range(3)))
            writer.write_eof()
            raw = await reader.read()
            assert [raw.count(b"HTTP/1.1 200"), *(raw.count(b"\r\n\r\n/%d" % i) for i in range(3))] == [3, 1, 1, 1]
            await until(lambda: server.num_connections == 0)
            writer.close()

    uvloop.run(scenario())


def test_a_client_that_left_right_after_its_request_is_noticed_by_writing(monkeypatch):
    monkeypatch.setattr(connection, "END_S", 20.0)

    async def scenario() -> None:
        gone = asyncio.Event()

        async def endless(exchange: Exchange) -> None:
            exchange.on_gone = gone.set
            exchange.open(())
            while not gone.is_set():
                exchange.write(b"token")
                await asyncio.sleep(0.001)

        async with serving(endless) as (server, port):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(GET)
            client.close()
            async with asyncio.timeout(20):
                await gone.wait()
            assert server.num_connections == 0

    uvloop.run(scenario())


def test_a_stop_lets_answers_end_and_cuts_those_that_do_not():
    async def scenario() -> None:
        door = asyncio.Event()
        gone: list[str] = []

        async def answer(exchange: Exchange) -> None:
            exchange.open(())
            exchange.write(b"begun")
            exchange.on_gone = lambda: gone.append(exchange.path)
            if exchange.path == "/ends":
                await door.wait()
                exchange.end(b" ended")

        async with serving(answer, grace_s=0.2) as (server, port):
            ends, never = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for (reader, writer), path in ((ends, b"/ends"), (never, b"/never")):
                writer.write(GET.replace(b"/ ", path + b" "))
                await reader.readuntil(b"begun")
            server.stop()
            door.set()
            assert b" ended" in await ends[0].read()
            assert await never[0].read() == b"\r\n"
            assert gone == ["/never"]
            for _, writer in (ends, never):
                writer.close()

    uvloop.run(scenario())


def test_a_stop_before_it_serves_is_one():
    async def scenario() -> None:
        async def nobody(exchange: Exchange) -> None:
            raise AssertionError

        listening = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(Doors(nobody, nobody, 1, 1.0, Outbox()))
        server.stop()
        async with asyncio.timeout(20):
            await server.serve(listening)
        assert listening.fileno() == -1

    uvloop.run(scenario())


def test_connections_over_the_limit_get_one_answer_and_more_of_them_wait(monkeypatch):
    monkeypatch.setattr(http_server, "SPARE", 1)

    async def scenario() -> None:
        async with serving(ok, max_connections=1) as (server, port), asyncio.timeout(20):
            clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            (first, asks), (over, asks_over), (waiting, asks_waiting) = clients
            await until(lambda: server.num_connections == 2)
            asks_waiting.write(GET)
            asks_over.write(GET)
            refusal = await receive(over)
            assert (refusal.status, refusal.headers["connection"]) == (503, "close")
            assert await over.read() == b""
            assert (await receive(waiting)).status == 503, "the first is still there"
            for _ in range(2):
                asks.write(GET)
                assert (await receive(first)).status == 200
            asks.close()
            await until(lambda: server.num_connections == 0)
            again, asks_again = await asyncio.open_connection("127.0.0.1", port)
            asks_again.write(GET)
            assert (await receive(again)).status == 200
            for _, writer in (*clients, (again, asks_again)):
                writer.close()

    uvloop.run(scenario())


def test_those_that_are_turned_away_take_nobody_s_place():
    async def scenario() -> None:
        async with serving(ok, max_connections=1) as (server, port), asyncio.timeout(20):
            first, over = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await until(lambda: server.num_connections == 2)
            first[1].close()
            await until(lambda: server.num_connections == 1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            assert (await receive(reader)).status == 200, "the one that is over has said nothing yet"
            for each in (over[1], writer):
                each.close()

    uvloop.run(scenario())


class Starved(socket.socket):
    """A listening socket of a process that may open no more files."""

    num_asked = 0
    fault: int | None = errno.EMFILE

    def accept(self) -> tuple[socket.socket, object]:
        self.num_asked += 1
        if self.fault is not None:
            raise OSError(self.fault, os.strerror(self.fault))
        return super().accept()


def starved() -> Starved:
    listening = Starved(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind(("127.0.0.1", 0))
    listening.listen(16)
    return listening


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_files_nobody_is_accepted_until_the_next_check(monkeypatch, fault):
    sleep, due = asyncio.sleep, asyncio.Semaphore(0)
    monkeypatch.setattr(http_server.asyncio, "sleep", lambda s: due.acquire() if s == http_server.CHECK_S else sleep(s))

    async def scenario() -> None:
        listening = starved()
        listening.fault = fault
        async with serving(ok, listening=listening) as (_, port), asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            await until(lambda: listening.num_asked)
            for _ in range(100):
                await asyncio.sleep(0)
            assert listening.num_asked == 1, "it asks the kernel without end"
            listening.fault = None
            due.release()
            assert (await receive(reader)).status == 200
            writer.close()

    uvloop.run(scenario())


def test_who_leaves_before_he_is_accepted_does_no_harm():
    async def scenario() -> None:
        listening = starved()
        accepts = iter([ConnectionAbortedError(errno.ECONNABORTED, "it has left"), socket.socket()])
        real = listening.accept

        def accept() -> tuple[socket.socket, object]:
            match next(accepts, None):
                case OSError() as error:
                    raise error
                case socket.socket() as ended:
                    ended.close()
                    return ended, None
            listening.fault = None
            return real()

        listening.accept = accept
        async with serving(ok, listening=listening) as (server, port), asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            assert (await receive(reader)).status == 200
            assert server.num_connections == 1
            writer.close()

    uvloop.run(scenario())
