"""One sequence in an engine: its tokens, how far its KV is computed, and the blocks that hold it.

    WAITING ──► RUNNING ──► FINISHED            computed and decoded here
       ▲           │  └───► PARKED ──► FINISHED  prompt computed here, decoded elsewhere: blocks are held until released
       └───────────┘
      preempted: blocks given back, everything computed again later
"""

from dataclasses import InitVar, dataclass, field
from enum import Enum, auto

from ..messages.ids import BlockHash, BlockId, RequestId
from ..messages.requests import GenerateRequest, ServiceClass, TokenLogprobs
from .block_pool import chain_hashes
from .urgency import NO_OBJECTIVE_S, due_in_s

PENDING = -1
"""Stands in `token_ids` for the token that a step under way samples: a device knows it, the host does not yet."""


class SequenceState(Enum):
    WAITING = auto()
    RUNNING = auto()
    PARKED = auto()
    FINISHED = auto()


def tokens_of(request: GenerateRequest) -> list[int]:
    """As a sequence has them, with room for more: of 8192 tokens that have not been looked at for a while this takes 70 µs."""
    token_ids = [*request.token_ids, PENDING]
    token_ids.pop()
    return token_ids


@dataclass(eq=False)
class Sequence:
    request: GenerateRequest
    arrival: int                                 # order of arrival in this engine; also breaks ties
    deadline: float                              # engine clock: the attempt is given up then
    ttft_deadline: float                         # engine clock; infinite without an objective
    hands_off: bool                              # park after the first token
    max_len: int                                 # tokens, prompt included, at which it ends
    num_prompt_tokens: int = field(init=False)   # the request's; here, for it is asked for at every step
    token_ids: list[int] = field(init=False)     # request.token_ids, then what was sampled here, PENDING if a step under way will say
    due_at: float = field(init=False)            # engine clock: what urgency goes by
    is_plain: bool = field(init=False)           # nothing but draws are asked for: no changed logits, no log-probabilities
    num_computed: int = 0                        # leading tokens whose KV is in `blocks`
    num_cached: int = 0                          # of those, taken from the prefix cache when the sequence was admitted first
    blocks: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_published: int = 0                       # leading blocks that the prefix cache knows
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)    # of prompt tokens 1, 2, …
    was_admitted: bool = False
    paced_from: tuple[float, int] | None = None  # (engine clock, outputs): decoding here since then; None: not yet, or preempted
    handed_over_at: float | None = None          # engine clock: its prompt's KV came then; None: computed here, or preempted since
    is_postponed: bool = False                   # its first token could not be in time any more
    state: SequenceState = SequenceState.WAITING
    own_tokens: InitVar[list[int] | None] = None               # `tokens_of` the request, if they are there already

    def __post_init__(self, own_tokens: list[int] | None) -> None:
        self.token_ids = tokens_of(self.request) if own_tokens is None else own_tokens
        self.num_prompt_tokens = self.request.num_prompt_tokens
        self.is_plain = self.request.sampling.is_plain
        self._num_given = len(self.token_ids)
        received_at = self.deadline - self.request.timeout_s
        slack_s = self.ttft_deadline - received_at
        self.due_at = received_at + due_in_s(self.request.service_class, slack_s, self.request.waited_s)

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_outputs(self) -> int:
        """Over all attempts."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """All but the newest token are computed, and that one was sampled (here, or where the prompt was computed)."""
        num_tokens = len(self.token_ids)
        return num_tokens - self.num_computed == 1 and num_tokens > self._num_given

    @property
    def urgency(self) -> tuple[float, int]:
        """Smaller goes first; who has most slack, the largest, is preempted first. It changes once at most, so nobody waits for ever."""
        return self.due_at, self.arrival

    @property
    def fills_in(self) -> bool:
        """What it holds is idle capacity to all who are more urgent."""
        return self.request.service_class is ServiceClass.BATCH

    @property
    def is_scored(self) -> bool:
        """The log-probabilities of its prompt are asked for, so all of its logits are needed."""
        return self.request.sampling.prompt_logprobs is not None

    @property
    def is_pending(self) -> bool:
        return self.token_ids[-1] == PENDING

    def postpone(self) -> None:
        self.is_postponed = True
        self.due_at += NO_OBJECTIVE_S

    def update_hashes(self, block_size: int) -> list[BlockHash]:
        known = len(self.token_ids) - self.is_pending
        if known // block_size > len(self.hashes):
            self.hashes = chain_hashes(self.token_ids[:known], block_size, self.hashes)
        return self.hashes

    def add_prompt_logprobs(self, start: int, scores: list[TokenLogprobs]) -> None:
        """Scores of tokens start + 1, …; those known from before a preemption are not taken twice."""
        self.prompt_logprobs += scores[max(0, len(self.prompt_logprobs) - start) :]
