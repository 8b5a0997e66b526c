"""Pages converted on a GPU are those that a CPU makes, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from harness.conversion_checks import ConversionCase, check_conversion, check_nothing_to_convert
from harness.kernel_checks import Device

from diptych.kvtransfer.conversion import Converter
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import KVPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
NUM_TOKENS, NUM_LAYERS, KV_HEADS = 1000, 3, 4


@pytest.mark.parametrize("sizes", [(64, 16), (16, 64), (32, 32)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16), (BF16, FP8), (FP8, BF16)])
def test_a_gpu_converts_as_a_cpu_does(sizes: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    draw = torch.Generator().manual_seed(0)
    here = KVLayout("m", dtypes[0], NUM_LAYERS, KV_HEADS, 128, sizes[0])
    there = replace(here, dtype=dtypes[1], block_size=sizes[1])
    num_src, num_dst = -(-NUM_TOKENS // sizes[0]), -(-NUM_TOKENS // sizes[1])
    kept = (torch.randn(here.shape(num_src), generator=draw) * 20).to(dtypes[0])
    scales = torch.rand(NUM_LAYERS, 2, KV_HEADS, generator=draw) + 0.25
    blocks, targets = torch.randperm(num_src, generator=draw).numpy(), torch.randperm(num_dst * NUM_LAYERS, generator=draw).numpy()
    made = []
    for device in ("cpu", "cuda"):
        target = torch.zeros(there.shape(num_dst), dtype=torch.uint8 if dtypes[1] is FP8 else dtypes[1]).view(dtypes[1]).to(device)
        converter = Converter(KVPool(here, kept.to(device)), KVPool(there, target), scales)
        converter.make(np.arange(num_dst * NUM_LAYERS), targets, blocks)
        made.append(target.cpu().view(torch.uint8))
    assert torch.equal(*made)
    assert made[0].any()


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize("sizes", [(64, 16), (16, 64), (64, 64), (32, 64)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (torch.float16, FP8), (BF16, FP8), (FP8, torch.float16), (FP8, FP8), (BF16, FP32)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_the_kernel(head_dim: int, dtypes: tuple[torch.dtype, torch.dtype], sizes: tuple[int, int], has_scales: bool) -> None:
    check_conversion(ConversionCase(dtypes, sizes, head_dim, NUM_TOKENS, has_scales), Device.fresh("cuda"))


def test_nothing_to_convert() -> None:
    check_nothing_to_convert(Device.fresh("cuda"))
