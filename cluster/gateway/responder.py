"""Carries an answer to its client: whole, or as server-sent events, one write for each step. No task: it is called when there is news.

    before the first byte   an error is an HTTP status; it waits until every choice has a route, so that a refusal is one
    after it                an error is `data: {"error": …}`, and the stream ends without [DONE]
    the client leaves       everything it asked for is aborted
    the client reads slowly what comes waits; too many unread tokens, or the deadline, cut the connection
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

from ...messages.errors import DiptychError
from .answer import Answer
from .choice import Piece
from .dialects import Dialect, Part
from .errors import SlowClient, to_http
from .exchange import Exchange, nothing
from .outbox import Outbox
from .response_head import Headers

JSON = ("content-type", "application/json")
SSE: Headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
DONE = b"data: [DONE]\n\n"
SLICE_S, LONG_SLICE_S, BUSY_AFTER_S, LEAST_SHARE = 0.000_25, 0.001, 0.1, 0.2
WRITE_GRACE_S = 5.0
"""After the request's deadline, for the error to reach the client."""


class Turn:
    """Who has news is called when the messages at hand have all been taken in: so a step is one write, however many choices it is of.

    Answers that have not begun come first. The others wait in line, for a step's tokens can take ten milliseconds to write: every SLICE_S
    the loop looks at what has come meanwhile, requests and first tokens. Once it has been writing for BUSY_AFTER_S without an end, looking
    costs more than it gains, and slices are longer. However many requests come, LEAST_SHARE of the time is for answers under way.
    """

    def __init__(self, outbox: Outbox, clock: Callable[[], float] = perf_counter) -> None:
        self._outbox = outbox
        self._clock = clock
        self._first = deque[Callable[[], None]]()
        self._others = deque[Callable[[], None]]()
        self._began: float | None = None      # writing without an end; None: nobody has news
        self._left = 0.0                      # when the loop went elsewhere

    def add(self, call: Callable[[], None], is_first: bool) -> None:
        """`call` raises nothing."""
        if self._began is None:
            self._began = self._left = self._clock()
            asyncio.get_running_loop().call_soon(self._run)
        (self._first if is_first else self._others).append(call)

    def _run(self) -> None:
        self._outbox.hold()
        try:
            self._write()
        finally:
            self._outbox.release()
            self._left = self._clock()
            if self._first or self._others:
                asyncio.get_running_loop().call_soon(self._run)
            else:
                self._began = None

    def _write(self) -> None:
        assert self._began is not None, "nobody has news"
        while self._first:
            self._first.popleft()()
        self._outbox.flush()
        now = self._clock()
        slice_s = SLICE_S if now - self._began < BUSY_AFTER_S else LONG_SLICE_S
        end = now + max(slice_s, LEAST_SHARE / (1 - LEAST_SHARE) * (now - self._left))
        while self._others and now < end:
            self._others.popleft()()
            now = self._clock()


class Reply(NamedTuple):
    exchange: Exchange
    answer: Answer
    dialect: Dialect[Any]
    headers: Callable[[], Headers]            # asked at the first byte
    fail: Callable[[Exception], None]         # is told what goes wrong before it, and every fault of ours
    ended: Callable[[], None]                 # called once, however the answer ends, and before `fail`


class Responder(ABC):
    def __init__(self, reply: Reply) -> None:
        self._exchange = reply.exchange
        self._answer = reply.answer
        self._dialect = reply.dialect
        self._headers = reply.headers
        self._fail = reply.fail
        self._ended = reply.ended
        self._over = False

    def start(self, turn: Turn) -> None:
        self._exchange.on_gone = self._end
        self._answer.start(lambda: turn.add(self._deliver, self._exchange.status is None))

    @abstractmethod
    def _take(self) -> None:
        """What is new. Raises the error of a choice that failed."""

    def _tell(self, error: DiptychError) -> None:
        self._fail(error)

    def _deliver(self) -> None:
        if self._over:
            return
        try:
            self._take()
        except DiptychError as error:
            self._answer.fail(error)
            self._end()
            self._tell(error)
        except Exception as error:
            self._end()
            self._fail(error)

    def _end(self) -> None:
        """A second time it does nothing."""
        if self._over:
            return
        self._over = True
        self._exchange.on_gone = self._exchange.on_writable = nothing
        self._answer.close()
        self._ended()


class WholeResponder(Responder):
    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self._parts: dict[int, list[Part[Any]]] = {}

    def _take(self) -> None:
        for index, piece in self._answer.take():
            self._parts.setdefault(index, []).append(self._dialect.part(piece))
        if not self._answer.num_open:
            body = self._dialect.whole([self._parts[index] for index in sorted(self._parts)], self._answer.usage())
            self._end()
            self._exchange.respond(200, (JSON, *self._headers()), body)


class StreamResponder(Responder):
    def __init__(self, reply: Reply, *, usage: bool, timeout_s: float) -> None:
        super().__init__(reply)
        self._usage = usage
        self._begun: set[int] = set()         # choices that have had their first chunk
        self._cut_at = asyncio.get_running_loop().time() + timeout_s + WRITE_GRACE_S
        self._patience: asyncio.TimerHandle | None = None     # while the client does not read

    def start(self, turn: Turn) -> None:
        self._exchange.on_writable = self._deliver
        super().start(turn)

    def _take(self) -> None:
        if not self._exchange.writable:
            self._wait()
            return
        if self._exchange.status is None and not self._answer.may_be_told:
            return
        events = b""
        for index, piece in self._answer.take():
            events += self._chunk(index, piece)
        if not self._answer.num_open:
            self._finish(events + self._usage_event() + DONE)
        elif events:
            self._open()
            self._exchange.write(events)

    def _chunk(self, index: int, piece: Piece) -> bytes:
        first = index not in self._begun
        if not (first or piece.text or piece.tokens or piece.finish is not None):
            return b""
        self._begun.add(index)
        return _event(self._dialect.chunk(index, piece, first=first))

    def _usage_event(self) -> bytes:
        return _event(self._dialect.usage_chunk(self._answer.usage())) if self._usage else b""

    def _tell(self, error: DiptychError) -> None:
        if self._exchange.status is None:
            self._fail(error)
        else:
            self._finish(_event(to_http(error).body))

    def _open(self) -> None:
        if self._exchange.status is None:
            self._exchange.open((*SSE, *self._headers()))

    def _finish(self, events: bytes) -> None:
        self._end()
        self._open()
        self._exchange.end(events)

    def _wait(self) -> None:
        """What comes piles up until the client reads again: up to a number of tokens, and until the deadline."""
        if isinstance(self._answer.error, SlowClient):
            self._cut()
        elif self._patience is None:
            self._patience = asyncio.get_running_loop().call_at(self._cut_at, self._cut)

    def _cut(self) -> None:
        self._end()
        self._exchange.abort()

    def _end(self) -> None:
        super()._end()
        if self._patience is not None:
            self._patience.cancel()


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"
