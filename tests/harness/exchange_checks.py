"""What ranks exchange, against plain sums: on GPUs with a thread a rank, in Triton's interpreter one rank after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kernels.exchange import Exchange, ExchangeShape

POISON = 77.0
CALLS = 3                          # of which the third uses the first one's buffer again

RunAll = Callable[[Callable[[int], None]], None]
"""Does the work of all ranks, so that each gets what it waits for."""


@dataclass(frozen=True)
class ExchangeCase:
    num_rows: int
    width: int
    dtype: torch.dtype
    scatters: bool
    has_bias: bool = True


def check_sums(case: ExchangeCase, ends: list[Exchange], run_all: RunAll) -> None:
    """Some calls one after the other: every rank gets the same bits, near the sum in fp32, and nothing beyond its rows is written."""
    devices = [end.part(0).device for end in ends]
    generator = torch.Generator().manual_seed(case.num_rows)

    def invent(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    parts = [[invent(case.num_rows, case.width) for _ in ends] for _ in range(CALLS)]
    bias, weight, residual = invent(case.width) if case.has_bias else None, invent(case.width), invent(case.num_rows, case.width)
    guarded = [torch.full((case.num_rows + 2, case.width), POISON, dtype=case.dtype, device=device) for device in devices]
    found: list[list[Tensor]] = [[] for _ in ends]
    for end, rows in zip(ends, guarded, strict=True):
        rows[1:-1] = residual.to(rows.device)
        end.begin()

    for of_call in parts:

        def place(rank: int, of_call: list[Tensor] = of_call) -> None:
            ends[rank].part(case.num_rows).copy_(of_call[rank])

        def call(rank: int) -> None:
            device, end = devices[rank], ends[rank]
            there = None if bias is None else bias.to(device)
            out = end.add_rms_norm(there, guarded[rank][1:-1], weight.to(device), 1e-5, case.scatters)
            found[rank].append(out)

        run_all(place)
        run_all(call)
        for rank in range(len(ends)):              # the buffer of rows that were scattered is used again
            found[rank][-1] = found[rank][-1].cpu().clone()

    for index, of_call in enumerate(parts):
        total = torch.stack([part.float() for part in of_call]).sum(0) + (0 if bias is None else bias.float())
        residual = (total.to(case.dtype).float() + residual.float()).to(case.dtype)
        wide = residual.float()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
        for of_rank in found:
            assert torch.equal(of_rank[index], found[0][index]), f"ranks differ in call {index}"
            error = (of_rank[index].float() - expected).norm() / expected.norm()
            assert error < (1e-2 if case.dtype is not torch.float32 else 1e-5), f"call {index}: {error}"
    for rank, rows in enumerate(guarded):
        assert (rows[[0, -1]] == POISON).all(), "a row beyond the residual's was written"
        share = -(-case.num_rows // len(ends))
        own = slice(rank * share, (rank + 1) * share) if case.scatters else slice(None)
        torch.testing.assert_close(rows[1:-1][own].cpu(), residual[own], atol=1e-5 if case.dtype is torch.float32 else 0.1, rtol=0.02)


def check_logits(num_rows: int, ends: list[Exchange], run_all: RunAll) -> None:
    """Twice, from the same buffers."""
    columns, dtype = ends[0].shape.logit_columns, ends[0].shape.dtype
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(num_rows, columns, generator=generator).to(dtype) for _ in ends]
        found: dict[int, Tensor] = {}

        def place(rank: int, parts: list[Tensor] = parts) -> None:
            ends[rank].logits_part(num_rows).copy_(parts[rank])

        def gather(rank: int, found: dict[int, Tensor] = found) -> None:
            found[rank] = ends[rank].gather_logits(ends[rank].logits_part(num_rows))

        run_all(place)
        run_all(gather)
        assert torch.equal(found[0].cpu(), torch.cat(parts, dim=1))


def shape_for(case: ExchangeCase, num_ranks: int) -> ExchangeShape:
    return ExchangeShape(num_ranks, max(1, case.num_rows), case.width, logit_rows=5, logit_columns=17, dtype=case.dtype)
