"""The Triton kernels in Triton's interpreter, on shapes small enough for it. `test_interpreted.py` runs this file in its own process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness.conversion_checks import ConversionCase, check_conversion, check_nothing_to_convert
from harness.decode_inputs_checks import check_decode_inputs, check_pending
from harness.device_sampler_checks import check_device_sampler, without_pinned_memory
from harness.exchange_checks import ExchangeCase, RunAll, check_logits, check_sums, shape_for
from harness.interpreter import make_exact
from harness.kernel_checks import (
    REFERENCE,
    AttentionCase,
    Device,
    RopeCase,
    assert_close,
    check_attention,
    check_empty,
    check_linear_add_rms_norm,
    check_linear_silu_mul,
    check_norms,
    check_padded_decode,
    check_rope_alone,
    check_rope_write_kv,
    check_silu_mul,
    check_skinny_linear,
)
from harness.kernel_model import logits_of_steps, random_weights
from harness.logit_checks import check_logit_changes, check_logprobs, check_logprobs_of_no_numbers, check_settling
from harness.push_checks import check_push, check_turn
from harness.sampling_checks import FILTERS, check_refusal, check_sampling
from harness.share_checks import check_items

from diptych.kernels.context_shares import ChunkCut
from diptych.kernels.decode_attention import with_share_list
from diptych.kernels.exchange import Exchange
from diptych.kernels.ops import Paging
from diptych.kernels.page_push import PushShape
from diptych.kernels.prefill_attention import PrefillTile
from diptych.kernels.skinny_linear import LinearTile
from diptych.kernels.triton_ops import TritonOps

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

torch.set_num_threads(1)
make_exact()
# An empty share of a context has no sum of weights: its logarithm is -inf, as meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")


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
        AttentionCase(lengths=((1, 50),), heads=(4, 2), head_dim=128, dtype=BF16),
        AttentionCase(lengths=((1, 61),), heads=(2, 1), head_dim=128, block_size=64, dtype=BF16, kv_dtype=FP8),
        AttentionCase(lengths=((1, 37),), heads=(17, 1), block_size=32, dtype=torch.float16),
        AttentionCase(lengths=((1, 37),), heads=(2, 1), head_dim=256, block_size=16, dtype=torch.float16),
        AttentionCase(lengths=((1, 50),), dtype=torch.float16, sharpness=100),
    ],
)
def test_decode_attention(case: AttentionCase, splits: int, device: Device) -> None:
    check_attention(case, device, splits)


@pytest.mark.parametrize("share_tokens", [None, 1, 20, 64, 10_000])
def test_shares_that_are_listed(share_tokens: int | None, device: Device) -> None:
    """As of a batch of many sequences on a GPU: there is none to look at that is not there. Prompts' chunks beside have none."""
    lengths = ((1, 0), (3, 9), (1, 63), (1, 5), (2, 0), (1, 40))
    for num_sms in (3, 6):               # the longest first, and as they come
        check_attention(AttentionCase(lengths), device, splits=4, share_tokens=share_tokens, num_sms=num_sms)
    check_attention(AttentionCase(lengths, heads=(4, 1), block_size=64, window=9), device, 3, share_tokens=share_tokens, num_sms=2)


@pytest.mark.parametrize("num_sms", [33, 66])
def test_each_share_is_listed_once_and_of_many_the_longest_first(num_sms: int, device: Device) -> None:
    contexts = [1 + 7 * i % 61 for i in range(131)]
    contexts[5], contexts[130] = 0, 200
    starts = torch.arange(132, dtype=torch.int32)
    starts[100:] += 1                                       # sequence 99 has two rows: it is not a decode
    paging = Paging(starts, torch.tensor(contexts, dtype=torch.int32), torch.zeros(131, 16, dtype=torch.int32))
    listed = with_share_list(replace(paging, share_tokens=torch.tensor([25], dtype=torch.int32)), 1, 3, num_sms).share_list
    assert listed is not None
    num_shares, num_cut, *rest = listed.tolist()
    shares = {i: min(3, max(1, -(-context // 25))) for i, context in enumerate(contexts) if i != 99}
    assert rest[:num_cut] == [i for i, count in shares.items() if count > 1]
    found = [divmod(each, 3) for each in rest[131 : 131 + num_shares]]
    assert sorted(found) == [(i, split) for i, count in shares.items() for split in range(count)]
    lengths = [contexts[i] // shares[i] for i, _ in found]
    assert lengths == sorted(lengths, reverse=True) if num_sms == 33 else found == sorted(found)


def test_shares_of_more_sequences_than_are_listed_in_one_go(device: Device) -> None:
    lengths = tuple((1, 40 if i in (7, 129) else 1) for i in range(131))
    check_attention(AttentionCase(lengths, heads=(1, 1)), device, splits=3, share_tokens=16, num_sms=33)


@pytest.mark.parametrize("share_tokens", [1, 20, 64, 10_000])
def test_contexts_cut_to_shares_of_about_a_length(share_tokens: int, device: Device) -> None:
    """Some sequences are one share, some several, some as many as there are programs."""
    check_attention(AttentionCase(lengths=((1, 0), (1, 5), (1, 63), (1, 20))), device, splits=3, share_tokens=share_tokens)
    check_attention(AttentionCase(lengths=((1, 50), (1, 6)), heads=(7, 1), block_size=64, window=9), device, 2, share_tokens=share_tokens)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=((2, 0), (30, 33))),
        AttentionCase(lengths=((9, 40),), heads=(3, 3), head_dim=96, block_size=32),
        AttentionCase(lengths=((13, 30), (5, 2)), heads=(7, 1), block_size=64, window=9),
        AttentionCase(lengths=((33, 31),), heads=(4, 2), head_dim=128, dtype=BF16),
        AttentionCase(lengths=((20, 41),), heads=(2, 1), head_dim=128, block_size=64, dtype=BF16, kv_dtype=FP8),
        AttentionCase(lengths=((3, 60),), heads=(2, 1), head_dim=256, block_size=16, dtype=torch.float16),
        AttentionCase(lengths=((1, 20), (6, 20), (1, 0), (17, 1)), heads=(4, 2)),
        AttentionCase(lengths=((40, 9),), dtype=torch.float16, sharpness=100),
        AttentionCase(lengths=((1, 9), (40, 90), (3, 0)), heads=(8, 2), head_dim=128, block_size=64, dtype=BF16),      # by pages
        AttentionCase(lengths=((20, 107),), heads=(7, 1), head_dim=128, block_size=64, dtype=torch.float16, sharpness=100),
    ],
)
def test_prefill_attention_beside_decodes(case: AttentionCase, device: Device) -> None:
    check_attention(case, device)


@pytest.mark.parametrize("pages", [1, 2])
def test_prefill_by_pages(pages: int, device: Device) -> None:
    case = AttentionCase(lengths=((1, 9), (3, 130), (20, 250), (3, 0)), heads=(8, 2), head_dim=128, block_size=64, dtype=BF16)
    check_attention(case, device, prefill_tile=PrefillTile(32, 64, 4, 2, pages))


@pytest.mark.parametrize("room", [2, 11])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(lengths=((1, 9), (3, 250), (20, 500), (3, 0), (2, 70)), heads=(8, 2), head_dim=128, block_size=64, dtype=BF16),
        AttentionCase(lengths=((9, 340), (1, 700)), heads=(3, 3), head_dim=96, block_size=32),
        AttentionCase(lengths=((13, 230), (5, 2), (40, 700)), heads=(7, 1), block_size=64, window=300),
        AttentionCase(lengths=((20, 341),), heads=(2, 1), head_dim=128, block_size=64, dtype=BF16, kv_dtype=FP8),
        AttentionCase(lengths=((2, 700),), heads=(2, 1), head_dim=256, dtype=torch.float16, sharpness=100),
    ],
)
def test_chunks_against_long_contexts(case: AttentionCase, room: int, device: Device) -> None:
    check_attention(case, device, cut=ChunkCut(room, fewest_keys=32))


def test_chunks_in_shares_of_two_pages_a_step(device: Device) -> None:
    case = AttentionCase(lengths=((1, 9), (3, 130), (20, 650), (3, 0)), heads=(8, 2), head_dim=128, block_size=64, dtype=BF16)
    check_attention(case, device, prefill_tile=PrefillTile(32, 64, 4, 2, pages=2), cut=ChunkCut(9, fewest_keys=32))


def test_items_of_chunks(device: Device) -> None:
    """Long contexts in several shares, short ones beside in one, single rows in none; more sequences than are looked at in one step."""
    assert check_items([(20, 500)], ChunkCut(11, 32), 16, None, device) == [5]
    assert check_items([(1, 900), (2, 14_000), (3, 0), (30, 700), (1, 0)], ChunkCut(33, 512), 16, None, device) == [0, 27, 1, 1, 0]
    assert check_items([(5, 9000), (17, 9000)], ChunkCut(40, 32), 16, 300, device) == [9, 9]
    many = check_items([(1, 50)] * 130 + [(9, 4000)] + [(2, 30)] * 20 + [(40, 9000)], ChunkCut(33, 512), 16, None, device)
    assert (many[130], many[131], many[-1]) == (4, 1, 9)
    assert check_items([(1, 5)], ChunkCut(4), 16, None, device) == [0]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("num_rows", "n"), [(1, 2048), (3, 2500), (37, 64), (33, 96)])
def test_norms(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    check_norms(num_rows, n, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("num_rows", "n"), [(1, 1024), (5, 1500), (3, 3)])
def test_silu_mul(num_rows: int, n: int, dtype: torch.dtype, device: Device) -> None:
    check_silu_mul(num_rows, n, dtype, device)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k", "splits"), [(1, 64, 128, 1), (3, 40, 336, 3), (17, 33, 96, 1), (5, 32, 256, 2)])
def test_skinny_linear(m: int, n: int, k: int, splits: int, dtype: torch.dtype, device: Device) -> None:
    check_skinny_linear(m, n, k, dtype, device, LinearTile(columns=32, depth=64, splits=splits, num_warps=4, num_stages=2))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (3, 40, 336), (17, 33, 96)])
def test_linear_silu_mul(m: int, n: int, k: int, dtype: torch.dtype, device: Device) -> None:
    check_linear_silu_mul(m, n, k, dtype, device, LinearTile(columns=32, depth=64, splits=1, num_warps=4, num_stages=2))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k", "splits"), [(1, 64, 128, 1), (3, 40, 336, 3), (16, 33, 96, 2)])
def test_linear_add_rms_norm(m: int, n: int, k: int, splits: int, dtype: torch.dtype, device: Device) -> None:
    check_linear_add_rms_norm(m, n, k, dtype, device, LinearTile(columns=32, depth=64, splits=splits, num_warps=4, num_stages=2))


@pytest.mark.parametrize(
    "case",
    [
        RopeCase(num_tokens=1),
        RopeCase(num_tokens=19, heads=(10, 9), padding=4),
        RopeCase(num_tokens=5, heads=(3, 1), head_dim=96, block_size=32, dtype=torch.float16, head_norms=True),
        RopeCase(num_tokens=9, heads=(9, 3), head_dim=128, block_size=64, dtype=BF16, head_norms=True),
        RopeCase(num_tokens=9, heads=(4, 4), head_dim=256, dtype=BF16, kv_dtype=FP8, padding=1),
    ],
)
def test_rope_write_kv(case: RopeCase, device: Device) -> None:
    check_rope_write_kv(case, device)


@pytest.mark.parametrize("case", [RopeCase(num_tokens=7), RopeCase(num_tokens=1, heads=(9, 9), head_dim=96, dtype=BF16)])
def test_rope_alone(case: RopeCase, device: Device) -> None:
    check_rope_alone(case, device)


def test_padding_of_a_decode_batch(device: Device) -> None:
    check_padded_decode(device)


def test_no_tokens(device: Device) -> None:
    check_empty(device)


def test_a_model_over_the_kernels(device: Device) -> None:
    """Every operation as the model calls it, on the strided views that it passes."""
    weights = random_weights(device.generator(), device.name)
    expected, found = (logits_of_steps(ops, weights, device.name) for ops in (REFERENCE, TritonOps(num_sms=4)))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-4, device)


@pytest.mark.parametrize(("contexts", "num_padding"), [([1], 0), ([16, 17, 1, 300], 3), ([4500], 1)])
def test_decode_inputs(contexts: list[int], num_padding: int, device: Device) -> None:
    check_decode_inputs(contexts, num_padding, device)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_pending_tokens(count: int, device: Device) -> None:
    check_pending(count, device)


def test_logits_that_are_no_numbers_are_refused(device: Device) -> None:
    check_refusal(300, device, tile=256)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_sampling(dtype: torch.dtype, device: Device) -> None:
    check_sampling(300, device, tile=256, rows_of_each=1, dtype=dtype)


def test_sampling_from_groups_of_several_tiles(device: Device) -> None:
    check_sampling(1300, device, tile=128, rows_of_each=1, dtype=torch.float32, filters=FILTERS[10:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_changed_logits(dtype: torch.dtype, device: Device) -> None:
    check_logit_changes(300, device, tile=128, dtype=dtype)


def test_what_was_refused_stays_so_and_full_counts_stay_full(device: Device) -> None:
    check_settling(device)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_logprobs(dtype: torch.dtype, device: Device) -> None:
    check_logprobs(300, device, tile=128, dtype=dtype)


def test_there_are_no_logprobs_of_what_is_no_number(device: Device) -> None:
    check_logprobs_of_no_numbers(300, device, tile=128)


def test_a_gpus_sampler(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pinned_memory(monkeypatch)
    check_device_sampler(300, device)


@pytest.mark.parametrize(("page_words", "num_pages"), [(256, 9), (1024, 3), (96, 7), (2048, 1), (64, 0), (32, 1700)])
def test_page_push(page_words: int, num_pages: int) -> None:
    """Several pages to a tile, several tiles to a page, pages that are no power of two, none, more ids than are fetched at once."""
    check_push(page_words, num_pages, PushShape(num_programs=3, num_warps=4, tile_bytes=4096), torch.device("cpu"))


def test_a_push_waits_for_its_turn() -> None:
    check_turn()


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        ConversionCase((BF16, BF16)),
        ConversionCase((torch.float32, BF16), sizes=(16, 64), head_dim=96),
        ConversionCase((BF16, FP8), sizes=(64, 64), head_dim=128),
        ConversionCase((FP8, torch.float16), sizes=(32, 16)),
        ConversionCase((FP8, FP8), sizes=(16, 32), num_tokens=1),
        ConversionCase((torch.float16, FP8), sizes=(12, 7), num_tokens=36),
    ],
)
def test_pages_of_another_layout(case: ConversionCase, has_scales: bool, device: Device) -> None:
    check_conversion(replace(case, has_scales=has_scales), device)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    "case",
    [
        ExchangeCase(5, 96, torch.float32, scatters=False),
        ExchangeCase(5, 96, torch.float32, scatters=True),
        ExchangeCase(1, 64, BF16, scatters=True, has_bias=False),
        ExchangeCase(4, 160, BF16, scatters=False),
    ],
)
def test_sums_over_ranks(case: ExchangeCase, num_ranks: int) -> None:
    check_sums(case, *ranks_in_turn(case, num_ranks))


def test_a_released_rank_waits_for_nobody() -> None:
    """As one whose peer has failed: it would spin here for ever."""
    case = ExchangeCase(4, 64, torch.float32, scatters=True)
    shape = shape_for(case, 2)
    memories = [torch.zeros(sum(shape.sizes), dtype=torch.uint8) for _ in range(2)]
    end = Exchange(0, memories, shape)
    end.release()
    for _ in range(3):
        end.add_rms_norm(None, torch.zeros(4, 64), torch.ones(64), 1e-5, case.scatters)
    end.gather_logits(end.logits_part(2))


def test_logits_of_ranks() -> None:
    check_logits(5, *ranks_in_turn(ExchangeCase(1, 64, torch.float32, scatters=False), 3))


def ranks_in_turn(case: ExchangeCase, num_ranks: int) -> tuple[list[Exchange], RunAll]:
    """Rank 0 comes last, and waits for what the others have really told it. Those find that everybody has told them long ago, for here
    nobody can wait for who has not begun."""
    shape = shape_for(case, num_ranks)
    memories = [torch.zeros(sum(shape.sizes), dtype=torch.uint8) for _ in range(num_ranks)]

    def run_all(work: Callable[[int], None]) -> None:
        for memory in memories[1:]:
            memory[: 3 * 8 * num_ranks].view(torch.int64).fill_(1 << 40)
        for rank in reversed(range(num_ranks)):
            work(rank)

    return [Exchange(rank, memories, shape) for rank in range(num_ranks)], run_all


def test_nothing_to_convert(device: Device) -> None:
    check_nothing_to_convert(device)
