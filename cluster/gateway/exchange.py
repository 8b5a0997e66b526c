"""One HTTP request and the way back, as the handlers see it; an adapter per server makes one (asgi.py)."""

from typing import Protocol

Headers = tuple[tuple[str, str], ...]


class ClientGone(Exception):
    """The client left before its request was complete. Nobody is there to be told."""


class Exchange(Protocol):
    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def status(self) -> int | None:
        """Of the answer that has begun; None before its first byte."""
        ...

    def header(self, name: str) -> str | None:
        """By lower-case name."""
        ...

    async def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises BadRequest (413) as soon as it is known to be larger, ClientGone."""
        ...

    async def gone(self) -> None:
        """Returns when the client has left; may never."""
        ...

    async def respond(self, status: int, headers: Headers, body: bytes) -> None: ...

    async def open(self, headers: Headers) -> None:
        """Starts a streamed 200."""
        ...

    async def write(self, chunk: bytes) -> None:
        """Waits while the client reads more slowly than is written."""
        ...

    async def close(self) -> None:
        """Ends the stream in order."""
        ...
