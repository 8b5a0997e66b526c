"""The pools of a deployment may hold KV differently: its tokens are those of the decode worker alone, as far as its KV is exact."""

from typing import Any

import msgspec
import pytest
import torch
from harness.shm_cluster import Result, ShmCluster, shm_cluster
from harness.ucx import needs_ucx

from diptych.engine import replica
from diptych.engine.block_pool import chain_hashes
from diptych.engine.config import EngineConfig
from diptych.engine.worker import Worker
from diptych.messages.requests import SamplingParams
from diptych.models.embedded.path import embedded_model_path

PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 190)), list(range(40, 173)), [3]]
GREEDY = SamplingParams(max_tokens=20, seed=0, temperature=0.0)
SCORED = msgspec.structs.replace(GREEDY, logprobs=0)


def engine(block_size: int = 16, **changes: Any) -> EngineConfig:
    plain = EngineConfig(str(embedded_model_path()), block_size=block_size, num_blocks=4096 // block_size, max_step_tokens=64)
    return msgspec.structs.replace(plain, max_model_len=1000, **changes)


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


def assert_split_equals_local(cluster: ShmCluster) -> None:
    """With prefix caches cold and warm."""
    split, again = (cluster.generate(PROMPTS, GREEDY, split=True) for _ in range(2))
    assert tokens(split) == tokens(again) == tokens(cluster.generate(PROMPTS, GREEDY, split=False))
    assert len(cluster.spans) == 2 * len(PROMPTS)
    first, second = ([span.num_bytes for span in cluster.spans[i : i + len(PROMPTS)]] for i in (0, len(PROMPTS)))
    assert sum(second) < sum(first), "the receiver's own hashes found nothing that it had"


@pytest.mark.parametrize(("prefill", "decode"), [(64, 16), (16, 64), (48, 32), (5, 7)])
@pytest.mark.parametrize("transport", ["shm", pytest.param("ucx", marks=needs_ucx)])
def test_blocks_of_any_two_sizes(prefill: int, decode: int, transport: str) -> None:
    with shm_cluster(embedded_model_path(), engine(prefill), engine(decode), (transport,)) as cluster:
        assert_split_equals_local(cluster)


def test_a_staging_pool_far_smaller_than_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "STAGING_BYTES", {"cpu": 1})
    with shm_cluster(embedded_model_path(), engine(16), engine(64)) as cluster:
        assert cluster.prefill.replica.staging is not None
        assert cluster.prefill.replica.staging.pool.num_blocks == 1
        assert_split_equals_local(cluster)


def kv_of(worker: Worker, prompt: list[int], num_tokens: int) -> torch.Tensor:
    """What the worker's prefix cache holds of its first tokens → [num_tokens, layers, 2, heads, head_dim] fp32."""
    size = worker.engine.limits.block_size
    blocks = worker.engine.pool.match(chain_hashes(prompt, size))
    return worker.replica.pool.tensor[blocks].permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[:num_tokens].float()


@pytest.mark.parametrize(("kv_dtype", "precision", "tolerance"), [("bfloat16", 2**-8, 0.04), ("fp8_e4m3", 2**-4, 0.35)])
@pytest.mark.parametrize("prefill_block_size", [16, 64])
def test_a_decode_pool_of_less_precision(prefill_block_size: int, kv_dtype: str, precision: float, tolerance: float) -> None:
    """It holds what was computed, rounded once; each token is about as likely as it is to a model that rounds nothing."""
    with shm_cluster(embedded_model_path(), engine(prefill_block_size), engine(16, kv_dtype=kv_dtype)) as cluster:
        found = cluster.generate(PROMPTS, SCORED, split=True)
        page_bytes = cluster.decode.replica.pool.layout.page_bytes
        assert all(span.num_bytes == span.num_pages * page_bytes > 0 for span in cluster.spans)
        computed, kept = (kv_of(worker, PROMPTS[1], 128) for worker in cluster.workers)
    assert len(computed) == len(kept) == 128
    assert ((kept - computed).abs() <= precision * computed.abs().clamp(min=2**-6)).all()
    assert not torch.equal(kept, computed)
    with shm_cluster(embedded_model_path(), engine(), engine()) as cluster:
        for prompt, result in zip(PROMPTS, found, strict=True):
            score = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
            [judged] = cluster.generate([prompt + result.token_ids], score, split=False)
            expected = [each.logprob for each in judged.deltas[0].prompt_logprobs[len(prompt) - 1 :]]
            assert [each.logprob for each in result.logprobs] == pytest.approx(expected, abs=tolerance)
