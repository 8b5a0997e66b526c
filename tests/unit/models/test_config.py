"""Reading config.json: both dialects of transformers mean the same, and what cannot be served is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.messages.errors import ModelError, UnsupportedModel
from diptych.models.config import ModelConfig
from diptych.models.rope import RopeConfig, RopeKind

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def qwen2(folder: Path, **changes: Any) -> ModelConfig:
    return read(folder, architectures=["Qwen2ForCausalLM"], **changes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_FACTORS}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_FACTORS}},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        ),
        ({"rope_scaling": None}, {}),
    ],
)
def test_both_dialects_mean_the_same(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    assert read(tmp_path, **old) == read(tmp_path, **new)


def test_every_field_of_llama3_rope_arrives(tmp_path: Path) -> None:
    config = read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3_FACTORS}, torch_dtype="bfloat16")
    assert config.rope == RopeConfig(5e5, RopeKind.LLAMA3, 8.0, 1.0, 4.0, 128)
    assert config.dtype is torch.bfloat16


def test_absent_keys_mean_what_hugging_face_says(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=None)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope.theta) == (6, 8, 1e-6, 10_000.0)
    assert not any((config.tie_embeddings, config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm))
    assert read(tmp_path, architectures=["MistralForCausalLM"]).windows == (4096,) * 4
    assert read(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * 4


def test_biases_follow_the_family(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    biases = {
        name: (config.qkv_bias, config.out_bias, config.mlp_bias)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
        for config in [read(tmp_path, architectures=[f"{name}ForCausalLM"], **flags)]
    }
    assert biases == {
        "Llama": (True, True, True),
        "Mistral": (False, False, False),
        "Qwen2": (True, False, False),
        "Qwen3": (True, True, False),
    }


def test_qwen_windows(tmp_path: Path) -> None:
    window = {"sliding_window": 9, "max_window_layers": 3}
    assert qwen2(tmp_path, use_sliding_window=False, **window).windows == (None,) * 4
    assert qwen2(tmp_path, use_sliding_window=True, **window).windows == (None, None, None, 9)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert qwen2(tmp_path, use_sliding_window=True, layer_types=kinds, **window).windows == (9, None, 9, None)


@pytest.mark.parametrize(("in_config", "in_generation", "expected"), [
    (2, None, (2,)),
    ([2, 5], None, (2, 5)),
    (2, {"eos_token_id": [7, 8]}, (7, 8)),
    (2, {"eos_token_id": None}, (2,)),
    (2, {"temperature": 0.6}, (2,)),
    (None, None, ()),
])  # fmt: skip
def test_eos(tmp_path: Path, in_config: Any, in_generation: dict[str, Any] | None, expected: tuple[int, ...]) -> None:
    assert read(tmp_path, in_generation, eos_token_id=in_config).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"torch_dtype": "float64"}, "float64"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "chunked_attention",
        ),
    ],
)
def test_unsupported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "48"}, r"hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 attention heads cannot share 4"),
        ({"hidden_size": 50}, "50 is not a multiple of 6"),
        ({"head_dim": 7}, "even head_dim"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor > 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"]}, "1 layer_types for 4"),
    ],
)
def test_nonsense_is_refused_with_the_key(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read(tmp_path, **changes)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\xff"])
def test_a_missing_or_corrupt_file_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
