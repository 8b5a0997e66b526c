"""Which operations a device runs. Triton is imported for a CUDA device only: a CPU worker needs no such package."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from .host_exchange import HostExchange, RankedReferenceOps
from .kv_storage import FP8
from .ops import Ops, UnsupportedByKernels
from .reference import ReferenceOps


@dataclass(frozen=True)
class OpsNeeds:
    """What a model wants of its operations, and of what its ranks exchange."""

    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    kv_scales: Tensor | None       # [num_layers, 2, kv_heads of all ranks] fp32; used for a KV pool of fp8
    max_rows: int                  # of a step
    logit_rows: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class RankOps:
    ops: Sequence[Ops]             # of each rank
    abort: Callable[[int], None]   # ends the waiting of all ranks for this one, which has failed; in its thread


def ops_of_ranks(devices: Sequence[torch.device], needs: OpsNeeds) -> RankOps:
    """Raises UnsupportedByKernels: see `ops_for`, or two GPUs that do not reach each other."""
    size, scales = len(devices), needs.kv_scales if needs.kv_dtype is FP8 else None
    shares = [None] * size if scales is None else list(scales.chunk(size, dim=2))
    shape = needs.head_dim, needs.block_size, needs.dtype, needs.kv_dtype
    if size == 1:
        return RankOps([ops_for(devices[0], *shape, shares[0])], lambda rank: None)
    if devices[0].type == "cpu":
        exchange = HostExchange(size)
        return RankOps([RankedReferenceOps(rank, exchange, shares[rank]) for rank in range(size)], lambda rank: exchange.abort())
    ops_for(devices[0], *shape)                              # refuses
    return _ranked_on_gpus(devices, needs, shares)


def _ranked_on_gpus(devices: Sequence[torch.device], needs: OpsNeeds, shares: Sequence[Tensor | None]) -> RankOps:
    from .exchange import Exchange, ExchangeShape
    from .ranked_ops import RankedTritonOps

    size = len(devices)
    logit_columns = 0 if needs.vocab_size % size else needs.vocab_size // size
    shape = ExchangeShape(size, needs.max_rows, needs.hidden_size, needs.logit_rows, logit_columns, needs.dtype)
    try:
        ends = Exchange.among(devices, shape)
    except ValueError as error:
        raise UnsupportedByKernels(f"ranks on {size} GPUs: {error}") from None
    ops = [
        RankedTritonOps.among(device, end, None if share is None else share.contiguous().to(device))
        for device, end, share in zip(devices, ends, shares, strict=True)
    ]

    def abort(failed: int) -> None:
        for end in ends:
            end.release()
        with suppress(RuntimeError):                         # whatever the GPU has to say, somebody is told already
            torch.cuda.synchronize(devices[failed])          # until then its kernels tell of calls that have been made
        for end in ends:
            end.release()

    return RankOps(ops, abort)


def ops_for(
    device: torch.device, head_dim: int, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None,
    kv_scales: Tensor | None = None,
) -> Ops:  # fmt: skip
    """For a KV pool of `kv_dtype` (None: `dtype`); `kv_scales` [num_layers, 2, kv_heads] are used if that is fp8. Raises
    UnsupportedByKernels if the device's kernels cannot take this shape, or if it has none."""
    kv_dtype, kv_scales = kv_dtype or dtype, kv_scales if kv_dtype is FP8 else None
    if device.type == "cpu":
        return ReferenceOps(kv_scales)
    if device.type != "cuda":
        raise UnsupportedByKernels(f"device {device}: there are kernels for cpu and cuda")
    try:
        from .triton_ops import TritonOps, check_supported
    except ModuleNotFoundError as missing:
        raise UnsupportedByKernels(f"device {device}: the kernels need the package {missing.name}") from missing
    check_supported(head_dim, block_size, dtype, kv_dtype)
    if not torch.cuda.is_available():
        raise UnsupportedByKernels(f"device {device}: torch finds no CUDA GPU here")
    return TritonOps.on(device, None if kv_scales is None else kv_scales.to(device))
