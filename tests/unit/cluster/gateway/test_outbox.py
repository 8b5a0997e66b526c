"""Held writes keep their order, also with what is done to a connection beside writing."""

import asyncio

from harness.gateway import in_loop
from harness.http_bytes import Socket

from diptych.cluster.gateway.connection import Connection
from diptych.cluster.gateway.exchange import Exchange
from diptych.cluster.gateway.outbox import MAX_HELD, Outbox

GET = b"GET / HTTP/1.1\r\n\r\n"


@in_loop
async def test_nothing_is_held_unless_it_is_told_to():
    socket, outbox = Socket(), Outbox()
    outbox.write(socket, b"a")
    assert socket.written == [b"a"]
    outbox.hold()
    outbox.write(socket, b"b")
    assert socket.written == [b"a"]
    outbox.flush()
    assert socket.written == [b"a", b"b"]
    outbox.write(socket, b"c")
    assert socket.written == [b"a", b"b"], "a flush is not the end of it"
    outbox.release()
    outbox.write(socket, b"d")
    assert socket.written == [b"a", b"b", b"c", b"d"]


@in_loop
async def test_no_more_than_some_are_held():
    sockets, outbox = [Socket(), Socket()], Outbox()
    outbox.hold()
    for i in range(MAX_HELD - 1):
        outbox.write(sockets[i % 2], b"%d" % i)
    assert [socket.written for socket in sockets] == [[], []]
    outbox.write(sockets[1], b"last")
    assert sum(len(socket.written) for socket in sockets) == MAX_HELD
    assert sockets[1].written[-1] == b"last"


@in_loop
async def test_a_write_that_fails_cuts_its_own_connection_alone():
    sockets, outbox = [Socket() for _ in range(3)], Outbox()
    sockets[1].write = fail
    sockets[1].connect(asyncio.Protocol())
    outbox.hold()
    for socket in sockets * 2:
        outbox.write(socket, b"a")
    outbox.release()
    assert [socket.written for socket in sockets] == [[b"a", b"a"], [], [b"a", b"a"]]
    assert [socket.is_closing() for socket in sockets] == [False, True, False]


def fail(raw: bytes) -> None:
    raise RuntimeError("Cannot call write() after write_eof()")


class Line:
    def __init__(self) -> None:
        self.socket, self.outbox = Socket(), Outbox()
        self.exchanges: list[Exchange] = []
        self.connection = Connection(self._handle, lambda: 0.0, lambda connection: None, outbox=self.outbox)
        self.socket.connect(self.connection)

    async def _handle(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)


@in_loop
async def test_a_connection_is_closed_after_what_is_held_for_it():
    line = Line()
    line.connection.data_received(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    line.outbox.hold()
    line.exchanges[0].open(())
    line.exchanges[0].write(b"one")
    assert line.socket.written == []
    line.exchanges[0].end(b"two")
    assert line.socket.is_closing()
    assert b"".join(line.socket.written).endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


@in_loop
async def test_what_is_held_is_not_lost_when_a_connection_is_cut():
    line = Line()
    line.connection.data_received(GET)
    line.outbox.hold()
    line.exchanges[0].open(())
    line.exchanges[0].write(b"one")
    line.exchanges[0].abort()
    assert b"".join(line.socket.written).endswith(b"3\r\none\r\n")


@in_loop
async def test_an_answer_that_is_held_is_before_the_next_one():
    line = Line()
    line.connection.data_received(GET * 2)
    line.outbox.hold()
    line.exchanges[0].respond(200, (), b"first")
    line.exchanges[1].respond(200, (), b"second")
    line.outbox.release()
    assert [raw.rpartition(b"\r\n")[2] for raw in line.socket.written] == [b"first", b"second"]


@in_loop
async def test_a_client_that_does_not_read_is_noticed_when_the_writes_are_made():
    line = Line()
    line.connection.data_received(GET)
    line.socket.reading = False
    line.outbox.hold()
    line.exchanges[0].open(())
    line.exchanges[0].write(b"one")
    assert line.exchanges[0].writable
    line.outbox.release()
    assert not line.exchanges[0].writable


@in_loop
async def test_to_a_connection_that_was_cut_nothing_is_written_and_the_others_get_theirs():
    cut, other, outbox = Socket(), Socket(), Outbox()
    for socket in (cut, other):
        socket.connect(Connection(nobody, lambda: 0.0, lambda connection: None))
    outbox.hold()
    cut.abort()
    outbox.write(cut, b"a")
    outbox.write(other, b"b")
    outbox.release()
    assert (cut.written, other.written) == ([], [b"b"])


async def nobody(exchange: Exchange) -> None:
    raise AssertionError(f"{exchange.path} was asked for")
