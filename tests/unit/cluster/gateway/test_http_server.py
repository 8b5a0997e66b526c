"""Real sockets and uvloop, with handlers of a few lines."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvloop
from harness.http_bytes import Response

from diptych.cluster.gateway.connection import Handler
from diptych.cluster.gateway.exchange import Exchange
from diptych.cluster.gateway.http_server import HttpServer

GET = b"GET / HTTP/1.1\r\n\r\n"
PIECE = b"x" * (1 << 16)


@contextlib.asynccontextmanager
async def serving(handle: Handler, grace_s: float = 20.0) -> AsyncIterator[tuple[HttpServer, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(handle, grace_s)
    task = asyncio.create_task(server.serve(listening, 16))
    try:
        yield server, listening.getsockname()[1]
    finally:
        server.stop()
        async with asyncio.timeout(20):
            await task


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
        server = HttpServer(nobody, 1.0)
        server.stop()
        async with asyncio.timeout(20):
            await server.serve(listening, 16)
        assert listening.fileno() == -1

    uvloop.run(scenario())
