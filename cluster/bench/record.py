"""What is known of one request: counted while its stream arrives, frozen when it has ended.

    response bytes ─> StreamTally.receive ─> (SSE events ─> chunks, usage, finish reason) ─> RequestRecord

A chunk's time is that of the socket read which brought it. All times are seconds since the run began, on one monotonic clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

MAX_EVENT_BYTES = 4 << 20
MAX_ERROR_BYTES = 4096


class Outcome(Enum):
    OK = "ok"
    REFUSED = "refused"                 # 429 or 503
    HTTP_ERROR = "http_error"           # any other status but 200
    STREAM_ERROR = "stream_error"       # 200, then an error event
    INCOMPLETE = "incomplete"           # 200, then the stream ended or broke off without a finish reason
    EMPTY = "empty"                     # 200 and finished, without a token
    MALFORMED = "malformed"             # not HTTP, not server-sent events, or not the OpenAI schema
    UNREACHABLE = "unreachable"         # no connection
    TIMEOUT = "timeout"                 # not finished at its deadline
    CANCELLED = "cancelled"             # the user pressed Ctrl-C: counts neither as met nor as missed


@dataclass(frozen=True, slots=True)
class Chunk:
    at_s: float
    tokens: int                         # by the chunk's own usage where the server sends it, else 1


@dataclass(frozen=True, slots=True)
class RequestRecord:
    prompt_tokens: int                  # asked
    output_tokens_asked: int
    scheduled_s: float                  # its arrival in the workload
    sent_s: float                       # given to a connection; connecting counts as the server's time, hence within TTFT
    ended_s: float
    outcome: Outcome
    status: int | None = None           # HTTP status, None before one came
    error: str = ""
    finish_reason: str | None = None
    chunks: tuple[Chunk, ...] = ()      # those that carried tokens
    last_token_s: float | None = None   # the last choice, which may be a finish reason whose token has no visible text
    output_tokens: int = 0              # by usage, else counted chunks
    prompt_tokens_seen: int | None = None       # by usage
    cached_tokens: int | None = None            # by usage

    @property
    def lag_s(self) -> float:
        """How late the load generator itself was."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        return self.chunks[0].at_s - self.sent_s if self.chunks else None

    @property
    def tpot_s(self) -> float | None:
        """(t_last − t_first) / (n_out − 1): DistServe, OSDI'24; None below two tokens."""
        if not self.chunks or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.chunks[0].at_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latency as a reader sees it: between successive chunks, however many tokens each brought."""
        return [later.at_s - earlier.at_s for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None             # /v1/completions
    delta: Delta | None = None          # /v1/chat/completions
    finish_reason: str | None = None

    @property
    def carries_token(self) -> bool:
        """A chunk without text is a token with no visible text (half a character), unless it only opens or ends the answer."""
        delta = self.delta or Delta()
        if self.text or delta.content or delta.reasoning_content or delta.reasoning:
            return True
        return self.finish_reason is None and delta.role is None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class StreamEvent(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None                   # any JSON


_decode_event = msgspec.json.Decoder(StreamEvent).decode


class SseSplitter:
    """Bytes in, in any pieces; the data of each finished server-sent event out."""

    def __init__(self) -> None:
        self._tail, self._lines = b"", list[bytes]()

    def feed(self, piece: bytes) -> list[bytes]:
        *lines, self._tail = (self._tail + piece).split(b"\n")
        if len(self._tail) + sum(map(len, self._lines)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event longer than {MAX_EVENT_BYTES} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:
                events.append(b"\n".join(self._lines))
                self._lines = []
        return events


class StreamTally:
    """Takes a response as it arrives. Never raises: what is wrong with it becomes the outcome."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._splitter = SseSplitter()
        self._error_body = b""
        self._failure: tuple[Outcome, str] | None = None
        self._status: int | None = None
        self._chunks: list[Chunk] = []
        self._last_token_s: float | None = None
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._tokens = 0

    def receive(self, status: int, body: bytes) -> None:
        """A piece of the response's body; b"" announces the status alone."""
        self._status = status
        if status != 200:
            self._error_body = (self._error_body + body)[:MAX_ERROR_BYTES]
            return
        now_s = self._clock()
        try:
            for event in self._splitter.feed(body):
                if event != b"[DONE]":
                    self._count(_decode_event(event), now_s)
        except (ValueError, msgspec.MsgspecError) as error:
            self._failure = self._failure or (Outcome.MALFORMED, str(error))

    def _count(self, event: StreamEvent, now_s: float) -> None:
        if event.error is not None:
            self._failure = self._failure or (Outcome.STREAM_ERROR, msgspec.json.encode(event.error).decode()[:MAX_ERROR_BYTES])
            return
        if event.choices:
            choice = event.choices[0]
            self._finish_reason = choice.finish_reason or self._finish_reason
            self._last_token_s = now_s
            if choice.carries_token:
                self._add_chunk(event.usage, now_s)
        self._usage = event.usage or self._usage

    def _add_chunk(self, usage: Usage | None, now_s: float) -> None:
        counted = usage.completion_tokens if usage is not None else None
        tokens = 1 if counted is None else max(0, counted - self._tokens)
        self._tokens += tokens
        self._chunks.append(Chunk(now_s, tokens))

    def outcome(self) -> tuple[Outcome, str]:
        """Of a response that has been received to its end."""
        if self._status in (429, 503):
            return Outcome.REFUSED, self._error_body.decode(errors="replace")
        if self._status != 200:
            return Outcome.HTTP_ERROR, self._error_body.decode(errors="replace")
        if self._failure is not None:
            return self._failure
        if self._finish_reason is None:
            return Outcome.INCOMPLETE, f"the stream ended after {self._tokens} tokens without a finish reason"
        return (Outcome.OK, "") if self._output_tokens > 0 else (Outcome.EMPTY, "finished without a token")

    @property
    def _output_tokens(self) -> int:
        """Usage is the server's own count; chunks may hold several tokens or none."""
        reported = self._usage.completion_tokens if self._usage is not None else None
        return self._tokens if reported is None else reported

    def record(
        self, *, prompt_tokens: int, output_tokens_asked: int, scheduled_s: float, sent_s: float, failure: tuple[Outcome, str] | None = None
    ) -> RequestRecord:
        """`failure` is what the connection says (cut, late, cancelled); it counts unless the response itself already failed."""
        outcome, error = self._failure or failure or self.outcome()
        usage = self._usage or Usage()
        details = usage.prompt_tokens_details
        return RequestRecord(
            prompt_tokens=prompt_tokens,
            output_tokens_asked=output_tokens_asked,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            ended_s=self._clock(),
            outcome=outcome,
            status=self._status,
            error=error,
            finish_reason=self._finish_reason,
            chunks=tuple(self._chunks) or self._only_chunk(),
            last_token_s=self._last_token_s,
            output_tokens=self._output_tokens,
            prompt_tokens_seen=usage.prompt_tokens if self._usage else None,
            cached_tokens=details.cached_tokens if details else None,
        )

    def _only_chunk(self) -> tuple[Chunk, ...]:
        """An answer whose tokens have no visible text shows its first one with the finish reason."""
        if self._output_tokens == 0 or self._last_token_s is None:
            return ()
        return (Chunk(self._last_token_s, self._output_tokens),)
