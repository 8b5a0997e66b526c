"""Workers whose ranks share the heads, as many on either side as they like: the tokens are those of workers of one rank."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from harness.families import Case, save_random_model
from harness.shm_cluster import Result, ShmCluster, shm_cluster
from harness.ucx import needs_ucx
from safetensors.torch import load_file, save_file

from diptych.engine.config import EngineConfig
from diptych.messages.requests import SamplingParams
from diptych.models.embedded.path import embedded_model_path

PROMPTS = [[5, 6, 7, 8, 9], list(range(40, 190)), list(range(40, 173)), [3]]
GREEDY = SamplingParams(max_tokens=20, seed=0, temperature=0.0)
DRAWN = SamplingParams(max_tokens=20, seed=5, temperature=0.9, top_k=40, frequency_penalty=0.3, logprobs=2)


def engine(**changes: Any) -> EngineConfig:
    plain = EngineConfig(str(embedded_model_path()), num_blocks=256, max_step_tokens=64, max_model_len=1000)
    return msgspec.structs.replace(plain, **changes)


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    torch.set_num_threads(1)
    with shm_cluster(embedded_model_path(), engine(), engine()) as cluster:
        return {name: tokens(cluster.generate(PROMPTS, sampling, split=False)) for name, sampling in (("greedy", GREEDY), ("drawn", DRAWN))}


def assert_same(cluster: ShmCluster, expected: dict[str, list[list[int]]]) -> None:
    """With prefix caches cold and warm; bytes are counted over all ranks."""
    for _ in range(2):
        assert tokens(cluster.generate(PROMPTS, GREEDY, split=True)) == expected["greedy"]
    page_bytes = cluster.decode.replica.pool.layout.page_bytes
    assert all(span.num_bytes == span.num_pages * page_bytes > 0 for span in cluster.spans[: len(PROMPTS)])
    assert any(span.num_skipped_blocks > 0 for span in cluster.spans[len(PROMPTS) :])
    assert tokens(cluster.generate(PROMPTS, GREEDY, split=False)) == expected["greedy"]
    for split in (True, False):
        assert tokens(cluster.generate(PROMPTS, DRAWN, split)) == expected["drawn"]


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 2), (4, 1), (2, 4)])
def test_any_two_numbers_of_ranks(prefill: int, decode: int, expected: dict[str, list[list[int]]]) -> None:
    with shm_cluster(embedded_model_path(), engine(tp=prefill), engine(tp=decode)) as cluster:
        assert [len(worker.replica.pool.ranks) for worker in cluster.workers] == [prefill, decode]
        assert_same(cluster, expected)


@needs_ucx
@pytest.mark.parametrize(("prefill", "decode"), [(1, 4), (2, 1)])
def test_over_ucx(prefill: int, decode: int, expected: dict[str, list[list[int]]]) -> None:
    with shm_cluster(embedded_model_path(), engine(tp=prefill), engine(tp=decode), ("ucx",)) as cluster:
        assert_same(cluster, expected)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("block_sizes", [(48, 16), (16, 32)])
def test_blocks_of_other_sizes_too(prefill: int, decode: int, block_sizes: tuple[int, int], expected: dict[str, list[list[int]]]) -> None:
    ours, theirs = (engine(tp=tp, block_size=size) for tp, size in zip((prefill, decode), block_sizes, strict=True))
    with shm_cluster(embedded_model_path(), ours, theirs) as cluster:
        assert cluster.prefill.replica.staging is not None
        assert_same(cluster, expected)


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_kv_of_another_type_too(prefill: int, decode: int, tmp_path: Path) -> None:
    """Rounded as one rank would round it: each head by a scale of its own."""
    folder = shutil.copytree(embedded_model_path(), tmp_path / "model")
    draw = torch.Generator().manual_seed(5)
    scales = {f"model.layers.{i}.self_attn.{letter}_scale": torch.rand(4, generator=draw) * 4 + 0.1 for i in range(6) for letter in "kv"}
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | scales, folder / "model.safetensors")
    found = []
    for tps in ((1, 1), (prefill, decode)):
        ours, theirs = (engine(model_path=str(folder), tp=tp, kv_dtype="fp8_e4m3") for tp in tps)
        with shm_cluster(folder, ours, msgspec.structs.replace(theirs, block_size=32)) as cluster:
            found += [tokens(cluster.generate(PROMPTS, GREEDY, split)) for split in (True, False)]
    assert found[:2] == found[2:]
    with shm_cluster(embedded_model_path(), engine(kv_dtype="fp8_e4m3"), engine(kv_dtype="fp8_e4m3")) as cluster:
        assert tokens(cluster.generate(PROMPTS, GREEDY, split=True)) != found[0], "scales that make no difference"


def test_a_model_whose_vocabulary_cannot_be_shared(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    oracle = save_random_model(Case("Qwen3", 8, 4, 24), tmp_path)
    prompt, outputs = list(range(30)), list[int]()
    with torch.no_grad():
        for _ in range(12):
            outputs.append(int(oracle(torch.tensor([prompt + outputs])).logits[0, -1].argmax()))
    config = EngineConfig(str(tmp_path), block_size=4, num_blocks=128, max_step_tokens=7)
    with shm_cluster(tmp_path, msgspec.structs.replace(config, tp=2), msgspec.structs.replace(config, tp=4)) as cluster:
        greedy = msgspec.structs.replace(GREEDY, max_tokens=12)
        assert tokens(cluster.generate([prompt], greedy, split=True)) == [outputs]
