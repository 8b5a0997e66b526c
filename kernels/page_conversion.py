"""Makes KV pages of one block size and type from pages of another, in one pass over both.

    page i of a prompt, its block in the target's terms × num_layers + layer       rows (K or V, head, token) of head_dim numbers
              │ token by token: src_blocks[token // src_size] × num_layers + layer
              ▼
    source pages ──► fp32, × scale if fp8 ──► ÷ scale, saturating, if fp8 ──► target page `targets[i]`

A program makes 64 rows of a page. What is stored is what `kv_storage.py` says, bit for bit; equal types are copied.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from .kv_storage import FP8, FP8_MAX
from .overlap import after_predecessor, overlapping

ROWS = 64


def convert_pages(source: Tensor, target: Tensor, pages: Tensor, targets: Tensor, src_blocks: Tensor, scales: Tensor | None) -> None:
    """source, target: contiguous pools [blocks, num_layers, 2, kv_heads, block_size, head_dim]; scales [num_layers, 2, kv_heads] fp32, None
    for 1. pages, targets [n] and src_blocks, the prompt's blocks in `source`: int64, on the device. Places past the last of those stay as
    they are.
    """
    if not len(pages):
        return
    _, num_layers, _, kv_heads, src_size, head_dim = source.shape
    dst_size = target.shape[4]
    _convert_kernel[(len(pages), triton.cdiv(2 * kv_heads * dst_size, ROWS))](
        source, target, pages, targets, src_blocks, len(src_blocks), scales, num_layers,
        HEADS=2 * kv_heads, SRC_SIZE=src_size, DST_SIZE=dst_size, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), ROWS=ROWS,
        FROM_FP8=source.dtype is FP8, TO_FP8=target.dtype is FP8, MOST=FP8_MAX, num_warps=4, **overlapping(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_src_blocks"], do_not_specialize_on_alignment=["targets", "src_blocks"])
def _convert_kernel(
    source, target, pages, targets, src_blocks, num_src_blocks, scales, num_layers,
    HEADS: tl.constexpr, SRC_SIZE: tl.constexpr, DST_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    FROM_FP8: tl.constexpr, TO_FP8: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_predecessor(PDL)
    page = tl.load(pages + tl.program_id(0))
    layer = page % num_layers
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    heads, token = rows // DST_SIZE, page // num_layers * DST_SIZE + rows % DST_SIZE
    block = token // SRC_SIZE
    exists = (heads < HEADS) & (block < num_src_blocks)
    src_pages = tl.load(src_blocks + block, mask=exists, other=0) * num_layers + layer
    columns = tl.arange(0, WIDTH)
    there = exists[:, None] & (columns < HEAD_DIM)[None, :]
    places = (src_pages * HEADS + heads) * SRC_SIZE + token % SRC_SIZE
    numbers = tl.load(source + (places * HEAD_DIM)[:, None] + columns[None, :], mask=there)
    if FROM_FP8 != TO_FP8 and scales is not None:
        scale = tl.load(scales + layer * HEADS + heads, mask=exists, other=1.0)[:, None]
        numbers = numbers.to(tl.float32) * scale if FROM_FP8 else tl.div_rn(numbers.to(tl.float32), scale)
    if TO_FP8 and not FROM_FP8:
        numbers = tl.clamp(numbers.to(tl.float32), -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    elif source.dtype.element_ty != target.dtype.element_ty:
        numbers = numbers.to(tl.float32)
    made = target + ((tl.load(targets + tl.program_id(0)) * HEADS * DST_SIZE + rows) * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(made, numbers.to(target.dtype.element_ty), mask=there)
