"""Pages made for another layout, against one token, head and layer at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer import conversion
from diptych.kvtransfer.conversion import Converter, require_convertible
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.regrouping import Regrouping
from diptych.kvtransfer.transport import KVPool
from diptych.messages.errors import LayoutMismatch

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]
LOST = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11, FP8: 2**-4}
"""Of a number's size, by rounding to the nearest."""

NORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-14, FP8: 2**-6}
"""The smallest number that is rounded by its own size."""

block_sizes = st.integers(1, 12)


@given(block_sizes, block_sizes, st.integers(1, 60), st.data())
def test_every_token_goes_to_its_place_and_nothing_else_does(src_size: int, dst_size: int, num_tokens: int, data: st.DataObject) -> None:
    grouping, num_src, num_dst = Regrouping(src_size, dst_size), -(-num_tokens // src_size), -(-num_tokens // dst_size)
    asked = data.draw(st.lists(st.integers(0, num_dst - 1), min_size=1, unique=True))
    runs = grouping.runs_into(np.array(asked), num_src)
    moved = {}
    for ask, place, block, src_place in zip(runs.asked, runs.places, runs.src_blocks, runs.src_places, strict=True):
        for i in range(grouping.run_tokens):
            at = (int(ask), int(place) * grouping.run_tokens + i)
            assert at not in moved
            moved[at] = (int(block), int(src_place) * grouping.run_tokens + i)
    assert all(0 <= block < num_src and offset < src_size for block, offset in moved.values())
    for ask, block in enumerate(asked):
        for token in range(block * dst_size, min(num_tokens, (block + 1) * dst_size)):
            assert moved[ask, token % dst_size] == (token // src_size, token % src_size)


@settings(max_examples=60)
@given(
    sizes=st.tuples(block_sizes, block_sizes),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 8])),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
    at_once=st.sampled_from([0, 64, 1 << 24]),
)
def test_a_made_page_holds_what_the_receiver_would_have_stored(
    sizes: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int],
    num_tokens: int,
    seed: int,
    at_once: int,
) -> None:
    draw, (num_layers, kv_heads, head_dim) = torch.Generator().manual_seed(seed), shape
    here = KVLayout("m", dtypes[0], num_layers, kv_heads, head_dim, sizes[0])
    there = replace(here, dtype=dtypes[1], block_size=sizes[1])
    num_src, num_dst = -(-num_tokens // sizes[0]), -(-num_tokens // sizes[1])
    scales = torch.rand(num_layers, 2, kv_heads, generator=draw) + 0.25
    kept = (torch.randn(here.shape(num_src + 3), generator=draw) * 30).to(dtypes[0])
    source, target = KVPool(here, kept), KVPool(there, torch.zeros(there.shape(num_dst + 2), dtype=dtypes[1]))
    src_blocks = torch.randperm(num_src + 3, generator=draw)[:num_src].numpy()
    pages = torch.randperm(num_dst * num_layers, generator=draw).numpy()
    targets = torch.randperm((num_dst + 2) * num_layers, generator=draw)[: len(pages)].numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "AT_ONCE_BYTES", at_once)
        Converter(source, target, scales).make(pages, targets, src_blocks)
    made = target.tensor.view(-1, *there.shape(1)[2:])
    for page, at in zip(pages, targets, strict=True):
        block, layer = divmod(int(page), num_layers)
        for token in range(block * sizes[1], min(num_tokens, (block + 1) * sizes[1])):
            wanted = kept[src_blocks[token // sizes[0]], layer, :, :, token % sizes[0]]
            assert_stored(made[at, :, :, token % sizes[1]], wanted, scales[layer, :, :, None])


def assert_stored(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> None:
    if found.dtype is wanted.dtype:
        assert (found.float() == wanted.float()).all()
        return
    values = wanted.float() * (scale if wanted.dtype is FP8 else 1.0)
    read, least = found.float(), torch.tensor(NORMAL[found.dtype])
    if found.dtype is FP8:
        read, least = read * scale, least * scale
        values = values.clamp(-448.0 * scale, 448.0 * scale)
    assert ((read - values).abs() <= LOST[found.dtype] * values.abs().clamp(min=least) * 1.0001).all()


def test_what_is_too_large_for_fp8_saturates() -> None:
    layout = KVLayout("m", torch.float32, 1, 1, 1, 2)
    source = KVPool(layout, torch.tensor([1e9, -1e9, 3.0, torch.nan]).view(layout.shape(1)))
    target = KVPool(replace(layout, dtype=FP8), torch.zeros(layout.shape(1), dtype=FP8))
    Converter(source, target, torch.full((1, 2, 1), 2.0)).make(np.array([0]), np.array([0]), np.array([0]))
    assert target.tensor.float().flatten()[:3].tolist() == [448.0, -448.0, 1.5]
    assert target.tensor.float().flatten()[3].isnan(), "a number that is none must not look like one"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "other"}, "model m, there other"),
        ({"num_layers": 3}, "num_layers 2, there 3"),
        ({"num_kv_heads": 8, "head_dim": 2}, "num_kv_heads 4, there 8; head_dim 4, there 2"),
        ({"piece_heads": 2}, "piece_heads 1, there 2"),
        ({"tp_size": 2, "block_size": 8}, "tp_size 1, there 2"),
        ({"model": "other", "tp_size": 4}, "model m, there other; tp_size 1, there 4"),
    ],
)
def test_what_means_something_else_cannot_be_converted(change: dict[str, object], told: str) -> None:
    here = KVLayout("m", torch.float32, num_layers=2, num_kv_heads=4, head_dim=4, block_size=16, piece_heads=1)
    with pytest.raises(LayoutMismatch, match=f"cannot be converted: {told}$"):
        require_convertible(here, replace(here, **change))
    require_convertible(here, replace(here, dtype=FP8, block_size=7))
