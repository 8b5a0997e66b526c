"""The Triton kernels compile for sm_90, use its tensor cores and asynchronous copies, and keep everything in registers: no GPU needed."""

import pytest
import torch

pytest.importorskip("triton")

from harness.hopper import Launch, Resources, captured, resources

from diptych.kernels import decode_attention, prefill_attention
from diptych.kernels.ops import Paging

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SHARED_BYTES_OF_AN_SM = 227 * 1024
REGISTERS_OF_AN_SM = 65536


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def paging(num_sequences: int) -> Paging:
    int32 = torch.int32
    return Paging(meta(num_sequences + 1, dtype=int32), meta(num_sequences, dtype=int32), meta(num_sequences, 128, dtype=int32))


def compiled(launch: Launch) -> Resources:
    found = resources(launch)
    assert (found.spill_bytes, found.stack_bytes) == (0, 0), f"{launch.kernel.__name__}: {found.spill_bytes} bytes spilled"
    assert found.shared_bytes <= SHARED_BYTES_OF_AN_SM
    return found


# Every head size and block size once, every way of storing the KV, with and without a window, a group that is no power of two.
ATTENTION = [
    (64, 16, (32, 8), BF16, BF16, None),
    (96, 32, (32, 32), BF16, BF16, None),
    (128, 64, (32, 8), BF16, BF16, None),
    (128, 16, (28, 4), BF16, BF16, None),
    (128, 32, (64, 8), torch.float16, torch.float16, 4096),
    (128, 64, (32, 8), BF16, FP8, None),
    (256, 64, (16, 8), BF16, BF16, None),
    (256, 16, (16, 8), BF16, FP8, 4096),
]


@pytest.mark.parametrize(("head_dim", "block_size", "heads", "dtype", "kv_dtype", "window"), ATTENTION)
def test_attention(
    head_dim: int, block_size: int, heads: tuple[int, int], dtype: torch.dtype, kv_dtype: torch.dtype, window: int | None
) -> None:
    pool = meta(20_000, 32, 2, heads[1], block_size, head_dim, dtype=kv_dtype)
    scales = meta(32, 2, heads[1], dtype=torch.float32) if kv_dtype is FP8 else None
    q = meta(64, heads[0] + 2 * heads[1], head_dim, dtype=dtype)[:, : heads[0]]
    out = meta(*q.shape, dtype=dtype)
    with captured(decode_attention, "_decode_kernel", "_merge_kernel") as launches:
        decode_attention.decode_attention(out, q, pool, 31, paging(64), 0.1, window, scales, 4)
    decode, merge = map(compiled, launches)
    threads = 32 * launches[0].options["num_warps"]
    assert 2 * decode.shared_bytes <= SHARED_BYTES_OF_AN_SM, "two programs must share an SM, to hide each other's latency"
    assert 2 * decode.registers * threads <= REGISTERS_OF_AN_SM
    assert "cp.async.cg" in decode.ptx, "keys and values are not copied asynchronously"
    assert merge.registers <= 128
    with captured(prefill_attention, "_prefill_kernel") as launches:
        prefill_attention.prefill_attention(out, q, pool, 31, paging(4), 0.1, window, scales)
    assert "wgmma.mma_async" in compiled(launches[0]).ptx, "products are not on Hopper's own matrix instructions"
