"""Random small models of every family that is served, with transformers as the oracle."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    family: str
    heads: int
    kv_heads: int
    head_dim: int
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama-3-heads-on-1": Case("Llama", 3, 1, 8),
    "llama-mha-tied": Case("Llama", 4, 4, 6, {"tie_word_embeddings": True}),
    "llama3-rope": Case("Llama", 6, 3, 16, {"rope_parameters": LLAMA3}),
    "llama-linear-rope": Case("Llama", 6, 2, 8, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-biases": Case("Llama", 5, 1, 8, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": Case("Llama", 3, 3, 14),
    "mistral-window": Case("Mistral", 6, 3, 8, {"sliding_window": 7}),
    "mistral-no-window": Case("Mistral", 3, 1, 12, {"sliding_window": None}),
    "qwen2-bias": Case("Qwen2", 6, 2, 8),
    "qwen2-tied-upper-layers-windowed": Case(
        "Qwen2", 4, 2, 8, {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3-own-head-dim": Case("Qwen3", 3, 1, 24),
    "qwen3-tied-bias": Case("Qwen3", 6, 3, 8, {"tie_word_embeddings": True, "attention_bias": True}),
}


def save_random_model(case: Case, folder: Path) -> Any:
    hidden = case.heads * 8       # so that head_dim is sometimes hidden / heads and sometimes not
    sizes = {"vocab_size": 97, "hidden_size": hidden, "intermediate_size": 44, "num_hidden_layers": 3, "max_position_embeddings": 256}
    heads = {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads}
    if case.family != "Qwen2":
        heads["head_dim"] = case.head_dim
    config = getattr(transformers, f"{case.family}Config")(**sizes | heads | case.options)
    torch.manual_seed(7)
    oracle = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():     # biases and norms too: Hugging Face's zeros and ones would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    oracle.save_pretrained(folder)
    return oracle


def save_random_models(cases: dict[str, Case], factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each."""
    folders = {name: factory.mktemp("model") for name in cases}
    for name, case in cases.items():
        save_random_model(case, folders[name])
    return folders
