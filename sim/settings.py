"""What is simulated: values only."""

from dataclasses import dataclass, field

from ..cluster.router.policy import Objectives
from ..messages.steps import StepModel
from . import h200


@dataclass(frozen=True)
class Plant:
    """The cluster."""

    num_prefill: int
    num_decode: int
    policy: str
    objectives: Objectives
    num_gateways: int = 4
    cost: StepModel = field(default_factory=h200.fitted)
    jitter: float = 0.03                      # of a step's time: standard deviation of its logarithm
    num_blocks: int = h200.NUM_BLOCKS
    block_size: int = h200.BLOCK_SIZE
    max_model_len: int = 131_072
    prefill_step_tokens: int = 4096
    decode_step_tokens: int = 512            # a step of so many and some decodes takes less than 20 ms
    max_sequences: int = 256
    token_bytes: int = h200.KV_TOKEN_BYTES
    link_bytes_per_s: float = h200.LINK_BYTES_PER_S
    hop_s: float = 0.3e-3                     # a message between members
    handover_s: float = 1e-3                  # from the last page to the first decode step that may hold the sequence
    report_every_s: float = 0.05              # the heartbeat
    step_report_every_s: float = 0.01         # reports that come with tokens: at most so often (in production with every step)
    look_every_s: float = 0.005               # gateways at what waits (in production with every report and token message)
    seed: int = 0
