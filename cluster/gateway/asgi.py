"""ASGI → Exchange: the adapter for uvicorn, and for any other ASGI server."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import BadRequest
from .exchange import ClientGone, Exchange, Headers

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class AsgiExchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status: int | None = None
        self._headers: dict[str, str] | None = None              # once somebody has asked

    @property
    def method(self) -> str:
        return str(self._scope["method"])

    @property
    def path(self) -> str:
        return str(self._scope["path"])

    @property
    def status(self) -> int | None:
        return self._status

    def header(self, name: str) -> str | None:
        if self._headers is None:             # of equal names the first counts
            given = reversed(self._scope["headers"])
            self._headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in given}
        return self._headers.get(name)

    async def read(self, max_bytes: int) -> bytes:
        declared = self.header("content-length")
        body = bytearray()
        self._check_size(int(declared) if declared and declared.isdecimal() else 0, max_bytes)
        while True:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise ClientGone
            body += event.get("body", b"")
            self._check_size(len(body), max_bytes)
            if not event.get("more_body", False):
                return bytes(body)

    async def gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        await self._start(status, (*headers, ("content-length", str(len(body)))))
        await self._send({"type": "http.response.body", "body": body})

    async def open(self, headers: Headers) -> None:
        await self._start(200, headers)

    async def write(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def close(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: Headers) -> None:
        self._status = status
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    @staticmethod
    def _check_size(num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise BadRequest(f"the body has {num_bytes} bytes or more; the limit is {max_bytes}", code="request_too_large", status=413)


def asgi(handle: Callable[[Exchange], Awaitable[None]]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", f"{scope['type']}: lifespan and websockets are switched off"
        await handle(AsgiExchange(scope, receive, send))

    return app
