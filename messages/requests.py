"""What a gateway asks of workers, and what they answer.

    gateway ── GenerateRequest ──► prefill worker (or, on the local path, whoever decodes)
            ◄── StepTokens ─────── one message per step and gateway: token 0 from prefill, later ones from decode
            ◄── RequestFailed ──── this attempt ended without an answer; `retryable` says whether another may succeed
            ── Abort ────────────► both workers of the route; never answered

All are frozen msgspec structs, tagged by name, sent as MessagePack.
"""

from enum import StrEnum

from msgspec import Struct

from .ids import Address, Epoch, RequestId, WorkerId
from .steps import StepFeatures, StepModel


class FinishReason(StrEnum):
    STOP = "stop"          # a stop token was sampled; it is the last token delivered
    LENGTH = "length"      # max_tokens or the context's end


class ServiceClass(StrEnum):
    """Who comes first: engine/urgency.py says by how much."""

    PRIORITY = "priority"
    DEFAULT = "default"
    BATCH = "batch"        # fills what is idle, is late rather than refused, gives its memory up first


MAX_LOGPROBS = 20
"""Alternatives beside a token."""


class SamplingParams(Struct, frozen=True):
    """How one sequence is sampled. Ranges are the gateway's to check; workers rely on them."""

    max_tokens: int                           # output tokens over all attempts, >= 0 (0: only prompt logprobs are wanted)
    seed: int                                 # always set: the gateway draws one if the client gave none, so that a retry repeats it
    temperature: float = 1.0                  # 0: greedy
    top_k: int = 0                            # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0           # over prompt and output
    presence_penalty: float = 0.0             # over output
    frequency_penalty: float = 0.0            # over output
    logprobs: int | None = None               # alternatives beside the chosen token, MAX_LOGPROBS at most; None: no logprobs at all
    prompt_logprobs: int | None = None        # the same for every prompt token but the first
    min_tokens: int = 0                       # stop tokens are masked until so many are out
    stop_token_ids: tuple[int, ...] = ()      # includes the model's EOS unless ignore_eos
    ignore_eos: bool = False                  # informs metrics; the EOS ids are then simply not in stop_token_ids
    logit_bias: dict[int, float] = {}

    @property
    def is_penalised(self) -> bool:
        """By the tokens that there are already."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def masks_stops(self, num_outputs: int) -> bool:
        """For the token after so many."""
        return num_outputs < self.min_tokens and bool(self.stop_token_ids)

    def changes_logits(self, num_outputs: int) -> bool:
        """For the token after so many: it is not one of the model's own distribution."""
        return bool(self.logit_bias) or self.is_penalised or self.masks_stops(num_outputs)

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own logits, and no log-probabilities."""
        is_scored = self.logprobs is not None or self.prompt_logprobs is not None
        return not (is_scored or self.changes_logits(0))


class WorkerRef(Struct, frozen=True, cache_hash=True):
    """One life of a worker and where it listens."""

    worker_id: WorkerId
    epoch: Epoch
    address: Address


class Route(Struct, frozen=True):
    """Where a request goes: prefill then decode, or (prefill is None) the local path on one worker, of either role, that does both."""

    decode: WorkerRef
    prefill: WorkerRef | None = None

    @property
    def first(self) -> WorkerRef:
        """The worker that receives the request."""
        return self.prefill or self.decode


class GenerateRequest(Struct, frozen=True, tag=True):
    """One attempt at one choice. A retry carries what the client already has as the tail of `token_ids`."""

    request_id: RequestId
    gateway: Address                          # where tokens go
    token_ids: tuple[int, ...]                # prompt, then `num_prior_outputs` tokens already delivered by an earlier attempt
    sampling: SamplingParams
    route: Route
    timeout_s: float                          # from receipt until this attempt is given up
    num_prior_outputs: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    service_class: ServiceClass = ServiceClass.DEFAULT
    waited_s: float = 0.0                     # since the client asked, as of this attempt's start

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids) - self.num_prior_outputs


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Raw model log-probabilities at one position: the chosen token's and the most likely ones', best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenDelta(Struct, frozen=True, array_like=True):
    """New tokens of one request. `index` counts outputs from 0 over all attempts, so that the gateway can order and drop repeats."""

    request_id: RequestId
    index: int                                # output index of token_ids[0]
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token if asked for
    num_cached_tokens: int = 0                # with the first delta of an attempt: prompt tokens that were not computed
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()   # with the first delta, if asked for: prompt tokens 1, 2, …


class FillingLoad(Struct, frozen=True):
    """Of batch work that gives way to who is more urgent."""

    num_requests: int                         # of a report's num_waiting + num_running + num_reserved - num_passing
    num_decoding: int
    decode_context: int                       # tokens that those attend to
    num_blocks: int                           # that preemption would free, but for those that are shared


NO_FILLING = FillingLoad(0, 0, 0, 0)


class LoadReport(Struct, frozen=True):
    """What a router may know of a worker, as of the moment it was sent."""

    worker: WorkerRef
    num_waiting: int                          # requests whose prompt is not finished and not being computed
    num_waiting_tokens: int                   # prompt tokens still to compute, of waiting and running requests
    num_running: int                          # sequences that take part in steps
    num_reserved: int                         # handoffs in flight
    num_blocks: int
    num_free_blocks: int                      # free or cached: what could be given to a new request
    block_size: int
    work: StepFeatures | None = None          # all unfinished prompts and all decodes but batch work's, as though one step; None: not told
    queue: tuple[tuple[float, int], ...] = () # (seconds until it is due, prompt tokens) of waiting requests, soonest first
    max_step_tokens: int = 0                  # budget of a step; 0: not told
    prefill_share: float = 0.0                # of the last seconds, what prompts took of this worker's time
    step_model: StepModel | None = None       # None: not told
    busy_s: float = 0.0                       # until the steps under way have ended; their prompt tokens are no longer in `work`
    plans_in_s: float = 0.0                   # until the next step can be planned: with what has come by then
    last_read: tuple[tuple[RequestId, float], ...] = ()        # each gateway's newest that the worker had read, and how long ago, s
    num_passing: int = 0                      # of num_waiting + num_running + num_reserved, what is decoded elsewhere
    lead_s: float = 0.0                       # how far ahead of its pace, or behind, the tightest decode is after the steps under way
    filling: FillingLoad = NO_FILLING
    max_sequences: int = 0                    # places in a step, of which waiting requests have none; 0: not told


class StepTokens(Struct, frozen=True, tag=True):
    """All new tokens of one step for one gateway."""

    worker: WorkerRef
    deltas: tuple[TokenDelta, ...]
    load: LoadReport | None = None


class LoadUpdate(Struct, frozen=True, tag=True):
    """A load report on its own: sent at a steady rate to every gateway, it is the worker's heartbeat too."""

    load: LoadReport


class FailureKind(StrEnum):
    PEER_LOST = "peer_lost"                   # the other worker of the route died or fell silent
    TIMEOUT = "timeout"
    REFUSED = "refused"                       # no memory, draining, layouts differ, a link below the floor
    INVALID = "invalid"                       # this request can never run here
    INTERNAL = "internal"                     # a fault of ours


class RequestFailed(Struct, frozen=True, tag=True):
    request_id: RequestId
    kind: FailureKind
    message: str
    retryable: bool
    worker: WorkerRef


class Abort(Struct, frozen=True, tag=True):
    """Stop and free. Also sent for requests that the receiver may not know (any more)."""

    request_id: RequestId


class RequestSpan(Struct, frozen=True, tag=True):
    """How a handoff went, sent by its prefill worker once the decode worker has committed the KV; for metrics and the demo's table."""

    request_id: RequestId
    worker: WorkerRef                         # the prefill worker
    decode_id: WorkerId
    transport: str
    num_pages: int
    num_bytes: int
    num_skipped_blocks: int                   # prefix blocks the decode worker already had
    transfer_s: float                         # busy time of the writer's transport for this request
    handoff_s: float                          # offer to commit, the prompt's computation included


class TransferFailed(Struct, frozen=True, tag=True):
    """A handoff ended because the KV could not be moved, as its prefill worker saw it; for metrics alone."""

    worker: WorkerRef                         # the prefill worker
    decode_id: WorkerId
    transport: str                            # "none": there was no link yet
    message: str


class LinkFigures(Struct, frozen=True):
    """Of one transport between two workers."""

    transport: str
    latency_s: float                          # a write of one page, as the writer's transport times it
    gbps: float                               # GB/s of many pages


class LinkMeasured(Struct, frozen=True, tag=True):
    """What a prefill worker has measured when it met a decode worker: writes into blocks that no sequence uses."""

    worker: WorkerRef                         # the prefill worker
    decode_id: WorkerId
    transport: str                            # the one that is used
    latency_s: float                          # a write of one page, as the writer's transport times it
    gbps: float                               # GB/s of many pages
    num_bytes: int                            # of the many
    min_gbps: float = 0.0                     # the floor that the spec sets; 0: none
    refused: bool = False                     # below the floor, and not used for that
    others: tuple[LinkFigures, ...] = ()      # what else reaches, in the order in which it would be fallen back to

    @property
    def below_floor(self) -> bool:
        return self.gbps < self.min_gbps
