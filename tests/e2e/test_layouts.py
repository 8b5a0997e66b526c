"""Pools of one deployment may hold KV differently: what the decode worker reads is then what it would have stored itself."""

import pytest
from harness.shm_cluster import shm_cluster

from diptych.engine.config import EngineConfig, ReceiverPool
from diptych.messages.requests import SamplingParams
from diptych.models.embedded.path import embedded_model_path

PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 190)), list(range(40, 173)), [3]]
GREEDY = SamplingParams(max_tokens=20, seed=0, temperature=0.0)


@pytest.mark.parametrize(("prefill", "decode"), [(64, 16), (16, 64), (48, 32), (5, 7)])
def test_block_sizes(prefill: int, decode: int) -> None:
    plain = EngineConfig(str(embedded_model_path()), num_blocks=128, max_step_tokens=64)
    import msgspec
    a,b = (msgspec.structs.replace(plain, block_size=s) for s in (prefill, decode))
    with shm_cluster(embedded_model_path(), a, b) as cluster:
        split = cluster.generate(PROMPTS, GREEDY, split=True)
        again = cluster.generate(PROMPTS, GREEDY, split=True)
        local = cluster.generate(PROMPTS, GREEDY, split=False)
    assert [r.token_ids for r in split] == [r.token_ids for r in again] == [r.token_ids for r in local]
