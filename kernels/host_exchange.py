"""What ranks of one model add up on a CPU, each in a thread of its own: the plain twin of `exchange.py`."""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ReferenceOps


class HostExchange:
    """All ranks must call the same, in the same order; who is alone in that waits until `abort`."""

    def __init__(self, num_ranks: int) -> None:
        self._parts = [torch.empty(0)] * num_ranks
        self._together = threading.Barrier(num_ranks)

    def gather(self, rank: int, part: Tensor) -> list[Tensor]:
        """→ every rank's part, in their order. Raises threading.BrokenBarrierError: a rank has failed."""
        self._parts[rank] = part
        self._together.wait()
        parts = list(self._parts)
        self._together.wait()              # nobody brings the next before all have taken these
        return parts

    def abort(self) -> None:
        self._together.abort()


class RankedReferenceOps(ReferenceOps):
    """`ReferenceOps` for one rank of several; kv_scales are those of its heads."""

    def __init__(self, rank: int, exchange: HostExchange, kv_scales: Tensor | None = None) -> None:
        super().__init__(kv_scales)
        self._rank, self._exchange = rank, exchange

    def logits(self, x: Tensor, head: Tensor, vocab: int) -> Tensor:
        part = super().logits(x, head, vocab)
        return part if len(head) == vocab else torch.cat(self._exchange.gather(self._rank, part), dim=1)

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = torch.stack(self._exchange.gather(self._rank, F.linear(x, weight))).float().sum(0)
        if bias is not None:
            total += bias.float()
        return self.add_rms_norm(total.to(x.dtype), residual, norm_weight, eps)
