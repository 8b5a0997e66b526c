"""The conversion kernel against conversion on a CPU, in the interpreter and on a GPU: bit for bit."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diptych.kernels.page_conversion import convert_pages
from diptych.kvtransfer.conversion import Converter
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.transport import KVPool

from .kernel_checks import Device, Guarded, bits

NUM_LAYERS, KV_HEADS = 3, 3


@dataclass(frozen=True)
class ConversionCase:
    dtypes: tuple[torch.dtype, torch.dtype]
    sizes: tuple[int, int] = (64, 16)
    head_dim: int = 64
    num_tokens: int = 150
    has_scales: bool = True


def check_conversion(case: ConversionCase, device: Device) -> None:
    """Every second page of a prompt in scattered blocks; numbers that are none, and numbers too large for fp8, among them. Other pages of
    the target, and tokens that the source has not, stay as they are."""
    draw = device.generator()
    here = KVLayout("m", case.dtypes[0], NUM_LAYERS, KV_HEADS, case.head_dim, case.sizes[0])
    there = replace(here, dtype=case.dtypes[1], block_size=case.sizes[1])
    num_src, num_dst = (-(-case.num_tokens // size) for size in case.sizes)
    numbers = torch.randn(here.shape(num_src + 2), generator=draw) * 200
    numbers.view(-1)[torch.randint(numbers.numel(), (20,), generator=draw)] = torch.nan
    scales = torch.rand(NUM_LAYERS, 2, KV_HEADS, generator=draw) + 0.25 if case.has_scales else None
    blocks = torch.randperm(num_src + 2, generator=draw)[:num_src]
    pages = torch.randperm(num_dst * NUM_LAYERS, generator=draw)[::2].contiguous()
    targets = torch.randperm((num_dst + 1) * NUM_LAYERS, generator=draw)[: len(pages)]
    source, made = numbers.to(case.dtypes[0]), Guarded(there.shape(num_dst + 1), there.dtype, device)
    expected = made.tensor.cpu()
    Converter(KVPool(here, source), KVPool(there, expected), scales).make(*map(Tensor.numpy, (pages, targets, blocks)))
    ids = [numbers.to(device.name) for numbers in (pages, targets, blocks)]
    convert_pages(source.to(device.name), made.tensor, *ids, None if scales is None else scales.to(device.name))
    found = made.tensor.cpu()
    neither = found.float().isnan() & expected.float().isnan()          # of which a GPU and a CPU have different ones
    assert torch.equal(bits(found.float().where(~neither, 0)), bits(expected.float().where(~neither, 0))), f"seed {device.seed}"
    made.assert_untouched_around()


def check_nothing_to_convert(device: Device) -> None:
    """No page; a page of a prompt that has no block."""
    layout = KVLayout("m", torch.float32, NUM_LAYERS, KV_HEADS, 64, 16)
    source, made = torch.ones(layout.shape(2), device=device.name), Guarded(layout.shape(2), torch.float32, device)
    before = bits(made.tensor)
    for num_pages in (0, 1):
        pages = torch.zeros(num_pages, dtype=torch.int64, device=device.name)
        convert_pages(source, made.tensor, pages, pages, pages[:0], None)
    assert torch.equal(bits(made.tensor), before)
    made.assert_untouched_around()
