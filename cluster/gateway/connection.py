"""One client's connection: its requests are answered one at a time, in the order they came.

    data ──► RequestReader ──► Exchange ──► its turn ──► handle(exchange)
    answered ──► the next one, or closed if either side wants it so
    refused by the reader ──► what came before is answered, then this with a 4xx; nothing more is read

A client that ends its side together with its last request is answered; one that does so later has left, as far as anybody can tell, and
what it asked for is cancelled.

Requests sent ahead of their turn wait. Reading goes on, or a client that leaves would not be noticed, until MAX_AHEAD_BYTES of them are
held. `check`, called every second, ends what is idle or too slow.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

from .eager import start
from .errors import BadRequest, to_http
from .exchange import Exchange
from .outbox import Outbox
from .request_reader import RequestReader
from .response_head import response_head

MAX_AHEAD_BYTES = 64 << 10                    # and the piece that goes over it
KEEP_ALIVE_S = 75.0                           # between requests, and for a client that does not take the end of its answer
READ_S = 30.0                                 # for a head, and for each piece of a body
BODY_S = 120.0                                # for all of a body, from its turn on: 8 MiB at 70 KB/s
END_S = 0.1                                   # after the last byte, that a client's end of sending belongs to it
LINGER_S = 5.0                                # for a client that goes on sending: a reset would take its answer from it; and `once`

Handler = Callable[[Exchange], Coroutine[Any, Any, None]]


class Connection(asyncio.Protocol):
    """A Channel. `handle` raises nothing."""

    def __init__(
        self,
        handle: Handler,
        clock: Callable[[], float],
        on_lost: Callable[["Connection"], None],
        *,
        outbox: Outbox | None = None,
        once: bool = False,
    ) -> None:
        """`once`: the first answer is the last, and its request is not waited for long."""
        self._handle = handle
        self._clock = clock
        self._on_lost = on_lost
        self._outbox = outbox or Outbox()
        self._transport: asyncio.Transport | None = None      # while there is one
        self._queue: deque[Exchange] = deque()
        self._reader = RequestReader(self, clock, self._queue.append)
        self._current: Exchange | None = None                 # whose turn it is
        self._ahead_bytes = 0                 # came while requests waited for their turn
        self._leaving = False                 # the last answer is written
        self._holding = False                 # nothing is read
        self._advancing = False
        self._draining = once                 # what is being answered, or comes next, is the last
        self._since = clock()                 # the last progress but the reader's
        self._turn_at = self._since           # the current one's
        self._unsent = 0                      # bytes, at the last check
        self._writable = True

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        if self._leaving:                     # it was drained before it began
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._reader.is_last:
            return
        self._reader.feed(data)
        if self._queue:
            self._ahead_bytes += len(data)
        self._advance()

    def eof_received(self) -> bool:
        """Whether the transport stays open, for answers: it would not tell if the client left now, but writing does."""
        is_due = self._current is not None or bool(self._queue)
        if not (is_due and self._reader.is_between and self._clock() - self._reader.heard_at <= END_S):
            return False
        self._reader.is_last = True
        return True

    def pause_writing(self) -> None:
        self._writable = False
        if self._current is not None:
            self._current.writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if self._current is not None:
            self._current.writable = True
            self._current.on_writable()
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self._reader.is_last = None, True
        if self._current is not None:
            self._current.lost()
        self._queue.clear()
        self._on_lost(self)

    # Channel

    @property
    def stays(self) -> bool:
        is_last = self._reader.is_last and not self._queue and self._reader.refusal is None
        return not (is_last or self._draining)

    def send(self, raw: bytes) -> None:
        if self._transport is not None:
            self._outbox.write(self._transport, raw)

    def answered(self) -> None:
        exchange, self._current = self._current, None
        if exchange is None or self._transport is None:
            return
        self._since = self._clock()
        if not (exchange.keeps_alive and self.stays):
            self._leave(whole=exchange.complete)
        self._advance()

    def abort(self) -> None:
        if self._transport is not None:
            self._outbox.flush()
            self._transport.abort()

    # the server

    def drain(self) -> None:
        """What is being answered is the last."""
        self._draining = True
        if self._current is None and not self._leaving:
            self._leave(whole=True)

    def check(self, now: float) -> None:
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._since = now
        self._unsent = unsent
        waited_s = now - max(self._since, self._reader.since)
        if self._awaits_request:
            limit_s = LINGER_S if self._draining else READ_S
            if waited_s > limit_s:
                self._time_out(f"nothing more of the request has come for {limit_s:g} s")
            elif self._current is not None and now - self._turn_at > BODY_S:
                self._time_out(f"the body is not here as a whole after {BODY_S:g} s")
        elif waited_s > self._patience_s():
            self.abort()

    @property
    def _awaits_request(self) -> bool:
        """The one whose turn it is."""
        if self._leaving:
            return False
        return self._reader.in_head if self._current is None else self._current is self._reader.reading

    def _time_out(self, text: str) -> None:
        self._reader.fail(BadRequest(text, code="request_timeout", status=408))
        self._advance()

    def _patience_s(self) -> float:
        if self._current is not None:
            return math.inf                   # the answer has its own deadline
        is_short = not self._unsent if self._leaving else self._draining
        return LINGER_S if is_short else KEEP_ALIVE_S

    def _advance(self) -> None:
        """Whoever's turn it is gets it. (In a loop: an answer that is there at once would come back here, as deep as requests are many.)"""
        if self._advancing or self._transport is None:
            return
        self._advancing = True
        while self._queue and self._current is None and self._writable:
            self._current, self._turn_at = self._queue.popleft(), self._clock()
            start(self._handle(self._current))
        self._advancing = False
        if self._reader.refusal is not None and self._current is None and not self._queue and not self._leaving:
            self._refuse(self._reader.refusal)
        if not self._queue:
            self._ahead_bytes = 0
        self._hold(self._ahead_bytes > MAX_AHEAD_BYTES)

    def _hold(self, holding: bool) -> None:
        if holding is self._holding or self._transport is None or self._transport.is_closing():
            return
        self._holding, self._since = holding, self._clock()
        if holding:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _refuse(self, refusal: BadRequest) -> None:
        error, self._reader.refusal = to_http(refusal), None
        headers = (("content-type", "application/json"), ("content-length", str(len(error.body))), ("connection", "close"))
        self.send(response_head(error.status, headers) + error.body)
        self._leave(whole=False)

    def _leave(self, *, whole: bool) -> None:
        """`whole`: the client has sent all it will."""
        self._reader.is_last = self._leaving = True
        self._queue.clear()
        if self._transport is None:
            return
        self._outbox.flush()
        if whole:
            self._transport.close()
        else:
            self._transport.write_eof()
