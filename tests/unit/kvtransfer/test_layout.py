"""Page arithmetic against the tensor itself, and a hash that tells any two layouts apart."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer import layout as layout_module
from diptych.kvtransfer.layout import KVLayout

PLAIN = KVLayout("model", torch.bfloat16, num_layers=3, num_kv_heads=2, head_dim=8, block_size=16)
OTHER = {"model": "another", "dtype": torch.float16, "num_layers": 4, "num_kv_heads": 4, "head_dim": 4, "block_size": 8, "tp_size": 2}

sizes = st.integers(1, 5)
layouts = st.builds(KVLayout, st.just("m"), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), sizes, sizes, sizes, sizes)


@settings(max_examples=50)
@given(layout=layouts, num_blocks=sizes)
def test_a_page_is_one_layer_of_one_block(layout: KVLayout, num_blocks: int) -> None:
    pool = torch.zeros(layout.shape(num_blocks), dtype=layout.dtype)
    assert pool.nbytes == num_blocks * layout.block_bytes
    pages = pool.view(torch.uint8).reshape(-1, layout.page_bytes)
    assert len(pages) == num_blocks * layout.num_layers
    for block in range(num_blocks):
        for layer in range(layout.num_layers):
            pool[block, layer] = 1 + layout.page_id(block, layer)
    for page_id, page in enumerate(pages):
        assert (page.view(layout.dtype) == 1 + page_id).all()


def test_equal_layouts_have_equal_hashes() -> None:
    assert PLAIN.hash == replace(PLAIN).hash
    assert len(PLAIN.hash) == 32


def test_every_field_counts() -> None:
    """Also those that leave the page's size as it is: their pages would fit, and mean something else."""
    assert set(OTHER) == {field.name for field in fields(KVLayout)}
    hashes = {PLAIN.hash} | {replace(PLAIN, **{name: value}).hash for name, value in OTHER.items()}
    assert len(hashes) == 1 + len(OTHER)


def test_swapped_sizes_of_one_page_size_differ() -> None:
    assert replace(PLAIN, head_dim=16, block_size=8).page_bytes == PLAIN.page_bytes
    assert replace(PLAIN, head_dim=16, block_size=8).hash != PLAIN.hash


def test_the_protocol_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = PLAIN.hash
    monkeypatch.setattr(layout_module, "PROTOCOL_VERSION", layout_module.PROTOCOL_VERSION + 1)
    assert PLAIN.hash != before


def test_offsets_of_a_large_pool_are_exact() -> None:
    """Past 2³¹ pages' worth of bytes a 32-bit offset would wrap."""
    big = KVLayout("m", torch.bfloat16, num_layers=80, num_kv_heads=8, head_dim=128, block_size=64)
    assert big.page_id(100_000, 79) * big.page_bytes == 100_000 * big.block_bytes + 79 * big.page_bytes > 2**40
