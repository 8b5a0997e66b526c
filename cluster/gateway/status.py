"""A gateway's state at one moment, for `diptych status`, `top` and the demo's table."""

from msgspec import Struct

from ...messages.requests import LoadReport, RequestSpan


class Quantiles(Struct, frozen=True):
    """Of the last finished choices. Seconds."""

    num_samples: int
    p50_s: float
    p90_s: float


class TransferTotals(Struct, frozen=True):
    """All KV that reached decode workers over one transport, of requests of this gateway."""

    transport: str
    num_handoffs: int
    num_pages: int
    num_bytes: int
    busy_s: float                             # of the writers' transports

    @property
    def gbps(self) -> float:
        """GB/s while busy."""
        return self.num_bytes / self.busy_s / 1e9 if self.busy_s > 0 else 0.0


class GatewayStatus(Struct, frozen=True):
    gateway_id: str
    port: int
    ready: bool
    num_running: int                          # choices at workers
    num_queued: int                           # choices without a route
    num_workers_alive: int
    outcomes: dict[str, int]                  # choices by how they ended: finished, aborted, refused, failed
    by_class: dict[str, int]                  # choices that ended, but for those whose client left
    good_by_class: dict[str, int]             # of those, finished with their objectives kept
    num_retries: int
    num_prompt_tokens: int                    # of finished choices, as are the output tokens
    num_output_tokens: int
    ttft: Quantiles | None
    tpot: Quantiles | None
    loads: tuple[LoadReport, ...]             # each worker's last
    transfers: tuple[TransferTotals, ...]
    last_span: RequestSpan | None
