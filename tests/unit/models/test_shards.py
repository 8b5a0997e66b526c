"""A model in several ranks equals the whole one: its logits, and what each rank puts into its KV pool."""

from pathlib import Path

import pytest
import torch
from harness.families import Case, save_random_model
from safetensors.torch import save_file
from torch import Tensor

from diptych.engine.ranks import Ranks
from diptych.kernels.host_exchange import HostExchange, RankedReferenceOps
from diptych.kernels.reference import ReferenceOps
from diptych.messages.errors import ModelError
from diptych.models.batch import ForwardBatch
from diptych.models.config import ModelConfig, Shard
from diptych.models.loader import LoadFormat, load_weights
from diptych.models.transformer import Transformer
from diptych.models.weights import weight_plan

torch.set_num_threads(1)

CPU = torch.device("cpu")
NUM_TOKENS, BLOCK_SIZE = 23, 4
CASES = {
    "llama": Case("Llama", 8, 4, 8, {"vocab_size": 96}),
    "llama, tied, a vocabulary that cannot be shared": Case("Llama", 4, 4, 6, {"tie_word_embeddings": True}),
    "llama, tied": Case("Llama", 4, 4, 6, {"tie_word_embeddings": True, "vocab_size": 96}),
    "llama, biases": Case("Llama", 8, 4, 8, {"attention_bias": True, "mlp_bias": True, "vocab_size": 96}),
    "mistral, window": Case("Mistral", 8, 4, 8, {"sliding_window": 7, "vocab_size": 96}),
    "qwen2": Case("Qwen2", 12, 4, 8),
    "qwen3": Case("Qwen3", 8, 4, 24, {"vocab_size": 96, "attention_bias": True}),
}


def batch() -> ForwardBatch:
    """One prompt, its blocks in reverse; logits of every token."""
    positions, table = torch.arange(NUM_TOKENS), torch.arange(-(-NUM_TOKENS // BLOCK_SIZE)).flip(0).int()
    return ForwardBatch(
        token_ids=torch.randint(0, 96, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)),
        positions=positions,
        slots=table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_starts=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        context_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        block_tables=table[None],
        logit_rows=torch.arange(NUM_TOKENS),
    )


def new_pool(config: ModelConfig) -> Tensor:
    return torch.zeros(-(-NUM_TOKENS // BLOCK_SIZE), config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_compute_what_the_model_does(name: str, size: int, tmp_path: Path) -> None:
    oracle = save_random_model(CASES[name], tmp_path)
    config, exchange = ModelConfig.from_folder(tmp_path), HostExchange(size)
    with torch.no_grad():
        expected = oracle(batch().token_ids[None]).logits[0]
    whole_pool = new_pool(config)
    Transformer(config, load_weights(tmp_path, config, torch.float32, CPU), ReferenceOps()).forward(batch(), whole_pool)

    def load(rank: int) -> Transformer:
        weights = load_weights(tmp_path, config, torch.float32, CPU, shard=Shard(rank, size))
        return Transformer(config.of_rank(Shard(rank, size)), weights, RankedReferenceOps(rank, exchange))

    ranks = Ranks([CPU] * size, lambda rank: exchange.abort())
    models = ranks.run(load)
    pools = [new_pool(model.config) for model in models]
    logits = ranks.run(lambda rank: models[rank].forward(batch(), pools[rank]))
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(pools, dim=3), whole_pool, atol=1e-4, rtol=0)


@pytest.mark.parametrize("load_format", LoadFormat)
def test_parts_of_ranks_make_up_the_weights(load_format: LoadFormat, tmp_path: Path) -> None:
    save_random_model(CASES["llama, biases"], tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    whole = load_weights(tmp_path, config, torch.float32, CPU, load_format)
    parts = [load_weights(tmp_path, config, torch.float32, CPU, load_format, Shard(rank, 2)) for rank in range(2)]
    layer, halves = whole.layers[1], [part.layers[1] for part in parts]
    assert torch.equal(torch.cat([half.down for half in halves], dim=1), layer.down)
    assert torch.equal(torch.cat([half.out for half in halves], dim=1), layer.out)
    gates = [half.gate_up.chunk(2) for half in halves]
    assert torch.equal(torch.cat([gate for gate, _ in gates] + [up for _, up in gates]), layer.gate_up)
    q, k = 64, 32
    shares = [half.qkv.split([q // 2, k // 2, k // 2]) for half in halves]
    assert torch.equal(torch.cat([share[i] for i in range(3) for share in shares]), layer.qkv)
    assert whole.lm_head is not None
    assert torch.equal(torch.cat([part.lm_head for part in parts if part.lm_head is not None]), whole.lm_head)
    for half in halves:
        assert half.out_bias is not None
        assert layer.out_bias is not None
        assert torch.equal(half.out_bias, layer.out_bias)
    planned = [param.shape for param in weight_plan(config, Shard(1, 2)).leaves()]
    assert [tuple(tensor.shape) for tensor in parts[1].leaves()] == planned


@pytest.mark.parametrize(
    ("size", "text"),
    [(3, "tp 3: num_key_value_heads is 4, which is no multiple of it"), (8, "tp 8: num_key_value_heads is 4")],
)
def test_heads_that_cannot_be_shared(size: int, text: str, tmp_path: Path) -> None:
    save_random_model(CASES["llama"], tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    with pytest.raises(ModelError, match=text):
        load_weights(tmp_path, config, torch.float32, CPU, shard=Shard(0, size))


def test_channels_that_cannot_be_shared(tmp_path: Path) -> None:
    save_random_model(Case("Llama", 4, 4, 8, {"intermediate_size": 45}), tmp_path)
    with pytest.raises(ModelError, match="tp 2: intermediate_size is 45"):
        ModelConfig.from_folder(tmp_path).of_rank(Shard(1, 2))


def test_a_tied_head_that_ranks_share_is_the_embeddings_rows(tmp_path: Path) -> None:
    save_random_model(CASES["llama, tied"], tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    weights = load_weights(tmp_path, config, torch.float32, CPU, shard=Shard(1, 2))
    assert weights.lm_head is not None
    assert torch.equal(weights.lm_head, weights.embedding[48:])


def test_a_bias_is_added_once() -> None:
    """Not by each rank."""
    exchange = HostExchange(2)
    ops = [RankedReferenceOps(rank, exchange) for rank in range(2)]
    x, weight, bias, norm = torch.ones(1, 2), torch.ones(4, 2), torch.full((4,), 10.0), torch.ones(4)
    summed = Ranks([CPU] * 2).run(lambda rank: ops[rank].linear_add_rms_norm(x, weight, bias, torch.zeros(1, 4), norm, 0.0)[1])
    assert [rank.tolist() for rank in summed] == [[[14.0] * 4]] * 2


def test_a_checkpoint_is_compared_as_a_whole_by_every_rank(tmp_path: Path) -> None:
    save_random_model(CASES["llama"], tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    tensors = {
        piece.name: torch.zeros(piece.shape) for param in weight_plan(config, Shard(0, 2)).leaves() for piece in param.pieces
    }
    save_file(tensors, tmp_path / "model.safetensors")
    load_weights(tmp_path, config, torch.float32, CPU, shard=Shard(0, 2))
