"""A stub of an OpenAI server: it streams tokens at set times, or fails in a set way. It runs in a thread with a loop of its own."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Behaviour:
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    status: int = 200
    tokens: int | None = None           # None: max_tokens
    drop_after: int | None = None       # cut the connection after so many tokens
    error_after: int | None = None      # an error event after so many
    hang_after: int | None = None
    not_http: bool = False
    close: bool = False                 # the connection, silently, once the answer is complete
    per_chunk: int = 1
    with_usage: bool = True
    cached_share: float = 0.5           # of the prompt
    finish: bool = True


@dataclass
class Stub:
    behave: Callable[[int], Behaviour] = lambda index: Behaviour()
    card: dict[str, Any] = field(default_factory=lambda: {"id": "stub", "vocab_size": 1000, "max_model_len": 4096})
    models_status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_connections: int = 0
    disconnected: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self.serve_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.disconnected.set()
        finally:
            writer.close()

    async def serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (text.split(": ", 1) for text in rest)}
        self.headers.append(headers)
        if line.startswith("GET /v1/models "):
            respond(writer, self.models_status, json.dumps({"object": "list", "data": [self.card]}).encode())
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        behaviour = self.behave(len(self.bodies))
        self.bodies.append({"path": line.split()[1], **body})
        return await stream(reader, writer, body, behaviour)


def respond(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(f"HTTP/1.1 {status} Some Reason\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any], behaviour: Behaviour) -> bool:
    if behaviour.not_http:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        return False
    if behaviour.status != 200:
        respond(writer, behaviour.status, b'{"error": {"message": "said no"}}')
        return True
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    tokens = body["max_tokens"] if behaviour.tokens is None else behaviour.tokens
    chat = "messages" in body
    if chat:
        event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    await asyncio.sleep(behaviour.ttft_s)
    for sent in range(0, tokens, behaviour.per_chunk):
        if behaviour.drop_after is not None and sent >= behaviour.drop_after:
            return False
        if behaviour.error_after is not None and sent >= behaviour.error_after:
            event(writer, {"error": {"message": "out of pages"}})
            break
        if behaviour.hang_after is not None and sent >= behaviour.hang_after:
            await reader.readexactly(1)                             # until the client goes away
        if sent:
            await asyncio.sleep(behaviour.tpot_s * behaviour.per_chunk)
        is_last = sent + behaviour.per_chunk >= tokens and behaviour.finish
        choice: dict[str, Any] = {"delta": {"content": " a"}} if chat else {"text": " a"}
        event(writer, {"choices": [choice | {"finish_reason": "length" if is_last else None}]})
        await writer.drain()
    if behaviour.with_usage:
        prompt_tokens = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
        details = {"cached_tokens": int(prompt_tokens * behaviour.cached_share)}
        event(writer, {"choices": [], "usage": usage | {"prompt_tokens_details": details}})
    chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return not behaviour.close


def event(writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
    chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")


def chunk(writer: asyncio.StreamWriter, piece: bytes) -> None:
    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")


@pytest.fixture
def behaviour() -> type[Behaviour]:
    return Behaviour


@pytest.fixture
def stub() -> Iterator[Stub]:
    loop, server_stub = asyncio.new_event_loop(), Stub()
    server = loop.run_until_complete(asyncio.start_server(server_stub.serve_connection, "127.0.0.1", 0))
    server_stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server_stub
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    server.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
