"""Paged attention on one GPU against its ceilings: `python tests/bench/attention.py`.

Decode moves every cached key and value once: its figure is bytes over time, as a share of what a device copy reaches in the same run.
Prefill is arithmetic: its figure is 4·s²·d·heads / 2 (causal) over time, beside cuDNN's on the same tensors. Medians; random data.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from diptych.kernels.ops import Paging
from diptych.kernels.triton_ops import TritonOps

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
SCALE = HEAD_DIM**-0.5


def median_s(run: object) -> float:
    return float(do_bench(run, warmup=50, rep=300, return_mode="median")) / 1e3


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def paged(num_sequences: int, context: int, rows: int) -> tuple[torch.Tensor, Paging]:
    """A pool of one layer, its blocks shuffled over the sequences; each sequence asks `rows` newest rows."""
    per_sequence = -(-context // BLOCK_SIZE)
    pool = torch.randn(num_sequences * per_sequence, 1, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(len(pool), device="cuda").to(torch.int32).view(num_sequences, per_sequence)
    starts = ints([rows * i for i in range(num_sequences + 1)])
    return pool, Paging(starts, ints([context] * num_sequences), tables)


def queries(rows: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def copy_bytes_per_s() -> float:
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source))


def decode(ops: TritonOps, num_sequences: int, context: int, ceiling: float) -> str:
    pool, paging = paged(num_sequences, context, rows=1)
    q = queries(num_sequences)
    seconds = median_s(lambda: ops.paged_attention(q, pool, 0, paging, SCALE, None))
    num_bytes = num_sequences * context * 2 * KV_HEADS * HEAD_DIM * 2
    rate = num_bytes / seconds
    return f"decode b{num_sequences} ctx {context}: {seconds * 1e6:.0f} µs, {rate / 1e12:.2f} TB/s, {rate / ceiling:.0%} of a copy"


def prefill(ops: TritonOps, length: int) -> str:
    pool, paging = paged(1, length, rows=length)
    q = queries(length)
    ours = median_s(lambda: ops.paged_attention(q, pool, 0, paging, SCALE, None))
    heads = torch.randn(3, 1, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn = median_s(lambda: torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True))
    work = 2 * length**2 * HEAD_DIM * HEADS
    return f"prefill {length}: {work / ours / 1e12:.0f} TFLOP/s, cuDNN {work / cudnn / 1e12:.0f}, ratio {cudnn / ours:.2f}"


def main() -> None:
    ops, ceiling = TritonOps.on(torch.device("cuda")), copy_bytes_per_s()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {ceiling / 1e12:.2f} TB/s")
    for num_sequences, context in ((1, 1024), (1, 16_000), (8, 1024), (64, 1024), (64, 4096), (256, 1024)):
        print(decode(ops, num_sequences, context, ceiling))
    for length in (1024, 2048, 8192, 16_384):
        print(prefill(ops, length))


if __name__ == "__main__":
    main()
