"""Carries an answer to its client: whole, or as server-sent events, one write for each step.

    before the first byte   an error is an HTTP status
    after it                an error is `data: {"error": …}`, and the stream ends without [DONE]
    the client leaves       everything it asked for is aborted
    the client reads slowly the write waits; too many unread tokens, or the deadline, end it
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from ...messages.errors import DiptychError
from .answer import Answer, join
from .choice import Piece
from .dialects import Dialect
from .errors import to_http
from .exchange import Exchange, Headers
from .jobs import Job

JSON = ("content-type", "application/json")
SSE: Headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
DONE = b"data: [DONE]\n\n"
WRITE_GRACE_S = 5.0
"""After the request's deadline, for the error to reach the client."""


async def respond(
    exchange: Exchange, answer: Answer, dialect: Dialect, job: Job, headers: Callable[[], Headers], timeout_s: float
) -> None:
    """`headers` is asked at the first byte. Raises DiptychError for a failure before it."""
    watcher = asyncio.create_task(_abort_when_gone(exchange, answer))
    try:
        async with asyncio.timeout(timeout_s + WRITE_GRACE_S) as patience:
            answer.on_slow(lambda: None if patience.expired() else patience.reschedule(0))
            answer.start()
            if job.stream:
                await _Stream(exchange, answer, dialect, headers).run(usage=job.include_usage)
            else:
                await _whole(exchange, answer, dialect, headers)
    except TimeoutError:
        return                                # a write is stuck: the server closes the connection of an unfinished answer
    finally:
        watcher.cancel()
        answer.abort()


async def _abort_when_gone(exchange: Exchange, answer: Answer) -> None:
    await exchange.gone()
    answer.abort()


async def _whole(exchange: Exchange, answer: Answer, dialect: Dialect, headers: Callable[[], Headers]) -> None:
    pieces: dict[int, list[Piece]] = {}
    while not answer.done:
        await answer.wait()
        if answer.aborted:
            return
        for index, piece in answer.take():
            pieces.setdefault(index, []).append(piece)
    wholes = [join(pieces[index]) for index in sorted(pieces)]
    await exchange.respond(200, (JSON, *headers()), dialect.whole(wholes, answer.usage()))


class _Stream:
    def __init__(self, exchange: Exchange, answer: Answer, dialect: Dialect, headers: Callable[[], Headers]) -> None:
        self._exchange = exchange
        self._answer = answer
        self._dialect = dialect
        self._headers = headers
        self._begun: set[int] = set()         # choices that have had their first chunk
        self._open = False

    async def run(self, *, usage: bool) -> None:
        try:
            while not self._answer.done:
                await self._answer.wait()
                if self._answer.aborted:
                    return
                await self._write(b"".join(self._chunks(self._answer.take())))
        except DiptychError as error:
            if not self._open:
                raise
            await self._write(_event(to_http(error).body))
        else:
            last = _event(self._dialect.usage_chunk(self._answer.usage())) if usage else b""
            await self._write(last + DONE)
        await self._exchange.close()

    def _chunks(self, pieces: Sequence[tuple[int, Piece]]) -> Iterator[bytes]:
        for index, piece in pieces:
            first = index not in self._begun
            if first or piece.text or piece.tokens or piece.finish is not None:
                self._begun.add(index)
                yield _event(self._dialect.chunk(index, piece, first=first))

    async def _write(self, events: bytes) -> None:
        if not self._open:
            self._open = True
            await self._exchange.open((*SSE, *self._headers()))
        if events:
            await self._exchange.write(events)


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"
