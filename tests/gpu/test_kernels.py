"""The Triton kernels on a GPU, against the same references as in the interpreter, at the shapes that are served."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from harness.decode_inputs_checks import check_decode_inputs, check_pending
from harness.device_sampler_checks import check_device_sampler
from harness.kernel_checks import (
    REFERENCE,
    AttentionCase,
    Device,
    RopeCase,
    assert_close,
    attention_inputs,
    check_attention,
    check_cudnn_attention,
    check_empty,
    check_linear_add_rms_norm,
    check_linear_silu_mul,
    check_norms,
    check_padded_decode,
    check_rope_alone,
    check_rope_write_kv,
    check_silu_mul,
    check_skinny_linear,
    expected_attention,
)
from harness.kernel_model import logits_of_steps, random_weights
from harness.logit_checks import check_logit_changes, check_logprobs, check_logprobs_of_no_numbers, check_settling
from harness.sampling_checks import check_refusal, check_sampling, check_sharing
from harness.share_checks import check_items

from diptych.kernels import logit_changes, logprobs
from diptych.kernels.context_shares import ChunkCut
from diptych.kernels.prefill_attention import PrefillTile, prefill_attention
from diptych.kernels.selection import ops_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
ROWS = [1, 7, 64, 1000]


@pytest.fixture
def device() -> Device:
    return Device.fresh("cuda")


@pytest.mark.parametrize("splits", [1, 2, 37])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8), (64, 2)])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decode_attention(head_dim: int, block_size: int, heads: tuple[int, int], splits: int, device: Device) -> None:
    lengths = tuple((1, earlier) for earlier in (0, 1, 15, 16, 63, 64, 777, 4095))
    check_attention(AttentionCase(lengths, heads, head_dim, block_size, dtype=BF16), device, splits)


@pytest.mark.parametrize("share_tokens", [1, 300, 1024, 5000])
@pytest.mark.parametrize("splits", [2, 16])
def test_contexts_cut_to_shares_of_about_a_length(splits: int, share_tokens: int, device: Device) -> None:
    lengths = tuple((1, earlier) for earlier in (0, 1, 63, 299, 300, 777, 1024, 4095))
    check_attention(AttentionCase(lengths, (32, 8), 128, 64, dtype=BF16), device, splits, share_tokens=share_tokens)
    check_attention(AttentionCase(lengths, (32, 8), 128, 16, 100, dtype=BF16), device, splits, share_tokens=share_tokens)


@pytest.mark.parametrize("num_sequences", [12, 24, 64, 120])
@pytest.mark.parametrize("share_tokens", [200, 1500, 100_000])
def test_one_long_context_among_many_short_ones(share_tokens: int, num_sequences: int, device: Device) -> None:
    """So many that their shares are listed, with a chunk and padding among them."""
    lengths = (*[(1, 9000 if i == 5 else 37 * i) for i in range(num_sequences - 2)], (30, 200), (1, 0))
    check_attention(AttentionCase(lengths, (32, 8), 128, 64, dtype=BF16), device, splits=17, share_tokens=share_tokens)
    check_attention(AttentionCase(lengths, (32, 8), 64, 16, dtype=BF16, kv_dtype=FP8), device, splits=17, share_tokens=share_tokens)


@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8)])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_prefill_attention_beside_decodes(head_dim: int, block_size: int, heads: tuple[int, int], device: Device) -> None:
    lengths = ((1, 300), (2, 0), (700, 0), (129, 1000), (1, 0), (64, 64), (33, 5))
    check_attention(AttentionCase(lengths, heads, head_dim, block_size, dtype=BF16), device, splits=3)


@pytest.mark.parametrize("window", [1, 100, 1024])
@pytest.mark.parametrize("block_size", [16, 64])
def test_windows(block_size: int, window: int, device: Device) -> None:
    lengths = ((1, 300), (1, 2000), (700, 0), (129, 1500))
    check_attention(AttentionCase(lengths, (32, 8), 128, block_size, window, BF16), device, splits=4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp8_kv(head_dim: int, dtype: torch.dtype, device: Device) -> None:
    lengths = ((1, 300), (1, 2000), (700, 0), (129, 1500))
    check_attention(AttentionCase(lengths, (32, 8), head_dim, 64, dtype=dtype, kv_dtype=FP8), device, splits=4)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_other_types(dtype: torch.dtype, device: Device) -> None:
    check_attention(AttentionCase(((1, 300), (1, 2000), (90, 77)), (32, 8), 128, 64, dtype=dtype), device, splits=4)


def test_sharp_softmax(device: Device) -> None:
    check_attention(AttentionCase(((1, 3000), (90, 77)), (32, 8), 128, 64, dtype=FP16, sharpness=100), device, splits=5)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_rows", [2, 255, 256, 1000, 3001])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((32, 8), 128, 64), ((28, 4), 128, 16), ((8, 8), 64, 32)])
def test_cudnn_attention(heads: tuple[int, int], head_dim: int, block_size: int, num_rows: int, dtype: torch.dtype, device: Device) -> None:
    check_cudnn_attention(AttentionCase(((num_rows, 0),), heads, head_dim, block_size, dtype=dtype), device)


def test_whole_prompts_take_the_way_that_was_prepared(device: Device) -> None:
    """A prompt long enough for cuDNN, whole and in two chunks: the same answers but for rounding."""
    ops = ops_for(torch.device("cuda"), 128, 64, BF16)
    whole = attention_inputs(AttentionCase(((7200, 0),), (8, 2), 128, 64, dtype=BF16), device)
    ops.prepare(8, whole.kv_pool, 7500)
    found = ops.paged_attention(whole.q, whole.kv_pool, 1, replace(whole.paging, has_single_rows=False, is_whole_prompt=True), 0.1, None)
    paged = ops.paged_attention(whole.q, whole.kv_pool, 1, replace(whole.paging, has_single_rows=False), 0.1, None)
    assert_close(found, paged, 1e-2, device)
    assert not torch.equal(found, paged), "cuDNN was not used"


def test_a_long_prompt(device: Device) -> None:
    check_attention(AttentionCase(((8192, 0), (1, 16000), (512, 15000)), (8, 2), 128, 64, dtype=BF16), device, splits=16)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n", [64, 96, 896, 4096, 8192, 16384])
@pytest.mark.parametrize("num_rows", ROWS)
def test_norms(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    check_norms(num_rows, n, dtype, device)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n", [3, 4864, 14336])
@pytest.mark.parametrize("num_rows", ROWS)
def test_silu_mul(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    check_silu_mul(num_rows, n, dtype, device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (4864, 896), (1001, 1008), (3, 16)])
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 128])
def test_skinny_linear(m: int, n: int, k: int, dtype: torch.dtype, device: Device) -> None:
    check_skinny_linear(m, n, k, dtype, device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(14_336, 4096), (4864, 896), (1001, 1008), (3, 16)])
@pytest.mark.parametrize("m", [1, 16, 33, 64, 128])
def test_linear_silu_mul(m: int, n: int, k: int, dtype: torch.dtype, device: Device) -> None:
    check_linear_silu_mul(m, n, k, dtype, device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14_336), (896, 4864), (8192, 1024), (1001, 1008)])
@pytest.mark.parametrize("m", [1, 7, 16, 40, 128])
def test_linear_add_rms_norm(m: int, n: int, k: int, dtype: torch.dtype, device: Device) -> None:
    check_linear_add_rms_norm(m, n, k, dtype, device)


def test_skinny_linear_in_a_graph(device: Device) -> None:
    x, weight = (torch.randn(rows, 4096, generator=device.generator()).to(device.name, BF16) for rows in (16, 4096))
    linear = ops_for(torch.device("cuda"), 128, 64, BF16).linear
    expected, graph = linear(x, weight, None), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear(x, weight, None)
    graph.replay()
    assert torch.equal(found, expected)


PAGED_TILES = [
    PrefillTile(128, 64, 8, 3, pages=1),
    PrefillTile(128, 64, 8, 2, pages=1, max_registers=128),
    PrefillTile(128, 64, 8, 2, pages=2),
]


@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8)])
@pytest.mark.parametrize("tile", PAGED_TILES)
def test_prefill_by_pages(tile: PrefillTile, heads: tuple[int, int], device: Device) -> None:
    case = AttentionCase(((700, 0), (129, 1000), (1, 70), (64, 64), (2, 0), (33, 5)), heads, 128, 64, dtype=BF16)
    check_attention(case, device, prefill_tile=tile)


CHUNKS = ((16, 5000), (1, 300), (3, 0), (129, 3000), (2, 1100), (1, 4000), (40, 200))


@pytest.mark.parametrize("room", [2, 33])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8)])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_chunks_against_long_contexts(head_dim: int, block_size: int, heads: tuple[int, int], room: int, device: Device) -> None:
    check_attention(AttentionCase(CHUNKS, heads, head_dim, block_size, dtype=BF16), device, splits=3, cut=ChunkCut(room, 128))


@pytest.mark.parametrize("window", [100, 2000])
@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_chunks_against_windows(kv_dtype: torch.dtype | None, window: int, device: Device) -> None:
    check_attention(AttentionCase(CHUNKS, (32, 8), 128, 64, window, BF16, kv_dtype), device, splits=3, cut=ChunkCut(33, 128))


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_chunks_of_other_types(dtype: torch.dtype, device: Device) -> None:
    check_attention(AttentionCase(CHUNKS, (8, 2), 128, 64, dtype=dtype, sharpness=10), device, splits=3, cut=ChunkCut(33, 128))


@pytest.mark.parametrize("tile", PAGED_TILES)
def test_chunks_by_pages(tile: PrefillTile, device: Device) -> None:
    check_attention(AttentionCase(CHUNKS, (32, 8), 128, 64, dtype=BF16), device, prefill_tile=tile, cut=ChunkCut(33, 64))


def test_chunks_are_cut_as_shapes_say(device: Device) -> None:
    """Without a `cut`: a chunk of few tokens, whose context is in as many shares as fill the GPU, and one that fills it."""
    for lengths in (((16, 12_000),), ((1, 9000), (100, 9000), (1, 30)), ((256, 5000),), ((700, 5000),)):
        check_attention(AttentionCase(lengths, (32, 8), 128, 64, dtype=BF16), device)


def test_items_of_chunks(device: Device) -> None:
    assert check_items([(16, 12_000)], ChunkCut(33), 16, None, device) == [23]
    assert check_items(list(CHUNKS), ChunkCut(33, 128), 16, None, device) == [4, 0, 1, 2, 1, 0, 1]
    assert check_items([(1, 50)] * 130 + [(9, 4000)] + [(2, 30)] * 20 + [(40, 9000)], ChunkCut(33), 16, None, device)[-1] == 9


def test_chunks_in_a_graph(device: Device) -> None:
    """Captured for one context, replayed for others: from many shares to one, which is written without a merge."""
    case = AttentionCase(((16, 8000), (20, 3000)), (32, 8), 128, 64, dtype=BF16)
    inputs, graph = attention_inputs(case, device), torch.cuda.CUDAGraph()
    out = torch.empty(inputs.q.shape, dtype=BF16, device=device.name)

    def attend() -> None:
        prefill_attention(out, inputs.q, inputs.kv_pool, inputs.layer, inputs.paging, case.scale, None, None)

    attend()
    with torch.cuda.graph(graph):
        attend()
    for contexts in ((8016, 3020), (700, 3020), (5000, 60), (16, 20)):
        inputs.paging.context_lens.copy_(torch.tensor(contexts))
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, expected_attention(case, inputs), 1e-2, device)


@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("num_tokens", ROWS)
def test_rope_write_kv(num_tokens: int, head_dim: int, head_norms: bool, kv_dtype: torch.dtype | None, device: Device) -> None:
    check_rope_write_kv(RopeCase(num_tokens, (32, 8), head_dim, 64, BF16, kv_dtype, head_norms, padding=num_tokens // 3), device)


@pytest.mark.parametrize("num_tokens", ROWS)
def test_rope_alone(num_tokens: int, device: Device) -> None:
    check_rope_alone(RopeCase(num_tokens, (32, 8), 128), device)


def test_padding_of_a_decode_batch(device: Device) -> None:
    check_padded_decode(device)


def test_no_tokens(device: Device) -> None:
    check_empty(device)


def test_a_model_over_the_kernels(device: Device) -> None:
    """fp32, so that what differs is a kernel and not a rounding; matrix products of both sides are exact fp32."""
    weights = random_weights(device.generator(), device.name)
    kernels = ops_for(torch.device("cuda"), 64, 16, FP32)
    expected, found = (logits_of_steps(ops, weights, device.name) for ops in (REFERENCE, kernels))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-4, device)


@pytest.mark.parametrize("vocab", [1, 97, 8192, 32000, 151_936])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_sampling(vocab: int, dtype: torch.dtype, device: Device) -> None:
    check_sampling(vocab, device, tile=None, rows_of_each=6, dtype=dtype)


@pytest.mark.parametrize("vocab", [97, 9000, 128_256])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_how_many_programs_share_a_row_changes_nothing(vocab: int, dtype: torch.dtype, device: Device) -> None:
    check_sharing(vocab, device, dtype)


@pytest.mark.parametrize("vocab", [97, 8192, 32000, 151_936])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_changed_logits_and_logprobs(vocab: int, dtype: torch.dtype, device: Device) -> None:
    check_logit_changes(vocab, device, logit_changes.TILE, dtype)
    check_logprobs(vocab, device, logprobs.TILE, dtype)


def test_what_was_refused_stays_so_and_full_counts_stay_full(device: Device) -> None:
    check_settling(device)


def test_there_are_no_logprobs_of_what_is_no_number(device: Device) -> None:
    check_logprobs_of_no_numbers(128_256, device, logprobs.TILE)


@pytest.mark.parametrize("vocab", [300, 128_256])
def test_a_gpus_sampler(vocab: int, device: Device) -> None:
    check_device_sampler(vocab, device)


def test_blocks_beyond_32_bits_of_offset(device: Device) -> None:
    """A pool of more than 2^31 elements, the context in its last blocks."""
    case = AttentionCase(((1, 200), (90, 77)), (8, 8), 128, 64, dtype=BF16)
    check_attention(case, device, splits=2, blocks_before=6000)


def test_decode_inputs(device: Device) -> None:
    check_decode_inputs([1, 16, 17, 4096, 16_000, 63], 10, device)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_pending_tokens(count: int, device: Device) -> None:
    check_pending(count, device)


def test_logits_that_are_no_numbers_are_refused(device: Device) -> None:
    check_refusal(128_256, device, tile=None)
