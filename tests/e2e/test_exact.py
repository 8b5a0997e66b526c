"""Tokens are exact: whichever way a request takes, it gets the tokens that transformers gives on the same weights in fp32."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from harness.families import CASES, save_random_model
from harness.shm_cluster import ShmCluster, shm_cluster

from diptych.engine.config import EngineConfig
from diptych.messages.requests import FinishReason, Route, SamplingParams

NUM_OUTPUTS = 12
GREEDY = SamplingParams(max_tokens=NUM_OUTPUTS, seed=0, temperature=0.0)
UNLIMITED = 1 << 20


class Model:
    def __init__(self, folder: Path, oracle: Any) -> None:
        self.folder = folder
        self.oracle = oracle
        draw = torch.Generator().manual_seed(3)
        shared = torch.randint(0, 97, (21,), generator=draw).tolist()
        self.prompts = [shared + torch.randint(0, 97, (n,), generator=draw).tolist() for n in (1, 6, 19)]
        self.prompts.append(torch.randint(0, 97, (1,), generator=draw).tolist())
        self.expected = [self.greedy(prompt) for prompt in self.prompts]

    def greedy(self, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NUM_OUTPUTS):
                tokens.append(int(self.oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=list(CASES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    return Model(folder, save_random_model(CASES[request.param], folder))


def config(model: Model, **changes: Any) -> EngineConfig:
    plain = EngineConfig(str(model.folder), block_size=4, num_blocks=128, max_step_tokens=64)
    return msgspec.structs.replace(plain, **changes)


def greedy(cluster: ShmCluster, model: Model, split: bool) -> list[list[int]]:
    return [result.token_ids for result in cluster.generate(model.prompts, GREEDY, split)]


@pytest.mark.parametrize("budget", [1, 7, 64, UNLIMITED])
@pytest.mark.parametrize("split", [True, False], ids=["split", "local"])
def test_greedy_equals_transformers(model: Model, budget: int, split: bool) -> None:
    """With any chunking, and with the prefix cache cold and warm."""
    chunked = config(model, max_step_tokens=budget, layer_group=2)
    with shm_cluster(model.folder, chunked, chunked) as cluster:
        assert greedy(cluster, model, split) == model.expected
        assert greedy(cluster, model, split) == model.expected
        computed = cluster.prefill if split else cluster.decode
        assert computed.engine.pool.num_cached > 0
        num_handoffs = 2 * len(model.prompts) if split else 0
        assert len(cluster.spans) == num_handoffs
        if split:
            assert any(span.num_skipped_blocks > 0 for span in cluster.spans[len(model.prompts) :]), "no prefix was skipped"


@pytest.mark.parametrize("split", [True, False], ids=["split", "local"])
def test_greedy_under_forced_preemption(model: Model, split: bool) -> None:
    """A decode pool that cannot hold all sequences to their ends: they preempt each other and compute again."""
    small = config(model, num_blocks=24, max_model_len=60, prefix_cache=False)
    with shm_cluster(model.folder, config(model), small) as cluster:
        prompts = [p[:13] for p in model.prompts[:3]] * 3
        results = cluster.generate(prompts, GREEDY, split)
        assert [r.token_ids for r in results] == [model.greedy(p) for p in prompts]
        if not split:
            assert cluster.decode.num_preempted > 0


@pytest.mark.parametrize("num_blocks", [128, 18])
def test_a_prefill_worker_serves_some_by_itself_beside_those_that_it_hands_over(model: Model, num_blocks: int) -> None:
    """In a pool that is too small for all, too: who is decoded there makes room, and whose pages are being read never does."""
    prefill = config(model, num_blocks=num_blocks, max_model_len=60, prefix_cache=False, max_step_tokens=16)
    with shm_cluster(model.folder, prefill, config(model, max_model_len=60)) as cluster:
        alone, split = Route(cluster.prefill.ref), Route(cluster.decode.ref, cluster.prefill.ref)
        prompts = [p[:20] for p in model.prompts[:3]] * 3
        results = cluster.generate_by([alone, split, alone] * 3, prompts, GREEDY)
        assert [r.token_ids for r in results] == [model.greedy(p) for p in prompts]
        assert len(cluster.spans) == 3
        assert cluster.decode.num_preempted == 0
        assert (cluster.prefill.num_preempted > 0) == (num_blocks == 18)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=NUM_OUTPUTS, seed=11, temperature=1.0, logprobs=3),
        SamplingParams(max_tokens=NUM_OUTPUTS, seed=5, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, logprobs=0),
        SamplingParams(max_tokens=NUM_OUTPUTS, seed=7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logprobs=2),
    ],
)
def test_split_and_colocated_sample_the_same(model: Model, sampling: SamplingParams) -> None:
    with shm_cluster(model.folder, config(model, max_step_tokens=7), config(model)) as cluster:
        split = cluster.generate(model.prompts, sampling, split=True)
        local = cluster.generate(model.prompts, sampling, split=False)
    for ours, theirs in zip(split, local, strict=True):
        assert ours.token_ids == theirs.token_ids
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-5)


def test_prompt_logprobs_equal_transformers(model: Model) -> None:
    sampling = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=1)
    with shm_cluster(model.folder, config(model, max_step_tokens=7)) as cluster:
        results = cluster.generate(model.prompts, sampling, split=True)
    for prompt, result in zip(model.prompts, results, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model.oracle(torch.tensor([prompt])).logits[0].double(), -1)
        scores = result.deltas[0].prompt_logprobs
        assert [s.token_id for s in scores] == prompt[1:]
        assert [s.logprob for s in scores] == pytest.approx([float(expected[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-4)


def test_stop_tokens_and_limits_end_the_same_way_on_both_paths(model: Model) -> None:
    """An EOS as first token ends the request on the prefill worker: nothing stays reserved on the decode worker."""
    for stop_at in (0, 1, 5):
        stops = tuple({expected[stop_at] for expected in model.expected})
        sampling = msgspec.structs.replace(GREEDY, stop_token_ids=stops)
        with shm_cluster(model.folder) as cluster:
            for split in (True, False):
                for result, expected in zip(cluster.generate(model.prompts, sampling, split), model.expected, strict=True):
                    end = next(i for i, token in enumerate(expected) if token in stops)
                    assert result.token_ids == expected[: end + 1]
                    assert result.deltas[-1].finish is FinishReason.STOP
