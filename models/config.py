"""A Hugging Face `config.json` → `ModelConfig`: everything the model code needs, nothing it would have to look up.

Both dialects are read: transformers 4.x (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5.x (`rope_parameters`, `dtype`). What cannot
be served exactly is refused by name: an unlisted architecture, rope type, activation or layer type, partial rotary, quantization.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from ..messages.errors import ModelError, UnsupportedModel
from .rope import RopeConfig, RopeKind

S = TypeVar("S")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """One rank of the `size` that share a model."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """Its share of `count` rows, columns or heads, of which there is an equal one for each."""
        assert count % self.size == 0, f"{count} for {self.size} ranks"
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


WHOLE = Shard()


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder's shape. Counts are of the whole model, but in what `of_rank` returns."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int                         # not always hidden_size / num_heads
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]       # per layer: keys a query sees, itself included; None: all
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool                         # RMS norm of each query and key head before rope
    tie_embeddings: bool
    max_position_embeddings: int          # tokens of context
    dtype: torch.dtype                    # the checkpoint's; a deployment may choose another
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, path: Path) -> "ModelConfig":
        """Raises UnsupportedModel for what cannot be served, ModelError for a file that is missing or makes no sense."""
        raw = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
        return _build(raw if eos is None else raw | {"eos_token_id": eos})

    def of_rank(self, shard: Shard) -> "ModelConfig":
        """With the heads and the MLP's channels that one rank computes. Raises ModelError: they cannot be shared out evenly."""
        shared = {"num_key_value_heads": self.num_kv_heads, "intermediate_size": self.intermediate_size}
        for key, count in shared.items():
            if count % shard.size:
                raise ModelError(f"tp {shard.size}: {key} is {count}, which is no multiple of it")
        return replace(
            self,
            num_heads=self.num_heads // shard.size,
            num_kv_heads=self.num_kv_heads // shard.size,
            intermediate_size=self.intermediate_size // shard.size,
        )


@dataclass(frozen=True)
class _Family:
    """How an architecture reads its config.json: the switches that are its own, and Hugging Face's defaults for absent keys."""

    attention_bias: bool = False          # the file's attention_bias is honoured
    mlp_bias: bool = False                # the file's mlp_bias is honoured
    always_qkv_bias: bool = False
    qk_norm: bool = False
    always_window: bool = False           # sliding_window holds for every layer
    layer_windows: bool = False           # use_sliding_window is honoured, and layer_types or max_window_layers say where
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    "LlamaForCausalLM": _Family(attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": _Family(always_window=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": _Family(always_qkv_bias=True, layer_windows=True, defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": _Family(
        attention_bias=True, qk_norm=True, layer_windows=True, defaults={"num_key_value_heads": 32, "head_dim": 128}
    ),
}


class _HfConfig(msgspec.Struct):
    """The keys that matter, with their types checked on conversion."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_theta: float = 10_000.0
    partial_rotary_factor: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, Any] | None = None


class _HfRope(msgspec.Struct, forbid_unknown_fields=True):
    """`rope_scaling` or `rope_parameters`. An unknown key would be a frequency we get wrong, so it is refused."""

    rope_type: str = RopeKind.DEFAULT
    rope_theta: float | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None


_ROPE_KEYS = {
    RopeKind.DEFAULT: set[str](),
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor"},
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: not a JSON object: {error}") from error


def _build(raw: dict[str, Any]) -> ModelConfig:
    architecture, family = _family(raw)
    hf = _convert(dict(family.defaults) | raw, _HfConfig, "config.json")
    if hf.quantization_config is not None:
        raise UnsupportedModel(f"quantized weights ({hf.quantization_config.get('quant_method', 'unnamed method')}) are not supported")
    if hf.hidden_act != "silu":
        raise UnsupportedModel(f"activation {hf.hidden_act!r} is not supported, only 'silu'")
    _check_counts(hf)
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        rope=_rope(hf),
        windows=_windows(hf, family),
        qkv_bias=family.always_qkv_bias or (family.attention_bias and hf.attention_bias),
        out_bias=family.attention_bias and hf.attention_bias,
        mlp_bias=family.mlp_bias and hf.mlp_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        dtype=_dtype(hf),
        eos_token_ids=_eos(hf),
    )


def _family(raw: dict[str, Any]) -> tuple[str, _Family]:
    named = raw.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise UnsupportedModel(f"config.json: architectures must name one architecture, not {named!r}")
    if named[0] not in _FAMILIES:
        raise UnsupportedModel(f"architecture {named[0]} is not supported; supported: {', '.join(_FAMILIES)}")
    return named[0], _FAMILIES[named[0]]


def _convert(raw: dict[str, Any], into: type[S], where: str) -> S:
    try:
        return msgspec.convert(raw, into)
    except msgspec.ValidationError as error:
        raise ModelError(f"{where}: {error}") from error


def _check_counts(hf: _HfConfig) -> None:
    counts = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_hidden_layers": hf.num_hidden_layers,
        "num_attention_heads": hf.num_attention_heads,
        "max_position_embeddings": hf.max_position_embeddings,
        "num_key_value_heads": hf.num_key_value_heads,
        "head_dim": hf.head_dim,
        "sliding_window": hf.sliding_window,
    }
    for key, count in counts.items():
        if count is not None and count < 1:
            raise ModelError(f"config.json: {key} is {count}, must be at least 1")
    if hf.num_key_value_heads and hf.num_attention_heads % hf.num_key_value_heads:
        raise ModelError(f"config.json: {hf.num_attention_heads} attention heads cannot share {hf.num_key_value_heads} KV heads evenly")
    if hf.head_dim is None and hf.hidden_size % hf.num_attention_heads:
        raise ModelError(f"config.json: hidden_size {hf.hidden_size} is not a multiple of {hf.num_attention_heads} heads, and no head_dim")
    if (hf.head_dim or hf.hidden_size // hf.num_attention_heads) % 2:
        raise ModelError("config.json: rotary embedding needs an even head_dim")


def _rope(hf: _HfConfig) -> RopeConfig:
    raw = dict(hf.rope_parameters or hf.rope_scaling or {})
    old_name = raw.pop("type", RopeKind.DEFAULT)
    kind = raw.setdefault("rope_type", old_name)
    if kind not in list(RopeKind):
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(RopeKind)}")
    if missing := _ROPE_KEYS[RopeKind(kind)] - raw.keys():
        raise ModelError(f"config.json: rope type {kind} needs {min(missing)}")
    rope = _convert(raw, _HfRope, "config.json: rope")
    partial = hf.partial_rotary_factor if rope.partial_rotary_factor is None else rope.partial_rotary_factor
    if partial not in (None, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor {partial} is not supported, only 1.0")
    if not (rope.factor > 0 and rope.low_freq_factor < rope.high_freq_factor):
        raise ModelError(f"config.json: rope needs factor > 0 and low_freq_factor < high_freq_factor, got {raw}")
    return RopeConfig(
        theta=hf.rope_theta if rope.rope_theta is None else rope.rope_theta,
        kind=RopeKind(kind),
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_context=rope.original_max_position_embeddings or hf.max_position_embeddings,
    )


def _windows(hf: _HfConfig, family: _Family) -> tuple[int | None, ...]:
    if family.always_window:
        return (hf.sliding_window,) * hf.num_hidden_layers
    if not (family.layer_windows and hf.use_sliding_window) or hf.sliding_window is None:
        return (None,) * hf.num_hidden_layers
    default = ["full_attention" if i < hf.max_window_layers else "sliding_attention" for i in range(hf.num_hidden_layers)]
    kinds = hf.layer_types or default
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layer type {min(unknown)!r} is not supported")
    if len(kinds) != hf.num_hidden_layers:
        raise ModelError(f"config.json: {len(kinds)} layer_types for {hf.num_hidden_layers} layers")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(hf: _HfConfig) -> torch.dtype:
    name = hf.dtype or hf.torch_dtype or "float32"
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _eos(hf: _HfConfig) -> tuple[int, ...]:
    ids = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    return tuple(token_id for token_id in ids if token_id is not None)
