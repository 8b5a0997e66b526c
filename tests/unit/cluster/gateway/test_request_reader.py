"""Requests out of bytes: the same however they are split and whether their heads are known or not, and what is no request of ours."""

import asyncio
from typing import Any

import pytest
from harness.gateway import in_loop
from harness.http_bytes import Response
from harness.http_line import (
    CHUNKED,
    CHUNKED_UPGRADE,
    GET,
    GET_UPGRADE,
    LAST,
    LONG,
    MAX_BODY,
    OLD,
    POST,
    POST_UPGRADE,
    SETTINGS,
    Line,
    ok,
    swallow,
)
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway import request_reader as module
from diptych.cluster.gateway.connection import KEEP_ALIVE_S
from diptych.cluster.gateway.exchange import Exchange
from diptych.cluster.gateway.request_reader import MAX_HEAD_BYTES, MAX_KNOWN_BYTES


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
        long = b"POST / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        await line.feed(long, POST, b"\r\n" * 1000, POST)
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
