"""A model whose ranks are on two GPUs: what they exchange, and that they answer as one GPU does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers
from harness.compilations import compiled_in_service
from harness.exchange_checks import ExchangeCase, check_logits, check_sums, shape_for
from harness.families import Case, save_random_models
from harness.served import DRAWN, GREEDY, NOBODY, engine_on, prompts, serve, wishes

from diptych.engine import cuda_runner, decode_graphs
from diptych.engine.engine import Engine
from diptych.engine.ranked_runner import RankedRunner
from diptych.engine.ranks import Ranks
from diptych.kernels import context_shares
from diptych.kernels.exchange import Exchange
from diptych.kernels.selection import OpsNeeds, ops_of_ranks
from diptych.messages.errors import ModelError
from diptych.messages.ids import Address, RequestId
from diptych.messages.requests import GenerateRequest, Route

pytestmark = [
    pytest.mark.gpu2,
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

BF16 = torch.bfloat16
FAMILIES = {
    "llama": Case("Llama", 8, 2, 64, {"vocab_size": 98}),
    "llama, biases": Case("Llama", 8, 4, 64, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 48}),
    "mistral, window": Case("Mistral", 4, 4, 64, {"sliding_window": 20, "vocab_size": 98}),
    "qwen2": Case("Qwen2", 2, 2, 64, {"hidden_size": 128}),
    "qwen3, tied": Case("Qwen3", 4, 2, 128, {"vocab_size": 98, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_random_models(FAMILIES, tmp_path_factory)


def all_gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def ranks_for(case: ExchangeCase, devices: list[torch.device]) -> tuple[list[Exchange], Callable[[Callable[[int], None]], list[None]]]:
    ends, ranks = Exchange.among(devices, shape_for(case, len(devices))), Ranks(devices)

    def then_wait(work: Callable[[int], None]) -> list[None]:
        return ranks.run(lambda rank: (work(rank), torch.cuda.synchronize(devices[rank]))[1])

    return ends, then_wait


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 300, 4097])
@pytest.mark.parametrize(("width", "dtype"), [(4096, BF16), (2560, BF16), (96, torch.float32), (8192, torch.float16)])
def test_sums_over_ranks(width: int, dtype: torch.dtype, num_rows: int, scatters: bool) -> None:
    case = ExchangeCase(num_rows, width, dtype, scatters, has_bias=num_rows != 64)
    check_sums(case, *ranks_for(case, all_gpus()))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_logits_of_ranks(num_rows: int) -> None:
    check_logits(num_rows, *ranks_for(ExchangeCase(1, 64, BF16, scatters=False), all_gpus()))


@pytest.mark.parametrize("scatters", [False, True])
def test_a_thousand_calls_in_captured_graphs(scatters: bool) -> None:
    """One rank is slow now and then: nobody reads a part before it is there, or one that has been overwritten."""
    devices, rows, width = all_gpus()[:2], 33, 512
    case = ExchangeCase(rows, width, torch.float32, scatters)
    ends, run_all = ranks_for(case, devices)
    counters = [torch.zeros(1, device=device) for device in devices]
    sums = [torch.zeros(20, rows, width, device=device) for device in devices]
    graphs = [torch.cuda.CUDAGraph() for _ in devices]

    def calls(rank: int) -> None:
        ends[rank].begin()
        for index in range(20):
            counters[rank] += 1
            ends[rank].part(rows).copy_((counters[rank] * (rank + 1)).expand(rows, width))
            residual = torch.zeros(rows, width, device=devices[rank])
            ends[rank].add_rms_norm(None, residual, torch.ones(width, device=devices[rank]), 1e-5, scatters)
            sums[rank][index].copy_(residual)

    def capture(rank: int) -> None:
        calls(rank)
        torch.cuda.synchronize(devices[rank])
        with torch.cuda.graph(graphs[rank], stream=torch.cuda.Stream(devices[rank]), capture_error_mode="thread_local"):
            calls(rank)

    run_all(capture)
    for turn in range(50):

        def replay(rank: int, turn: int = turn) -> None:
            if turn % 3 == rank:
                torch.cuda._sleep(2_000_000)
            graphs[rank].replay()

        run_all(replay)
        for rank in range(2):
            share = -(-rows // 2)
            own = slice(rank * share, (rank + 1) * share) if scatters else slice(None)
            expected = 3.0 * (20 * (turn + 1) + torch.arange(1, 21))
            assert torch.equal(sums[rank][:, own].amin((1, 2)).cpu(), expected)
            assert torch.equal(sums[rank][:, own].amax((1, 2)).cpu(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [7, 64, 512])
def test_tokens_are_those_of_one_gpu(family: str, budget: int, folders: dict[str, Path]) -> None:
    """Greedy, penalised, biased, with log-probabilities of answers and prompts; steps as graphs and kernel by kernel."""
    wanted = [*wishes(9), *((prompt, GREEDY) for prompt in prompts(12)[9:])]
    ours = serve(engine_on("cuda", folders[family], tp=2, max_step_tokens=budget), wanted)
    theirs = serve(engine_on("cuda", folders[family], max_step_tokens=budget), wanted)
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]
    assert [one.likeliest for one in ours] == [one.likeliest for one in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_batch_mates_order_and_padding_change_nothing(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"], tp=2)
    wanted = [(prompt, GREEDY if i % 2 else DRAWN) for i, prompt in enumerate(prompts(12))]
    alone = [serve(engine, [one])[0] for one in wanted]
    assert serve(engine, wanted) == alone
    assert serve(engine, wanted[::-1])[::-1] == alone


def test_to_be_roused_changes_nothing(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"], tp=2)
    wanted = [(prompt, GREEDY if i % 2 else DRAWN) for i, prompt in enumerate(prompts(12))]
    assert [one.tokens for one in serve(engine, wanted, num_rouses=4)] == [one.tokens for one in serve(engine, wanted)]


def test_keys_and_values_in_fp8(folders: dict[str, Path]) -> None:
    wanted = [(prompt, GREEDY) for prompt in prompts(12)]
    ours, theirs = (serve(engine_on("cuda", folders["llama, biases"], tp=tp, kv_dtype="fp8_e4m3"), wanted) for tp in (2, 1))
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(ours, theirs, strict=True)) >= 11


def test_a_layer_is_told_of_when_it_is_in_the_pools_of_all_ranks(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"], tp=2, layer_group=1, max_step_tokens=512)
    as_told = dict[int, list[torch.Tensor]]()
    pools = pools_of(engine)
    for prompt in (prompts(6)[5], prompts(9)[8]):
        engine.add(GenerateRequest(RequestId(str(len(prompt))), Address(""), tuple(prompt), GREEDY, Route(decode=NOBODY), 1e9), 0.0)
    plan = engine.plan()
    blocks = [block for chunk in plan.chunks for block in chunk.sequence.blocks[: chunk.end // 16]]

    def copied(layer: int) -> list[torch.Tensor]:
        found = []
        for pool in pools:
            with torch.cuda.device(pool.device):
                found.append(pool[blocks, layer].clone())
        return found

    engine.execute(plan, lambda layer: as_told.update({layer: copied(layer)}))
    assert sorted(as_told) == list(range(pools[0].shape[1]))
    for layer, told in as_told.items():
        for of_rank, pool in zip(told, pools, strict=True):
            assert of_rank.abs().sum() > 0
            assert torch.equal(of_rank, pool[blocks, layer])


def pools_of(engine: Engine) -> list[torch.Tensor]:
    assert isinstance(engine.runner, RankedRunner)
    return [runner.pool.tensor for runner in engine.runner.runners]        # type: ignore[attr-defined]


@pytest.mark.parametrize("changes", [{"max_step_tokens": 300}, {"max_step_tokens": 2600}], ids=["mixed", "large steps"])
def test_no_kernel_is_compiled_once_a_worker_serves(changes: dict[str, Any], tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes, **heads).save_pretrained(tmp_path)
    before, after = compiled_in_service(tmp_path, tp=2, **changes)
    assert before > 10, "the hook saw nothing"
    assert after == []


def test_a_rank_that_fails_leaves_no_gpu_waiting() -> None:
    """Rank 0 has queued more calls than rank 1 will ever make."""
    devices = all_gpus()[:2]
    needs = OpsNeeds(64, 16, torch.float32, torch.float32, None, max_rows=16, logit_rows=1, hidden_size=256, vocab_size=96)
    ranked = ops_of_ranks(devices, needs)
    ranks, weight = Ranks(devices, ranked.abort), [torch.ones(256, 256, device=device) for device in devices]

    def work(rank: int) -> None:
        x, residual, norm = (torch.ones(shape, device=devices[rank]) for shape in ((16, 256), (16, 256), (256,)))
        for call in range(50):
            if rank == 1 and call == 7:
                raise ValueError("rank 1 is gone")
            ranked.ops[rank].linear_add_rms_norm(x, weight[rank], None, residual, norm, 1e-5)
        torch.cuda.synchronize(devices[rank])

    began = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 is gone"):
        ranks.run(work)
    assert time.monotonic() - began < 30


def test_contexts_are_cut_for_the_heads_of_a_rank(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def share_tokens(contexts: list[int], kv_heads: int, num_sms: int) -> int:
        asked.append(kv_heads)
        return context_shares.share_tokens(contexts, kv_heads, num_sms)

    for module in (decode_graphs, cuda_runner):
        monkeypatch.setattr(module, "share_tokens", share_tokens)
    serve(engine_on("cuda", folders["llama, biases"], tp=2), [(prompt, GREEDY) for prompt in prompts(12)])
    assert set(asked) == {2}, "of 4 heads each of two ranks has two"


def test_more_ranks_than_gpus(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"tp 1024: \d+ GPUs are here"):
        engine_on("cuda", folders["llama"], tp=1024)
