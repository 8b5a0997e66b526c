"""Loading weights: fused tensors hold the right rows, and a folder that does not fit is refused before memory is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.kernels.reference import ReferenceOps
from diptych.messages.errors import UnsupportedModel, WeightMismatch
from diptych.models.batch import ForwardBatch
from diptych.models.config import ModelConfig
from diptych.models.loader import LoadFormat, load_kv_scales, load_weights
from diptych.models.rope import RopeConfig
from diptych.models.transformer import Transformer
from diptych.models.weights import ModelWeights, weight_plan

torch.set_num_threads(1)

CPU = torch.device("cpu")
Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def make_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 20,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(1e4),
        "windows": (None, None),
        "qkv_bias": True,
        "out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "tie_embeddings": False,
        "max_position_embeddings": 64,
        "dtype": torch.float32,
        "eos_token_ids": (),
    }
    return ModelConfig(**fields | changes)


CONFIG = make_config()


def random_tensors(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pieces = [piece for param in weight_plan(config).leaves() for piece in param.pieces]
    return {piece.name: torch.randn(piece.shape, generator=generator) for piece in pieces}


def load(folder: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> ModelWeights[Tensor]:
    return load_weights(folder, config, dtype, CPU)


def save_sharded(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    save_index(folder, weight_map)
    return weight_map


def save_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes any allocation by the loader fail the test."""
    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail("memory was taken before the headers were checked")

    monkeypatch.setattr(torch, "empty", refuse)


@pytest.mark.parametrize("sharded", [False, True])
def test_fused_tensors_hold_their_pieces_in_order(tmp_path: Path, sharded: bool) -> None:
    tensors = random_tensors()
    if sharded:
        save_sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    weights = load(tmp_path)
    attn, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    layer = weights.layers[1]
    assert torch.equal(layer.qkv, torch.cat([tensors[f"{attn}{x}_proj.weight"] for x in "qkv"]))
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat([tensors[f"{attn}{x}_proj.bias"] for x in "qkv"]))
    assert torch.equal(layer.gate_up, torch.cat([tensors[mlp + "gate_proj.weight"], tensors[mlp + "up_proj.weight"]]))
    assert torch.equal(layer.down, tensors[mlp + "down_proj.weight"])
    assert weights.lm_head is not None
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])
    assert (layer.out_bias, layer.q_norm, layer.k_norm, layer.down_bias) == (None,) * 4


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_cast(tmp_path: Path, stored: torch.dtype) -> None:
    save_file({name: tensor.to(stored) for name, tensor in random_tensors().items()}, tmp_path / "model.safetensors")
    weights = load(tmp_path, dtype=torch.bfloat16)
    assert {leaf.dtype for leaf in weights.leaves()} == {torch.bfloat16}
    assert torch.equal(weights.norm, random_tensors()["model.norm.weight"].to(stored).to(torch.bfloat16))


def test_rotary_frequencies_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    save_file(random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    load(tmp_path)


def test_a_tied_model_may_store_its_embedding_twice_but_not_another_head(tmp_path: Path) -> None:
    config = make_config(tie_embeddings=True)
    tensors = random_tensors(config)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert load(tmp_path, config).lm_head is None
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(WeightMismatch, match=r"lm_head\.weight: unexpected, found \[20, 12\]"):
        load(tmp_path, config)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_PROJ: None}, r"1 tensors do not fit: .*layers\.0\.self_attn\.q_proj\.weight: expected \[12, 12\], missing"),
        ({K_PROJ: (8, 12)}, r"layers\.1\.self_attn\.k_proj\.weight: expected \[4, 12\], found \[8, 12\]"),
        ({"model.layers.2.mlp.up_proj.weight": (10, 12)}, r"layers\.2\.mlp\.up_proj\.weight: unexpected, found \[10, 12\]"),
        ({Q_PROJ: (12,), K_PROJ: None}, "2 tensors do not fit"),
    ],
)
def test_every_mismatch_is_named_with_both_shapes(tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str) -> None:
    tensors = random_tensors()
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightMismatch, match=message):
        load(tmp_path)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(("dtype", "named"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantized_storage_is_refused(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    tensors = random_tensors()
    tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=f"q_proj.weight is stored as {named}"):
        load(tmp_path)


def test_scales_of_fp8_kv_are_one_number_or_one_a_head(tmp_path: Path) -> None:
    config = make_config(num_kv_heads=3)
    given = {"model.layers.0.self_attn.k_scale": torch.tensor(0.5), "model.layers.1.self_attn.v_scale": torch.tensor([1.0, 2.0, 3.0])}
    save_file(random_tensors(config) | given, tmp_path / "model.safetensors")
    expected = torch.ones(2, 2, 3)
    expected[0, 0], expected[1, 1] = 0.5, torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(load_kv_scales(tmp_path, config), expected)
    load_weights(tmp_path, config, torch.float32, CPU)                # which they are not among
    assert torch.equal(load_kv_scales(tmp_path, config, LoadFormat.DUMMY), torch.ones(2, 2, 3))


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [torch.inf], [torch.nan], [1.0, 1.0], []])
def test_scales_that_cannot_be_are_refused(tmp_path: Path, scale: list[float]) -> None:
    name = "model.layers.1.self_attn.k_scale"
    save_file(random_tensors() | {name: torch.tensor(scale)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightMismatch, match=f"{name}: expected 1 or 1 positive numbers, found"):
        load_kv_scales(tmp_path, CONFIG)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightMismatch, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    save_sharded(tmp_path, random_tensors())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightMismatch, match=r"model-2\.safetensors: the file is missing"):
        load(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    weight_map = save_sharded(tmp_path, random_tensors())
    (wrong_shard,) = set(weight_map.values()) - {weight_map[Q_PROJ]}
    save_index(tmp_path, weight_map | {Q_PROJ: wrong_shard})
    with pytest.raises(WeightMismatch, match=r"the index promises model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_sharded(tmp_path, tensors)
    second = load_file(tmp_path / "model-2.safetensors")
    save_file(second | {sorted(tensors)[0]: tensors[sorted(tensors)[0]]}, tmp_path / "model-2.safetensors")
    with pytest.raises(WeightMismatch, match="is in another file too"):
        load(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd"])
def test_an_index_that_points_elsewhere(tmp_path: Path, shard: str) -> None:
    save_index(tmp_path, {Q_PROJ: shard})
    with pytest.raises(WeightMismatch, match="is not a file name of this folder"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_corrupt_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(), path)
    path.write_bytes({"truncated": path.read_bytes()[:-8], "garbage": b"\xff" * 100, "empty": b""}[damage])
    with pytest.raises(WeightMismatch, match=r"model\.safetensors: corrupt"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": [1]}'])
def test_a_corrupt_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightMismatch, match=r"index\.json: corrupt"):
        load(tmp_path)


def test_dummy_weights_are_the_same_every_time_and_logits_are_sane(tmp_path: Path) -> None:
    config = make_config(vocab_size=500, hidden_size=96, intermediate_size=128, num_layers=6, head_dim=32, windows=(None,) * 6)
    first, second = (load_weights(tmp_path, config, torch.float32, CPU, LoadFormat.DUMMY) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.leaves(), second.leaves(), strict=True))
    assert not torch.equal(first.layers[0].qkv, first.layers[1].qkv)
    length = 30
    batch = ForwardBatch(
        token_ids=torch.arange(length),
        positions=torch.arange(length),
        slots=torch.arange(length),
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        logit_rows=torch.arange(length),
    )
    logits = Transformer(config, first, ReferenceOps()).forward(batch, torch.zeros(1, 6, 2, 1, 32, 32))
    assert 0.5 < float(logits.std()) < 2
    assert len(set(logits.argmax(-1).tolist())) > length // 2       # it does not say one word for ever
