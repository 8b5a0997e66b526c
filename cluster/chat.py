"""A chat with an OpenAI-compatible endpoint over plain HTTP, answer by answer as it streams."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from ..messages.errors import ClusterError
from .plain_http import open_http

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 60.0                      # between two pieces of an answer


@dataclass
class Answer:
    """What came, and when. Iterate over `pieces` to receive it."""

    pieces: Iterator[str]
    asked_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None              # arrival of the first piece
    last_s: float | None = None
    num_tokens: int = 0                       # as the server counted them

    @property
    def ttft_s(self) -> float:
        """Raises ClusterError if nothing has come."""
        if self.first_s is None:
            raise ClusterError("the answer is empty")
        return self.first_s - self.asked_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass
class Chat:
    """Keeps the conversation; `ask` adds to it once an answer is complete."""

    endpoint: str                             # http://host:port, or with /v1, as clients of OpenAI's are given it
    api_key: str | None = None
    max_tokens: int = 200
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises EndpointError, ClusterError."""
        self._http = open_http(self.endpoint, self.api_key, httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S))
        self._model = self._first_model()

    def ask(self, text: str) -> Answer:
        answer = Answer(iter(()))
        answer.pieces = self._receive(text, answer)
        return answer

    def _first_model(self) -> str:
        """Raises ClusterError."""
        try:
            reply = self._http.get("/v1/models")
            if reply.status_code != 200:
                raise ClusterError(f"{self.endpoint}: HTTP {reply.status_code}: {_error_text(reply)}")
            return str(reply.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise ClusterError(f"{self.endpoint} does not answer: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise ClusterError(f"{self.endpoint} does not list models as OpenAI does") from None

    def _receive(self, text: str, answer: Answer) -> Iterator[str]:
        messages = [*self.messages, {"role": "user", "content": text}]
        said = ""
        for chunk in self._stream(messages):
            for choice in chunk.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    answer.last_s = time.perf_counter()
                    answer.first_s = answer.first_s or answer.last_s
                    said += piece
                    yield piece
            if usage := chunk.get("usage"):
                answer.num_tokens = usage["completion_tokens"]
        self.messages = [*messages, {"role": "assistant", "content": said}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise ClusterError(f"HTTP {reply.status_code}: {_error_text(reply)}")
                yield from _events(_lines(reply.iter_bytes()))
        except httpx.HTTPError as error:
            raise ClusterError(f"{self.endpoint}: the answer broke off: {error or type(error).__name__}") from None


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """They end at line feeds alone: a text may hold what Python takes for the end of a line, too."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace").removesuffix("\r") for line in whole)
    if rest:
        yield rest.decode(errors="replace")                      # the last one may lack its end


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Raises ClusterError for an error within the stream, and for a stream without an end."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ClusterError(event["error"]["message"])
            yield event
    raise ClusterError("the stream ended before it was done")


def _error_text(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return reply.text[:500]
