"""The Triton kernels compile for sm_90, use its tensor cores and asynchronous copies, and keep everything in registers: no GPU needed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from harness.hopper import Launch, Resources, captured, resources

from diptych.kernels import (
    context_shares,
    decode_attention,
    decode_inputs,
    exchange,
    logit_changes,
    logprobs,
    norms,
    page_conversion,
    page_push,
    prefill_attention,
    rope_kv,
    sampling,
    silu_mul,
    skinny_linear,
)
from diptych.kernels.ops import HeadNorms, Paging

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SHARED_BYTES_OF_AN_SM = 227 * 1024
REGISTERS_OF_AN_SM = 65536


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def paging(num_sequences: int) -> Paging:
    int32 = torch.int32
    rows = meta(num_sequences + 1, dtype=int32), meta(num_sequences, dtype=int32), meta(num_sequences, 128, dtype=int32)
    return Paging(*rows, share_tokens=meta(1, dtype=int32))


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
    q = meta(96, heads[0] + 2 * heads[1], head_dim, dtype=dtype)[:, : heads[0]]
    out = meta(*q.shape, dtype=dtype)
    for batch, splits in ((1, 4), (64, 17), (64, 1), (96, 1)):
        with captured(decode_attention, "_decode_kernel", "_merge_kernel", "_list_kernel") as launches:
            where = decode_attention.with_share_list(paging(batch), heads[1], splits, 132)
            decode_attention.decode_attention(out[:batch], q[:batch], pool, 31, where, 0.1, window, scales, splits)
        *lists, decode, merge = [*map(compiled, launches), *[None] * (splits == 1)]
        assert len(lists) == (where.share_list is not None) == context_shares.are_listed(batch * heads[1], splits, 132)
        assert decode is not None
        threads = 32 * launches[len(lists)].options["num_warps"]
        at_once = 2 if kv_dtype is FP8 else context_shares.resident(batch * heads[1], 132)
        assert at_once * (decode.shared_bytes + 1024) <= 228 << 10, "an SM has fewer programs at once than contexts are cut for"
        assert at_once * decode.registers * threads <= REGISTERS_OF_AN_SM
        assert "cp.async.cg" in decode.ptx, "keys and values are not copied asynchronously"
        assert (merge is None) == (splits == 1)
    with captured(prefill_attention, "_prefill_kernel", "_share_kernel", "merge_shares") as launches:
        for room in (0, 16):
            cut = context_shares.ChunkCut(room)
            prefill_attention.prefill_attention(out, q, pool, 31, paging(4), 0.1, window, scales, cut=cut)
    *attentions, merge = map(compiled, launches)
    assert all("wgmma.mma_async" in found.ptx for found in attentions), "products are not on Hopper's own matrix instructions"
    assert "ld.global.v4" in merge.ptx


@pytest.mark.parametrize("tile", [prefill_attention.SHORT, prefill_attention.LONG])
def test_prefill_by_pages(tile: prefill_attention.PrefillTile) -> None:
    q, pool = meta(64, 48, 128)[:, :32], meta(20_000, 32, 2, 8, 64, 128)
    with captured(prefill_attention, "_prefill_kernel", "_share_kernel", "merge_shares") as launches:
        for room in (0, 33):
            cut = context_shares.ChunkCut(room)
            prefill_attention.prefill_attention(meta(64, 32, 128), q, pool, 31, paging(4), 0.1, None, None, tile, cut)
    *attentions, merge = launches
    assert "ld.global.v4" in compiled(merge).ptx
    for found in map(compiled, attentions):
        assert "cp.async.bulk.tensor" in found.ptx, "pages are not copied by TMA"
        assert "wgmma.mma_async" in found.ptx
        assert tile.resident * (found.shared_bytes + 1024) <= 228 << 10, "an SM has fewer programs at once than contexts are cut for"
        assert tile.resident * found.registers * 32 * tile.num_warps <= REGISTERS_OF_AN_SM


def test_chunks_are_cut_where_their_tiles_leave_multiprocessors_idle() -> None:
    """Llama-3-8B's shapes; what is launched depends on no value."""

    def kernels(tokens: int, sequences: int, **how: bool) -> list[str]:
        q, pool = meta(tokens, 48, 128)[:, :32], meta(20_000, 32, 2, 8, 64, 128)
        where = replace(paging(sequences), **how)
        with captured(prefill_attention, "_prefill_kernel", "_share_kernel", "merge_shares") as launches:
            prefill_attention.prefill_attention(meta(tokens, 32, 128), q, pool, 31, where, 0.1, None, None)
        return [launch.kernel.__name__ for launch in launches]

    cut, whole = ["_share_kernel", "merge_shares"], ["_prefill_kernel"]
    assert kernels(64, 1) == kernels(256, 32, has_single_rows=False) == kernels(256, 64) == kernels(384, 255) == cut
    assert kernels(320, 1) == kernels(320, 32, has_single_rows=False) == kernels(1024, 255) == kernels(4096, 1) == whole
    assert kernels(256, 1, is_whole_prompt=True) == whole


@pytest.mark.parametrize("m", [1, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(28_672, 4096), (4096, 14_336), (1001, 1008)])
def test_skinny_linear(n: int, k: int, m: int) -> None:
    with captured(skinny_linear, "_linear_kernel", "_sum_kernel") as launches:
        skinny_linear.skinny_linear(meta(m, n), meta(m, k), meta(n, k), meta(n))
    product, *total = [compiled(launch) for launch in launches]
    assert by_tma(product)
    assert len(total) == (launches[0].arguments["share"] < k)


@pytest.mark.parametrize("m", [1, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(14_336, 4096), (4864, 896)])
def test_linear_silu_mul(n: int, k: int, m: int) -> None:
    with captured(skinny_linear, "_linear_kernel") as launches:
        skinny_linear.skinny_linear_silu_mul(meta(m, n), meta(m, k), meta(2 * n, k), None)
    assert by_tma(compiled(launches[0]))


@pytest.mark.parametrize(("n", "k"), [(4096, 14_336), (896, 4864), (8192, 28_672)])
@pytest.mark.parametrize("m", [16, 128])
def test_linear_add_rms_norm(m: int, n: int, k: int) -> None:
    with captured(skinny_linear, "_linear_kernel") as products, captured(norms, "_norm_kernel") as sums:
        parts = skinny_linear.partial_products(meta(m, k), meta(n, k))
        norms.sum_add_rms_norm(meta(m, n), parts, meta(n), meta(m, n), meta(n), 1e-5)
    assert by_tma(compiled(products[0]))
    assert only_wide_loads(compiled(sums[0]))


def by_tma(found: Resources) -> bool:
    """Weights and rows come in tiles, straight to where the tensor cores read them."""
    return "cp.async.bulk.tensor" in found.ptx and "wgmma.mma_async" in found.ptx


@pytest.mark.parametrize("n", [896, 4096, 8192])
def test_norms(n: int) -> None:
    with captured(norms, "_norm_kernel") as launches:
        norms.rms_norm(meta(64, n), meta(64, n), meta(n), 1e-5)
        norms.add_rms_norm(meta(64, n), meta(64, n), meta(64, n), meta(n), 1e-5)
    for launch in launches:
        assert only_wide_loads(compiled(launch))


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize(
    ("num_ranks", "width", "dtype"), [(2, 4096, BF16), (8, 8192, BF16), (4, 5120, torch.float16), (2, 4096, torch.float32)]
)
def test_exchange(num_ranks: int, width: int, dtype: torch.dtype, scatters: bool) -> None:
    shape = exchange.ExchangeShape(num_ranks, 16, width, logit_rows=4, logit_columns=1024, dtype=dtype)
    memories = [torch.zeros(sum(shape.sizes), dtype=torch.uint8) for _ in range(num_ranks)]
    ends = [exchange.Exchange(rank, memories, shape) for rank in range(2)]
    kernels = "_sum_norm_kernel", "_wait_kernel", "_tell_kernel", "_gather_kernel"
    with captured(exchange, *kernels) as launches:
        residual, weight = torch.zeros(16, width, dtype=dtype), torch.zeros(width, dtype=dtype)
        ends[0].add_rms_norm(weight, residual, weight, 1e-5, scatters)
        for end in ends:
            end.gather_logits(end.logits_part(4))
    found = {launch.kernel.__name__: compiled(launch) for launch in launches}
    assert found.keys() == {*kernels} - ({"_wait_kernel"} if not scatters else set())
    assert "ld.global.cg.v4.b32" in found["_sum_norm_kernel"].ptx, "parts are read piecemeal"
    for kernel in found.keys() - {"_gather_kernel", "_wait_kernel"}:
        assert "release.sys" in found[kernel].ptx or "sys.release" in found[kernel].ptx, "a rank could be told before its part is there"
    for kernel in found.keys() - {"_tell_kernel"}:
        assert "acquire.sys" in found[kernel].ptx or "sys.acquire" in found[kernel].ptx, "a part could be read before it is there"


def test_pending_tokens() -> None:
    with captured(decode_inputs, "_pending_kernel") as launches:
        decode_inputs.fetch_pending(*(meta(count, dtype=torch.int64) for count in (2048, 64, 64, 256)))
    compiled(launches[0])


def test_decode_inputs() -> None:
    int32, int64 = torch.int32, torch.int64
    rows = [meta(256, dtype=int64) for _ in range(3)]
    where = Paging(meta(257, dtype=int32), meta(256, dtype=int32), meta(256, 250, dtype=int32))
    with captured(decode_inputs, "_inputs_kernel") as launches:
        decode_inputs.decode_inputs(*rows, where, meta(100_000, dtype=int32), meta(256, dtype=int64), 64)
    assert compiled(launches[0]).registers <= 64


def test_silu_mul() -> None:
    with captured(silu_mul, "_silu_mul_kernel") as launches:
        silu_mul.silu_mul(meta(64, 14336), meta(64, 28672))
    assert only_wide_loads(compiled(launches[0]))


def only_wide_loads(found: Resources) -> bool:
    """16 bytes a thread, wherever a vector is read."""
    return found.ptx.count("ld.global.v4") == found.ptx.count("ld.global") > 0


@pytest.mark.parametrize(("head_dim", "kv_dtype"), [(64, BF16), (96, BF16), (128, BF16), (128, FP8), (256, FP8)])
def test_rope_write_kv(head_dim: int, kv_dtype: torch.dtype) -> None:
    int64, fp32 = torch.int64, torch.float32
    q, k, v = meta(64, 48, head_dim).split([32, 8, 8], dim=1)
    pool, scales = meta(20_000, 32, 2, 8, 64, head_dim, dtype=kv_dtype), meta(32, 2, 8, dtype=fp32) if kv_dtype is FP8 else None
    head_norms = HeadNorms(meta(head_dim), meta(head_dim), 1e-6)
    positions, cos_sin = meta(64, dtype=int64), meta(8192, head_dim, dtype=fp32)
    with captured(rope_kv, "_rope_kernel") as launches:
        rope_kv.rope_write_kv(q, k, v, head_norms, positions, cos_sin, pool, 31, positions, scales)
        parts, biases = (meta(*shape, 48, head_dim, dtype=fp32).split([32, 8, 8], dim=-2) for shape in ((2, 64), ()))
        rope_kv.sum_rope_write_kv(meta(64, 32, head_dim), parts, biases, head_norms, positions, cos_sin, pool, 31, positions, scales)
    for launch in launches:
        assert compiled(launch).registers <= 128


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("programs", [1, 8])
def test_sampling(programs: int, dtype: torch.dtype) -> None:
    rows, fp32 = 16, torch.float32
    columns = {name: meta(rows, dtype=fp32) for name in ("temperature", "top_p", "min_p", "fraction")}
    draws = sampling.Draws(top_k=meta(rows, dtype=torch.int32), **columns)
    with captured(sampling, "_sample_kernel") as launches:
        sampling.sample(meta(rows, 128_256, dtype=dtype), draws, refuse_infinite=True, programs=programs)
    found = compiled(launches[0])
    assert "ld.global.v4" in found.ptx
    assert ("ld.global.gpu.acquire" in found.ptx) == (programs > 1), "nobody waits, or somebody alone does"


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_changed_logits_and_logprobs(dtype: torch.dtype) -> None:
    rows, vocab, int32, fp32 = 64, 128_256, torch.int32, torch.float32
    logits, counts, sampled = meta(rows, vocab, dtype=dtype), meta(rows, vocab, dtype=torch.int16), meta(rows, dtype=torch.int64)
    at, real = meta(rows, dtype=int32), meta(rows, dtype=fp32)
    biases = meta(rows + 1, dtype=int32), meta(900, dtype=int32), meta(900, dtype=fp32)
    changes = logit_changes.LogitChanges(at, at, real, real, real, *biases)
    with captured(logit_changes, "_penalise_kernel", "_bias_kernel", "_settle_kernel") as launches:
        logit_changes.change_logits(logits, counts, changes)
        logit_changes.settle(sampled, sampled, counts, changes)
    with captured(logprobs, "_logprobs_kernel") as more:
        logprobs.token_logprobs(logits, at, at, sampled, at, 20)
    assert len(launches + more) == 4
    for launch in launches + more:
        assert compiled(launch).registers <= 128
    assert "ld.global.v4" in compiled(more[0]).ptx


@pytest.mark.parametrize("page_bytes", [2048, 4096, 65_536, 98_304, 262_144])
@pytest.mark.parametrize("num_warps", [4, 8, 16, 32])
def test_page_push(page_bytes: int, num_warps: int) -> None:
    int64 = torch.int64
    arrived, lock, finished = (meta(1, dtype=torch.int32) for _ in range(3))
    counting = page_push.Counting(meta(4096, dtype=int64), 7, 99, arrived, lock, page_push.Turns(finished), meta(2, dtype=int64))
    shape = page_push.PushShape(num_programs=24, num_warps=num_warps, tile_bytes=min(num_warps, 16) << 11)
    with captured(page_push, "_push_kernel") as launches:
        pool = meta(1 << 20, dtype=int64)
        ids = page_push.IdBuffers(meta(198, dtype=int64), meta(198, dtype=int64))
        page_push.push_pages(pool, pool, ids, 99, page_bytes // 8, counting, shape)
    found = compiled(launches[0])
    assert found.registers <= REGISTERS_OF_AN_SM // (32 * max(num_warps, page_push.WARPS_OF_AN_SM))
    assert "ld.global.v2.b64" in found.ptx
    assert "st.global.v2.b64" in found.ptx
    assert "acq_rel.sys" in found.ptx or "sys.acq_rel" in found.ptx, "the count could run ahead of its pages"


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP8), (FP8, BF16), (torch.float32, torch.float16)])
def test_page_conversion(dtypes: tuple[torch.dtype, torch.dtype], head_dim: int) -> None:
    pools = [meta(1000, 32, 2, 8, size, head_dim, dtype=dtype) for size, dtype in zip((64, 16), dtypes, strict=True)]
    ids, scales = meta(99, dtype=torch.int64), meta(32, 2, 8, dtype=torch.float32)
    with captured(page_conversion, "_convert_kernel") as launches:
        page_conversion.convert_pages(*pools, ids, ids, ids, scales)
    found = compiled(launches[0])
    assert "ld.global.v4.b32" in found.ptx
    assert "st.global.v4.b32" in found.ptx


def test_a_direct_launch_passes_what_a_launch_through_triton_passes() -> None:
    int64 = torch.int64
    source, target, ids, scratch, counters, times = (torch.zeros(64, dtype=int64) for _ in range(6))
    arrived, lock, finished = (torch.zeros(64, dtype=torch.int32) for _ in range(3))
    shape, launched = page_push.PushShape(num_programs=5), []
    with captured(page_push, "_push_kernel") as launches:
        counting = page_push.Counting(counters, 3, 40, arrived, lock, page_push.Turns(finished, 7), times)
        page_push.push_pages(source, target, page_push.IdBuffers(ids, scratch), 32, 8192, counting, shape)
    compiled = SimpleNamespace(run=lambda *arguments: launched.append(arguments), function="function", packed_metadata="metadata")
    push = page_push.PagePush(compiled, source, 8192, arrived, lock, page_push.Turns(finished, 7), shape)
    push(*(tensor.data_ptr() for tensor in (target, ids, scratch)), 32, counters.data_ptr(), 3, 40, times.data_ptr(), 77)
    expected = [at.data_ptr() if isinstance(at, torch.Tensor) else at for at in launches[0].arguments.values()]
    assert launched == [(5, 1, 1, 77, "function", "metadata", None, None, None, *expected)]
    assert list(launches[0].arguments) == page_push._push_kernel.arg_names
