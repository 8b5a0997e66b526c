"""A gateway process: one thread, one uvloop, one HTTP server, one Post.

    run() ──► bind ──► loop: ┌ Post readable ──► core.pump      (and every POLL_S: its deadlines wake nobody)
                             ├ core.wake_at ───► core.look      at who waits for a route, at the moment that it named
                             ├ every WATCH_S ──► core.watch     deadlines of what runs
                             └ HttpServer ──► App
    stop() from any thread ──► no new connections ──► open answers end, within grace_s ──► run() returns
"""

import asyncio
import math
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import msgspec
import uvloop

from ...messages.errors import ClusterError
from ...messages.membership import Membership
from ...messages.zmq_post import ZmqPost
from ..garbage import settle
from .app import App
from .config import GatewayConfig
from .core import Core
from .decisions import RequestExplanation
from .http_server import Doors, HttpServer
from .open_files import connections_within, raise_file_limit
from .status import GatewayStatus

T = TypeVar("T")

POLL_S = 0.02
WATCH_S = 0.1
BACKLOG = 2048
LOOP_ANSWER_S = 5.0


class Gateway:
    """It listens at once, and answers from `run` on. Raises ClusterError, ModelError, SpecError."""

    def __init__(self, config: GatewayConfig, post: ZmqPost) -> None:
        self._post = post
        config = _within_file_limit(config)
        self._core = Core(config, post)
        self._socket = _bind(config)
        self._port: int = self._socket.getsockname()[1]
        self._app = app = App(self._core)
        limits = config.limits
        self._server = HttpServer(Doors(app.handle, app.turn_away, limits.max_connections, limits.grace_s, app.outbox))
        gauge = self._core.metrics.gauge
        gauge("http_connections", "Open connections of clients", lambda: self._server.num_connections)
        gauge("http_connections_max", "So many are served at a time", lambda: limits.max_connections)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None   # while it runs
        self._failure: BaseException | None = None            # of a background task
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf             # core's clock

    @property
    def port(self) -> int:
        return self._port

    def run(self) -> None:
        """Blocks until stopped; once only. Raises what broke the loop's own tasks."""
        settle()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Returns at once; `run` returns when open answers have ended, after `grace_s` at the latest."""
        with self._lock:
            if self._loop is None:
                self._server.stop()
            else:
                self._loop.call_soon_threadsafe(self._server.stop)

    def close(self) -> None:
        """For a gateway that was never run; `run` closes by itself."""
        self._socket.close()

    def update_membership(self, membership: Membership) -> None:
        self._on_loop(lambda: self._core.update_membership(membership))

    def status(self) -> GatewayStatus:
        return self._on_loop(lambda: self._core.status(self._port))

    def explain(self, some_id: str) -> RequestExplanation | None:
        """None: this gateway does not know, or no longer."""
        return self._on_loop(lambda: self._core.decisions.find(some_id))

    def _on_loop(self, call: Callable[[], T]) -> T:
        """`call`'s result, from whatever thread: in the loop while it runs, else here."""
        with self._lock:
            if self._loop is None or threading.get_ident() == self._loop_thread:
                return call()
            result: Future[T] = Future()
            self._loop.call_soon_threadsafe(_fulfil, result, call)
        return result.result(LOOP_ANSWER_S)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            self._loop, self._loop_thread = loop, threading.get_ident()
        loop.add_reader(self._post.fileno(), self._core.pump)
        self._core.dispatcher.wake_at = self._wake_at
        self._post.gather(self._app.soon)
        beats = [asyncio.create_task(self._beat(POLL_S, self._core.pump)), asyncio.create_task(self._beat(WATCH_S, self._core.watch))]
        try:
            await self._app.siblings.open()
            await self._server.serve(self._socket)
        finally:
            for beat in beats:
                beat.cancel()
            self._app.siblings.close()
            self._core.dispatcher.wake_at = lambda at: None
            self._post.gather(None)
            if self._alarm is not None:
                self._alarm.cancel()
            loop.remove_reader(self._post.fileno())
            with self._lock:
                self._loop = None

    def _wake_at(self, at: float) -> None:
        if at >= self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, at - self._core.clock()), self._look)

    def _look(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        self._core.dispatcher.look()

    async def _beat(self, period_s: float, call: Callable[[], None]) -> None:
        """A gateway that has lost its heartbeat would hang its clients: it stops, and says why."""
        try:
            while True:
                await asyncio.sleep(period_s)
                call()
        except Exception as error:
            self._failure = error
            self.stop()


def _within_file_limit(config: GatewayConfig) -> GatewayConfig:
    """Raises ClusterError if not one connection may be open."""
    asked = config.limits.max_connections
    limits = msgspec.structs.replace(config.limits, max_connections=connections_within(asked, raise_file_limit(asked)))
    return msgspec.structs.replace(config, limits=limits)


def _fulfil(result: "Future[T]", call: Callable[[], T]) -> None:
    try:
        result.set_result(call())
    except Exception as error:
        result.set_exception(error)


def _bind(config: GatewayConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # accepted sockets inherit it: no 40 ms wait before a token
        bound.bind((config.host, config.port))
        bound.listen(BACKLOG)                 # only now is a port that another process holds noticed
    except OSError as error:
        bound.close()
        raise ClusterError(f"gateway {config.gateway_id} cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    return bound
