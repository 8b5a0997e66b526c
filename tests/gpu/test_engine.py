"""The engine on a GPU against the same engine on the CPU, and its logits against transformers, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

pytest.importorskip("triton")
pytest.importorskip("transformers")

import transformers
from harness.compilations import compiled_in_service
from harness.families import save_random_models
from harness.served import DRAWN, FAMILIES, GREEDY, NOBODY, engine_on, prompts, serve, wishes

from diptych.engine import prompt_steps
from diptych.engine.cuda_runner import CudaRunner
from diptych.kernels.selection import ops_for
from diptych.messages.errors import PoolTooSmall
from diptych.messages.ids import Address, RequestId
from diptych.messages.requests import GenerateRequest, Route
from diptych.models.batch import ForwardBatch
from diptych.models.config import ModelConfig
from diptych.models.loader import load_weights
from diptych.models.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_random_models(FAMILIES, tmp_path_factory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [7, 64, 512])
def test_greedy_tokens_are_those_of_the_cpu(family: str, budget: int, folders: dict[str, Path]) -> None:
    wanted = [(prompt, GREEDY) for prompt in prompts(12)]
    ours = serve(engine_on("cuda", folders[family], max_step_tokens=budget), wanted)
    assert ours == serve(engine_on("cpu", folders[family]), wanted)


def test_steps_too_large_for_a_graph_give_the_same_tokens(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(prompt, GREEDY if i % 2 else DRAWN) for i, prompt in enumerate(prompts(12))]
    in_graphs = serve(engine_on("cuda", folders["llama"], max_step_tokens=512), wanted)
    monkeypatch.setattr(prompt_steps, "MOST_TOKENS", 64)
    assert serve(engine_on("cuda", folders["llama"], max_step_tokens=512), wanted) == in_graphs


def test_a_layer_is_told_of_when_its_keys_and_values_are_in_the_pool(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"], layer_group=1)
    assert isinstance(engine.runner, CudaRunner)
    pool, as_told = engine.runner.pool.tensor, dict[int, torch.Tensor]()
    engine.add(GenerateRequest(RequestId("r"), Address(""), tuple(prompts(6)[5]), GREEDY, Route(decode=NOBODY), 1e9), 0.0)
    plan = engine.plan()
    blocks = plan.chunks[0].sequence.blocks[: plan.chunks[0].end // 16]
    engine.execute(plan, lambda layer: as_told.update({layer: pool[blocks, layer].clone()}))
    assert sorted(as_told) == list(range(pool.shape[1]))
    for layer, told in as_told.items():
        assert told.abs().sum() > 0
        assert torch.equal(told, pool[blocks, layer])


@pytest.mark.parametrize("count", [1, 3, 12])
def test_batch_mates_order_and_padding_change_nothing(count: int, folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"])
    wanted = [(prompt, GREEDY if i % 2 else DRAWN) for i, prompt in enumerate(prompts(count))]
    alone = [serve(engine, [one])[0] for one in wanted]
    assert serve(engine, wanted) == alone
    assert serve(engine, wanted[::-1])[::-1] == alone


def test_to_be_roused_changes_nothing(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"])
    wanted = [*wishes(9), *((prompt, DRAWN) for prompt in prompts(12)[9:])]
    assert [one.tokens for one in serve(engine, wanted, num_rouses=4)] == [one.tokens for one in serve(engine, wanted)]


def test_keys_and_values_in_fp8(folders: dict[str, Path]) -> None:
    """What a step computes is rounded differently on a GPU, so a key may fall on the other side of a boundary: first tokens agree."""
    wanted = [(prompt, GREEDY) for prompt in prompts(12)]
    ours, theirs = (serve(engine_on(device, folders["llama"], kv_dtype="fp8_e4m3"), wanted) for device in ("cuda", "cpu"))
    assert [len(one.tokens) for one in ours] == [12] * 12
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(ours, theirs, strict=True)) >= 11
    exact = serve(engine_on("cuda", folders["llama"]), wanted)
    assert ours != exact, "KV was not rounded"


@pytest.mark.parametrize(("family", "budget"), [("llama", 64), ("qwen3", 512), ("qwen2", 7)])
def test_penalties_biases_masks_and_logprobs_are_those_of_the_cpu(family: str, budget: int, folders: dict[str, Path]) -> None:
    ours = serve(engine_on("cuda", folders[family], max_step_tokens=budget), wishes(12))
    theirs = serve(engine_on("cpu", folders[family]), wishes(12))
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]
    assert [one.likeliest for one in ours] == [one.likeliest for one in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_who_wants_more_than_a_draw_is_run_ahead_of_and_disturbs_nobody(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"])
    alone = [serve(engine, [one])[0].tokens for one in wishes(9)]
    assert [one.tokens for one in serve(engine, wishes(9))] == alone
    assert [one.tokens for one in serve(engine, wishes(9)[::-1])][::-1] == alone
    for prompt, sampling in wishes(9):
        engine.add(GenerateRequest(RequestId(str(sampling)), Address(""), tuple(prompt), sampling, Route(decode=NOBODY), 1e9), 0.0)
    engine.launch(engine.plan())
    assert engine.may_plan, "the step after waits for a token that the host does not know"


def test_penalties_under_preemption(folders: dict[str, Path]) -> None:
    """Who comes back is counted anew, and its draws are the same."""
    wanted = [(prompt, replace(GREEDY, frequency_penalty=0.7, max_tokens=60)) for prompt in prompts(8)]
    ours = serve(engine_on("cuda", folders["llama"], num_blocks=18), wanted)
    assert ours == serve(engine_on("cpu", folders["llama"]), wanted)


def test_stop_tokens_end_a_sequence_that_was_computed_ahead(folders: dict[str, Path]) -> None:
    plain = serve(engine_on("cuda", folders["llama"]), [(prompt, GREEDY) for prompt in prompts(6)])
    stops = [one.tokens[4] for one in plain]
    wanted = [(p, replace(GREEDY, stop_token_ids=(stop,))) for p, stop in zip(prompts(6), stops, strict=True)]
    cut = [one.tokens[: one.tokens.index(stop) + 1] for one, stop in zip(plain, stops, strict=True)]
    assert [one.tokens for one in serve(engine_on("cuda", folders["llama"]), wanted)] == cut


def test_a_pool_that_is_too_small_for_all_preempts_and_stays_exact(folders: dict[str, Path]) -> None:
    long = replace(GREEDY, max_tokens=60)
    wanted = [(prompt, long) for prompt in prompts(8)]
    ours = serve(engine_on("cuda", folders["llama"], num_blocks=18), wanted)
    assert ours == serve(engine_on("cpu", folders["llama"]), wanted)


def test_memory_is_measured_and_what_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    engine = engine_on("cuda", folders["llama"], num_blocks=None, gpu_memory=0.25)
    free, total = torch.cuda.mem_get_info()
    assert 0.15 < (total - free) / total < 0.27
    assert engine.pool.num_blocks > 1000
    del engine
    with pytest.raises(PoolTooSmall, match="GiB are taken by weights"):
        engine_on("cuda", folders["llama"], num_blocks=None, gpu_memory=0.001)


@pytest.mark.parametrize(
    "changes",
    [{"max_step_tokens": 300}, {"max_step_tokens": 2600}, {"max_step_tokens": 2600, "kv_dtype": "fp8_e4m3", "block_size": 64}],
    ids=["mixed", "large steps", "large steps, fp8"],
)
def test_no_kernel_is_compiled_once_a_worker_serves(changes: dict[str, Any], tmp_path: Path) -> None:
    """A request would wait for the compiler: the first large step once did so for over a second."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes, **heads).save_pretrained(tmp_path)
    before, after = compiled_in_service(tmp_path, **changes)
    assert before > 10, "the hook saw nothing"
    assert after == []


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    folder, device = folders[family], torch.device("cuda")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    config = ModelConfig.from_folder(folder)
    model = Transformer(config, load_weights(folder, config, torch.bfloat16, device), ops_for(device, config.head_dim, 64, torch.bfloat16))
    ids = torch.randint(0, 97, (150,), device=device)
    pool = torch.full((3, config.num_layers, 2, config.num_kv_heads, 64, config.head_dim), torch.nan, device=device, dtype=torch.bfloat16)
    ints = {"dtype": torch.int32, "device": device}
    rows = torch.arange(150, device=device)
    tables = torch.tensor([[0, 1, 2]], **ints)
    batch = ForwardBatch(ids, rows, rows, torch.tensor([0, 150], **ints), torch.tensor([150], **ints), tables, rows)
    with torch.no_grad():
        theirs = oracle(ids[None]).logits[0].double()
    ours = model.forward(batch, pool).double()
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2
