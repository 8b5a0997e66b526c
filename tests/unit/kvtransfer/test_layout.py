"""Page arithmetic against the tensor itself, and a hash that tells any two layouts apart."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer import layout as layout_module
from diptych.kvtransfer.layout import KVLayout

PLAIN = KVLayout("model", torch.bfloat16, num_layers=3, num_kv_heads=2, head_dim=8, block_size=16)
OTHER = {"model": "another", "dtype": torch.float16, "num_layers": 4, "num_kv_heads": 4, "head_dim": 4, "block_size": 8, "piece_heads": 1}

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
    assert {*OTHER, "tp_size"} == {field.name for field in fields(KVLayout)}
    hashes = {PLAIN.hash} | {replace(PLAIN, **{name: value}).hash for name, value in OTHER.items()}
    assert len(hashes) == 1 + len(OTHER)


def test_how_many_ranks_share_the_heads_does_not_count() -> None:
    """Their pieces are the same."""
    pieces = replace(PLAIN, piece_heads=1)
    assert replace(pieces, tp_size=2).hash == pieces.hash


shared = st.tuples(sizes, st.sampled_from([1, 2, 3, 4]), sizes).map(
    lambda drawn: KVLayout("m", torch.int64, 3, drawn[0] * drawn[1] * drawn[2], 2, 4, tp_size=drawn[1], piece_heads=drawn[0])
)


@settings(max_examples=50)
@given(layout=shared, num_blocks=sizes)
def test_a_piece_is_k_or_v_of_some_heads(layout: KVLayout, num_blocks: int) -> None:
    pool = torch.zeros(layout.shape(num_blocks), dtype=layout.dtype)
    assert pool.nbytes == num_blocks * layout.rank_block_bytes
    assert layout.tp_size * layout.rank_block_bytes == layout.block_bytes == layout.num_layers * layout.page_bytes
    assert layout.pieces_per_page * layout.piece_bytes == layout.page_bytes
    pieces = pool.view(torch.uint8).reshape(num_blocks * layout.num_layers, layout.rank_pieces_per_page, layout.piece_bytes)
    for of_page, page in zip(pieces, pool.view(-1, *layout.shape(1)[2:]), strict=True):
        heads = page.view(2 * layout.rank_heads // layout.piece_heads, layout.piece_heads, -1)
        for index, piece in enumerate(of_page):
            piece.view(layout.dtype)[:] = index
        assert heads.flatten(1).unique(dim=1).squeeze(1).tolist() == list(range(len(heads)))


@pytest.mark.parametrize(
    ("tp_size", "piece_heads", "text"),
    [
        (0, 1, "8 KV heads cannot be shared by 0 ranks"),
        (3, 1, "8 KV heads cannot be shared by 3 ranks"),
        (2, 0, "pages of 2 ranks are moved in pieces, and piece_heads is 0"),
        (4, 4, "2 KV heads of a rank cannot be moved in pieces of 4"),
        (1, 3, "8 KV heads of a rank cannot be moved in pieces of 3"),
        (1, -1, "pieces of -1"),
    ],
)
def test_heads_that_cannot_be_shared_so(tp_size: int, piece_heads: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(PLAIN, num_kv_heads=8, tp_size=tp_size, piece_heads=piece_heads)


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
