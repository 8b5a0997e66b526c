"""What became of one request of a simulated run."""

from dataclasses import dataclass

from ..cluster.router.policy import Objectives


@dataclass(slots=True)
class Outcome:
    arrived_s: float
    num_outputs: int                          # wanted
    first_s: float | None = None              # the first token at the gateway
    last_s: float | None = None               # the last one, once it is there
    decided_s: float | None = None            # refused or routed then
    refused: bool = False
    local: bool = False

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """None: not finished, or one token only."""
        if self.first_s is None or self.last_s is None or self.num_outputs == 1:
            return None
        return (self.last_s - self.first_s) / (self.num_outputs - 1)

    def meets(self, objectives: Objectives) -> bool:
        """What was refused or has not ended meets nothing."""
        if self.ttft_s is None or self.last_s is None:
            return False
        kept_ttft = objectives.ttft_s is None or self.ttft_s <= objectives.ttft_s
        return kept_ttft and (objectives.tpot_s is None or self.tpot_s is None or self.tpot_s <= objectives.tpot_s)
