"""HTTP clients without a network: bytes to a real Connection and back, over a transport that is a list.

    client = Client(handle, "POST", "/v1/completions", body, {})
    reply = await client.reply()
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httptools
import msgspec

from diptych.cluster.gateway.connection import Connection, Handler
from diptych.cluster.gateway.outbox import Outbox


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream, "[DONE]" as it is."""
        lines = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        """Of a streamed answer's first choice."""
        chunks = [choice for event in self.events if event != "[DONE]" for choice in event.get("choices", []) if choice["index"] == 0]
        return "".join(chunk["text"] if "text" in chunk else chunk["delta"].get("content", "") for chunk in chunks)


class Socket(asyncio.Transport):
    """The client's end: keeps what is written to it, and takes no more than the first byte while it is not `reading`."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []        # each by one write
        self.held: list[bytes] = []           # written, not taken
        self.reading = True
        self.reads_requests = True
        self.closed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()        # True: in order

    def connect(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol
        protocol.connection_made(self)

    def read_on(self) -> None:
        self.reading = True
        self.written += self.held
        self.held.clear()
        self.protocol.resume_writing()

    def write(self, data: Any) -> None:
        if self.reading:
            self.written.append(bytes(data))
        else:
            self.held.append(bytes(data))
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        """Nothing more will come: the client leaves, too."""
        self._lose(in_order=True)

    def close(self) -> None:
        self._lose(in_order=True)

    def abort(self) -> None:
        self._lose(in_order=False)

    def end(self) -> None:
        """The client sends no more."""
        if not self.protocol.eof_received():
            self.close()

    def is_closing(self) -> bool:
        return self.closed.done()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.held))

    def pause_reading(self) -> None:
        self.reads_requests = False

    def resume_reading(self) -> None:
        self.reads_requests = True

    def _lose(self, *, in_order: bool) -> None:
        if not self.closed.done():
            self.closed.set_result(in_order)
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Response:
    """Bytes of one answer → its parts."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, raw: bytes) -> None:
        self._parser.feed_data(raw)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class Client:
    """One request on a connection of its own. It can leave at any time, and stop reading."""

    def __init__(
        self, handle: Handler, method: str, path: str, body: bytes, headers: dict[str, str], outbox: Outbox | None = None
    ) -> None:
        self.socket = Socket()
        self.socket.connect(Connection(handle, asyncio.get_running_loop().time, lambda connection: None, outbox=outbox))
        if body:
            headers = {"content-length": str(len(body))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._send(f"{method} {path} HTTP/1.1\r\nconnection: close\r\n{head}\r\n".encode("latin-1") + body)

    def leave(self) -> None:
        self.socket.close()

    def stop_reading(self) -> None:
        self.socket.reading = False

    def read_on(self) -> None:
        self.socket.read_on()

    async def over(self) -> bool:
        """True: the connection ended in order."""
        async with asyncio.timeout(20):
            return await asyncio.shield(self.socket.closed)

    @property
    def writes(self) -> list[bytes]:
        return self.socket.written

    async def reply(self) -> Reply:
        await self.over()
        response = Response()
        response.feed(b"".join(self.socket.written))
        return Reply(response.status, response.headers, response.body, response.complete)

    def _send(self, raw: bytes) -> None:
        for start in range(0, len(raw), 1 << 16):
            self.socket.protocol.data_received(raw[start : start + (1 << 16)])
