"""What a dense decoder's weights are: one structure, filled first with the plan (names and shapes) and then with tensors.

    weight_plan(config) → ModelWeights[Param] ── map(load or invent) ──► ModelWeights[Tensor] → Transformer

A `Param` is one tensor of ours; its pieces are the checkpoint's tensors that lie in it one after the other along the rows, so Q, K and V
are one GEMM, and gate and up another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from .config import ModelConfig

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Piece:
    """One tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """One tensor of the model: its pieces stacked along dimension 0."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])


@dataclass(frozen=True)
class LayerWeights(Generic[T]):
    """Matrices are [out, in]. q = heads * head_dim, kv = kv_heads * head_dim, n = hidden_size, m = intermediate_size."""

    attention_norm: T         # [n]
    qkv: T                    # [q + 2 kv, n]
    qkv_bias: T | None        # [q + 2 kv]
    q_norm: T | None          # [head_dim]
    k_norm: T | None          # [head_dim]
    out: T                    # [n, q]
    out_bias: T | None        # [n]
    mlp_norm: T               # [n]
    gate_up: T                # [2 m, n]
    gate_up_bias: T | None    # [2 m]
    down: T                   # [n, m]
    down_bias: T | None       # [n]


@dataclass(frozen=True)
class ModelWeights(Generic[T]):
    embedding: T              # [vocab, n]
    layers: tuple[LayerWeights[T], ...]
    norm: T                   # [n]
    lm_head: T | None         # [vocab, n]; None: the embedding is used

    def map(self, fn: Callable[[T], U]) -> "ModelWeights[U]":
        """The same structure with `fn` applied to every leaf that is there."""
        return ModelWeights(
            embedding=fn(self.embedding),
            layers=tuple(LayerWeights(**{f.name: _apply(fn, getattr(layer, f.name)) for f in fields(layer)}) for layer in self.layers),
            norm=fn(self.norm),
            lm_head=_apply(fn, self.lm_head),
        )

    def leaves(self) -> Iterator[T]:
        found: list[T] = []
        self.map(found.append)
        return iter(found)


def _apply(fn: Callable[[Any], Any], leaf: Any) -> Any:
    return None if leaf is None else fn(leaf)


def weight_plan(config: ModelConfig) -> ModelWeights[Param]:
    """Every tensor that a checkpoint of this configuration must hold, under Hugging Face's names."""
    table = (config.vocab_size, config.hidden_size)
    return ModelWeights(
        embedding=_param(table, "model.embed_tokens.weight"),
        layers=tuple(_layer_plan(config, f"model.layers.{i}.") for i in range(config.num_layers)),
        norm=_param((config.hidden_size,), "model.norm.weight"),
        lm_head=None if config.tie_embeddings else _param(table, "lm_head.weight"),
    )


def _param(shape: tuple[int, ...], *names: str) -> Param:
    return Param(tuple(Piece(name, shape) for name in names))


def _layer_plan(config: ModelConfig, prefix: str) -> LayerWeights[Param]:
    n, m, d = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {"q": config.num_heads * d, "k": config.num_kv_heads * d, "v": config.num_kv_heads * d}
    attn, mlp = prefix + "self_attn.", prefix + "mlp."
    return LayerWeights(
        attention_norm=_param((n,), prefix + "input_layernorm.weight"),
        qkv=Param(tuple(Piece(f"{attn}{x}_proj.weight", (rows[x], n)) for x in rows)),
        qkv_bias=Param(tuple(Piece(f"{attn}{x}_proj.bias", (rows[x],)) for x in rows)) if config.qkv_bias else None,
        q_norm=_param((d,), attn + "q_norm.weight") if config.qk_norm else None,
        k_norm=_param((d,), attn + "k_norm.weight") if config.qk_norm else None,
        out=_param((n, rows["q"]), attn + "o_proj.weight"),
        out_bias=_param((n,), attn + "o_proj.bias") if config.out_bias else None,
        mlp_norm=_param((n,), prefix + "post_attention_layernorm.weight"),
        gate_up=_param((m, n), mlp + "gate_proj.weight", mlp + "up_proj.weight"),
        gate_up_bias=_param((m,), mlp + "gate_proj.bias", mlp + "up_proj.bias") if config.mlp_bias else None,
        down=_param((n, m), mlp + "down_proj.weight"),
        down_bias=_param((n,), mlp + "down_proj.bias") if config.mlp_bias else None,
    )
