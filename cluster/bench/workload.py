"""A workload: which requests come when, and how long they are. It holds no text and no rate of its own to keep:

    trace file ─┐
                ├─> Workload ─> first(n) / first_seconds(s) ─> fit_context(...) ─> at_rate(r) ─> the load generator
    generator ──┘

Another rate is reached by scaling time, never by dropping requests, so a sweep sends the same requests at every rate.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from .errors import WorkloadError


@dataclass(frozen=True, slots=True)
class TimedRequest:
    at_s: float                         # arrival, seconds after the workload's first one
    prompt_tokens: int                  # >= 1
    output_tokens: int                  # >= 1, asked with ignore_eos
    block_ids: tuple[int, ...] = ()     # block i covers prompt tokens [i*block_tokens, (i+1)*block_tokens); equal ids hold
                                        # equal tokens. Tokens after the last block belong to this request alone.

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Workload:
    source: str                         # for the report: file name or generator
    requests: tuple[TimedRequest, ...]  # in order of arrival, the first at 0 s
    block_tokens: int = 0               # tokens of one block; 0: no request has blocks

    def __post_init__(self) -> None:
        if not self.requests:
            raise WorkloadError(f"{self.source}: no requests")

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def span_s(self) -> float:
        return self.requests[-1].at_s

    @property
    def rate(self) -> float | None:
        """Requests per second, (n − 1) gaps over the span; None where all requests come at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else None

    @cached_property
    def longest(self) -> TimedRequest:
        return max(self.requests, key=lambda request: request.total_tokens)

    def first(self, count: int) -> "Workload":
        return replace(self, requests=self.requests[:count])

    def between(self, start: int, end: int) -> "Workload":
        """Requests start to end − 1, the first of them at 0 s. Raises WorkloadError where there are none."""
        requests = self.requests[start:end]
        return replace(self, requests=tuple(replace(each, at_s=each.at_s - requests[0].at_s) for each in requests))

    def first_seconds(self, seconds: float) -> "Workload":
        """The requests of the first `seconds`, in the workload's own time (before any scaling)."""
        return replace(self, requests=tuple(request for request in self.requests if request.at_s <= seconds))

    def scale_time(self, factor: float) -> "Workload":
        """Gaps times `factor`: 0.5 doubles the rate."""
        if not factor > 0:
            raise WorkloadError(f"time scale must be > 0, got {factor}")
        return replace(self, requests=tuple(replace(request, at_s=request.at_s * factor) for request in self.requests))

    def at_rate(self, rate: float) -> "Workload":
        """The same requests at a mean of `rate` per second."""
        if not rate > 0:
            raise WorkloadError(f"rate must be > 0 requests/s, got {rate}")
        if len(self) == 1:
            return self
        if self.rate is None:
            raise WorkloadError(f"{self.source}: all {len(self)} requests arrive at once, which no scaling turns into {rate} requests/s")
        return self.scale_time(self.rate / rate)

    def fit_context(self, max_context: int, *, scale: bool) -> "Workload":
        """Makes prompt + output <= `max_context` everywhere.

        `scale` shrinks every length by one factor, so that the longest fits: proportions stay, for models far smaller than
        the trace's. Otherwise only what is too long is cut, the prompt first.
        """
        if max_context < 2:
            raise WorkloadError(f"a context of {max_context} tokens has no room for one prompt token and one output token")
        scaled = self._scaled(min(1.0, max_context / self.longest.total_tokens)) if scale else self
        return replace(scaled, requests=tuple(_cut(request, max_context) for request in scaled.requests))

    def _scaled(self, factor: float) -> "Workload":
        block_tokens = max(1, int(self.block_tokens * factor)) if self.block_tokens else 0
        prompt_factor = block_tokens / self.block_tokens if block_tokens else factor    # whole blocks shrink to whole blocks
        requests = tuple(
            replace(
                request,
                prompt_tokens=max(1, int(request.prompt_tokens * prompt_factor)),
                output_tokens=max(1, int(request.output_tokens * factor)),
            )
            for request in self.requests
        )
        return replace(self, requests=requests, block_tokens=block_tokens)


def _cut(request: TimedRequest, max_context: int) -> TimedRequest:
    if request.total_tokens <= max_context:
        return request
    output_tokens = min(request.output_tokens, max_context - 1)
    return replace(request, prompt_tokens=min(request.prompt_tokens, max_context - output_tokens), output_tokens=output_tokens)
