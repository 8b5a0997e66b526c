"""What is simulated: values only."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..cluster.router.policy import Objectives
from . import h200, own_engine
from .worker import StepCost


@dataclass(frozen=True)
class Plant:
    """The cluster."""

    num_prefill: int
    num_decode: int
    policy: str
    objectives: Objectives
    num_gateways: int = 4
    cost: StepCost = field(default_factory=h200.fitted)
    jitter: float = 0.03                      # of a step's time: standard deviation of its logarithm
    num_blocks: int = h200.NUM_BLOCKS
    block_size: int = h200.BLOCK_SIZE
    max_model_len: int = 131_072
    prefill_step_tokens: int = 2048
    decode_step_tokens: int = 2048
    padded_rows: tuple[int, ...] = ()         # ascending: of steps with prompts beside decodes; none: they are not padded
    max_sequences: int = 256
    token_bytes: int = h200.KV_TOKEN_BYTES
    link_bytes_per_s: float = h200.LINK_BYTES_PER_S
    hop_s: float = 0.3e-3                     # a message between members
    late_s: float = 0.0                       # more, the mean of an exponential: it waits for somebody's loop; order stays as it was
    tires: float = 0.0                        # steps of a worker that computes prompts without a pause take so much longer
    handover_s: float = 1e-3                  # from the last page to the first decode step that may hold the sequence
    report_every_s: float = 0.05              # the heartbeat
    step_report_every_s: float = 0.01         # reports that come with tokens: at most so often (in production with every step)
    look_every_s: float = 0.005               # gateways at what waits (in production with every report and token message)
    seed: int = 0

    def on(self, machine: str) -> "Plant":
        """With the GPUs and the engine of that name, one of MACHINES."""
        return replace(self, **MACHINES[machine]())


def _own_engine(measured: own_engine.Measured, num_blocks: int) -> dict[str, Any]:
    cost, padded_rows = own_engine.served(measured), own_engine.padded_rows()
    return {"cost": cost, "padded_rows": padded_rows, "num_blocks": num_blocks, "hop_s": own_engine.HOP_S}


MACHINES: dict[str, Callable[[], dict[str, Any]]] = {
    "vllm-h200": dict,
    "h200": lambda: _own_engine(own_engine.H200, h200.NUM_BLOCKS),
    "h100": lambda: _own_engine(own_engine.H100, own_engine.NUM_BLOCKS_H100),
}
"""Name → what it changes of a Plant, whose defaults are vLLM's on H200."""
