"""`TritonOps` for one rank of several: its products go where the other ranks' kernels read them (`exchange.py`)."""

import torch
from torch import Tensor

from .exchange import Exchange
from .ops import Paging
from .skinny_linear import skinny_linear, suits
from .triton_ops import TritonOps


class RankedTritonOps(TritonOps):
    """kv_scales are those of the rank's heads."""

    def __init__(self, num_sms: int, exchange: Exchange, kv_scales: Tensor | None = None) -> None:
        super().__init__(num_sms, kv_scales)
        self._exchange = exchange

    @classmethod
    def among(cls, device: torch.device, exchange: Exchange, kv_scales: Tensor | None) -> "RankedTritonOps":
        return cls(torch.cuda.get_device_properties(device).multi_processor_count, exchange, kv_scales)

    def begin_step(self, paging: Paging, kv_pool: Tensor) -> Paging:
        self._exchange.begin()
        return super().begin_step(paging, kv_pool)

    def logits(self, x: Tensor, head: Tensor, vocab: int) -> Tensor:
        if len(head) == vocab or not len(x):
            return super().logits(x, head, vocab)
        part = self._exchange.logits_part(len(x))
        _multiply(part, x, head)
        return self._exchange.gather_logits(part)

    def linear_add_rms_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _multiply(self._exchange.part(len(x)), x, weight)
        return self._exchange.add_rms_norm(bias, residual, norm_weight, eps), residual


def _multiply(out: Tensor, x: Tensor, weight: Tensor) -> None:
    if suits(x, weight):
        skinny_linear(out, x, weight, None)
    else:
        torch.mm(x, weight.t(), out=out)
