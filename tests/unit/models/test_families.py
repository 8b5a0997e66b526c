"""Every family equals Hugging Face's own code on the same random weights, fp32: in one pass, and in chunks over a shuffled paged pool."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from harness.families import CASES, save_random_model
from torch import Tensor

from diptych.kernels.reference import ReferenceOps
from diptych.models.batch import ForwardBatch
from diptych.models.config import ModelConfig
from diptych.models.loader import load_weights
from diptych.models.transformer import Transformer

torch.set_num_threads(1)

NUM_TOKENS = 43
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Loaded:
    model: Transformer
    token_ids: Tensor         # [NUM_TOKENS] int64
    expected: Tensor          # [NUM_TOKENS, vocab] fp32, from transformers


@pytest.fixture(scope="module", params=list(CASES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("model")
    oracle = save_random_model(CASES[request.param], folder)
    token_ids = torch.randint(0, 97, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(token_ids[None]).logits[0]
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, torch.float32, torch.device("cpu"))
    return Loaded(Transformer(config, weights, ReferenceOps()), token_ids, expected)


def new_pool(config: ModelConfig, num_blocks: int, block_size: int) -> Tensor:
    """Full of NaN, so that whatever is read without having been written shows."""
    return torch.full((num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim), torch.nan)


def one_chunk(token_ids: Tensor, table: Tensor, begin: int, end: int, block_size: int) -> ForwardBatch:
    """Tokens begin to end of one sequence, logits of all of them."""
    positions = torch.arange(begin, end)
    return ForwardBatch(
        token_ids=token_ids[begin:end],
        positions=positions,
        slots=table[positions // block_size].long() * block_size + positions % block_size,
        query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
        context_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=table[None],
        logit_rows=torch.arange(end - begin),
    )


def shuffled_table(num_blocks: int, seed: int = 0) -> Tensor:
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()


def test_whole_prompt(loaded: Loaded) -> None:
    pool = new_pool(loaded.model.config, 4, 16)
    logits = loaded.model.forward(one_chunk(loaded.token_ids, shuffled_table(4), 0, NUM_TOKENS, 16), pool)
    torch.testing.assert_close(logits, loaded.expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("block_size", "chunk"), [(1, 5), (3, 1), (4, 7), (64, 16)])
def test_chunked_prefill_then_decode(loaded: Loaded, block_size: int, chunk: int) -> None:
    num_blocks = -(-NUM_TOKENS // block_size)
    pool, table = new_pool(loaded.model.config, num_blocks, block_size), shuffled_table(num_blocks)
    prefilled = NUM_TOKENS - 6
    bounds = [*range(0, prefilled, chunk), *range(prefilled, NUM_TOKENS + 1)]
    parts = [
        loaded.model.forward(one_chunk(loaded.token_ids, table, begin, end, block_size), pool)
        for begin, end in pairwise(bounds)
    ]
    torch.testing.assert_close(torch.cat(parts), loaded.expected, atol=TOLERANCE, rtol=0)


def test_chunks_and_decodes_in_one_batch(loaded: Loaded) -> None:
    """Three sequences, each a prefix of the tokens, in one step: a decode, a chunk with earlier context, a whole prompt."""
    block_size, earlier, lengths = 4, (20, 9, 0), (1, 6, 5)
    tables = [table.int() for table in shuffled_table(18).chunk(3)]
    pool = new_pool(loaded.model.config, 18, block_size)
    for table, begin in zip(tables, earlier, strict=True):
        if begin:
            loaded.model.forward(one_chunk(loaded.token_ids, table, 0, begin, block_size), pool)
    parts = [
        one_chunk(loaded.token_ids, table, begin, begin + length, block_size)
        for table, begin, length in zip(tables, earlier, lengths, strict=True)
    ]
    last_rows = torch.tensor(lengths).cumsum(0) - 1
    together = ForwardBatch(
        token_ids=torch.cat([part.token_ids for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        slots=torch.cat([part.slots for part in parts]),
        query_starts=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        context_lens=torch.cat([part.context_lens for part in parts]),
        block_tables=torch.stack(tables),
        logit_rows=last_rows,
    )
    logits = loaded.model.forward(together, pool)
    expected = loaded.expected[[begin + length - 1 for begin, length in zip(earlier, lengths, strict=True)]]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_each_layer_is_announced_once_its_pages_are_final(loaded: Loaded) -> None:
    pool, table = new_pool(loaded.model.config, 4, 16), shuffled_table(4)
    seen: list[Tensor] = []

    def copy_pages(layer: int) -> None:
        assert layer == len(seen)
        assert bool(pool[:, layer + 1 :].isnan().all())
        seen.append(pool[:, layer].clone())

    loaded.model.forward(one_chunk(loaded.token_ids, table, 0, NUM_TOKENS, 16), pool, copy_pages)
    assert len(seen) == loaded.model.config.num_layers
    torch.testing.assert_close(torch.stack(seen, dim=1), pool, equal_nan=True, atol=0, rtol=0)


def test_no_logit_rows_still_writes_the_pool(loaded: Loaded) -> None:
    pool = new_pool(loaded.model.config, 4, 16)
    batch = replace(one_chunk(loaded.token_ids, shuffled_table(4), 0, 10, 16), logit_rows=torch.empty(0, dtype=torch.int64))
    assert loaded.model.forward(batch, pool).shape == (0, loaded.model.config.vocab_size)
    assert not bool(pool.isnan().all())
