"""The Triton kernels in Triton's interpreter, on shapes small enough for it. `test_interpreted.py` runs this file in its own process."""

import pytest
import torch
from harness.interpreter import make_exact
from harness.kernel_checks import AttentionCase, Device, check_attention

torch.set_num_threads(1)
make_exact()


@pytest.fixture
def device() -> Device:
    return Device.fresh("cpu")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=((1, 0), (1, 63))),
        AttentionCase(lengths=((1, 40),), heads=(3, 3), head_dim=96, block_size=32),
        AttentionCase(lengths=((1, 33), (1, 6)), heads=(7, 1), block_size=64, window=9),
        AttentionCase(lengths=((1, 50),), heads=(4, 2), head_dim=128, dtype=torch.bfloat16),
        AttentionCase(lengths=((1, 61),), heads=(2, 1), head_dim=128, block_size=64, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
        AttentionCase(lengths=((1, 37),), heads=(17, 1), block_size=32, dtype=torch.float16),
        AttentionCase(lengths=((1, 37),), heads=(2, 1), head_dim=256, block_size=16, dtype=torch.float16),
    ],
)
def test_decode_attention(case: AttentionCase, splits: int, device: Device) -> None:
    check_attention(case, device, splits)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=((2, 0), (30, 33))),
        AttentionCase(lengths=((9, 40),), heads=(3, 3), head_dim=96, block_size=32),
        AttentionCase(lengths=((13, 30), (5, 2)), heads=(7, 1), block_size=64, window=9),
        AttentionCase(lengths=((33, 31),), heads=(4, 2), head_dim=128, dtype=torch.bfloat16),
        AttentionCase(lengths=((20, 41),), heads=(2, 1), head_dim=128, block_size=64, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
        AttentionCase(lengths=((3, 60),), heads=(2, 1), head_dim=256, block_size=16, dtype=torch.float16),
        AttentionCase(lengths=((1, 20), (6, 20), (1, 0), (17, 1)), heads=(4, 2)),
    ],
)
def test_prefill_attention_beside_decodes(case: AttentionCase, device: Device) -> None:
    check_attention(case, device)
