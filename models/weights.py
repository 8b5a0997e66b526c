"""What a dense decoder's weights are: one structure, filled first with the plan (names and shapes) and then with tensors.

    weight_plan(config) → ModelWeights[Param] ── map(load or invent) ──► ModelWeights[Tensor] → Transformer

A `Param` is one tensor of ours; its pieces are the checkpoint's tensors that lie in it one after the other along the rows, so Q, K and V
are one GEMM, and gate and up another.

Of a model that several ranks share, each holds some heads and some of the gated MLP's channels: rows of what computes them, columns of what
follows on them, so that the ranks' products of the latter add up (Megatron-LM, arXiv 1909.08053, section 3). The head's rows are shared out
too; embedding and norms are everybody's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Generic, TypeVar

from .config import WHOLE, ModelConfig, Shard

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Piece:
    """One tensor of a Hugging Face checkpoint, or the part of it that a rank holds."""

    name: str
    shape: tuple[int, ...]                  # in the checkpoint
    part: tuple[slice, ...]                 # of each dimension

    @property
    def held_shape(self) -> tuple[int, ...]:
        return tuple(len(range(size)[part]) for size, part in zip(self.shape, self.part, strict=True))


@dataclass(frozen=True)
class Param:
    """One tensor of the model: its pieces stacked along dimension 0."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first, *_ = shapes = [piece.held_shape for piece in self.pieces]
        return (sum(shape[0] for shape in shapes), *first[1:])


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


def weight_plan(config: ModelConfig, shard: Shard = WHOLE) -> ModelWeights[Param]:
    """Every tensor that a checkpoint of this configuration must hold, under Hugging Face's names. `config` is the whole model's. A rank of
    several has a head of its own also where the model has none: its rows of the embedding. Raises ModelError: not to be shared so."""
    config.of_rank(shard)
    plan = _Plan(config, shard)
    return ModelWeights(
        embedding=plan.table("model.embed_tokens.weight", Split.NO),
        layers=tuple(plan.layer(f"model.layers.{i}.") for i in range(config.num_layers)),
        norm=plan.param((config.hidden_size,), "model.norm.weight"),
        lm_head=plan.head(),
    )


class Split(Enum):
    """Along which dimension ranks share a tensor."""

    NO = None
    ROWS = 0
    COLUMNS = 1


@dataclass(frozen=True)
class _Plan:
    config: ModelConfig
    shard: Shard

    def param(self, shape: tuple[int, ...], *names: str, split: Split = Split.NO) -> Param:
        return Param(tuple(self.piece(name, shape, split) for name in names))

    def piece(self, name: str, shape: tuple[int, ...], split: Split) -> Piece:
        part = (self.shard.of(size) if dimension == split.value else slice(None) for dimension, size in enumerate(shape))
        return Piece(name, shape, tuple(part))

    def table(self, name: str, split: Split) -> Param:
        return self.param((self.config.vocab_size, self.config.hidden_size), name, split=split)

    def head(self) -> Param | None:
        split = Split.ROWS if self.config.vocab_size % self.shard.size == 0 else Split.NO
        if not self.config.tie_embeddings:
            return self.table("lm_head.weight", split)
        return None if self.shard.size == 1 else self.table("model.embed_tokens.weight", split)

    def layer(self, prefix: str) -> LayerWeights[Param]:
        config = self.config
        n, m, d = config.hidden_size, config.intermediate_size, config.head_dim
        rows = {"q": config.num_heads * d, "k": config.num_kv_heads * d, "v": config.num_kv_heads * d}
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = tuple(self.piece(f"{attn}{x}_proj.weight", (rows[x], n), Split.ROWS) for x in rows)
        qkv_bias = tuple(self.piece(f"{attn}{x}_proj.bias", (rows[x],), Split.ROWS) for x in rows)
        gates = f"{mlp}gate_proj", f"{mlp}up_proj"
        return LayerWeights(
            attention_norm=self.param((n,), prefix + "input_layernorm.weight"),
            qkv=Param(qkv),
            qkv_bias=Param(qkv_bias) if config.qkv_bias else None,
            q_norm=self.param((d,), attn + "q_norm.weight") if config.qk_norm else None,
            k_norm=self.param((d,), attn + "k_norm.weight") if config.qk_norm else None,
            out=self.param((n, rows["q"]), attn + "o_proj.weight", split=Split.COLUMNS),
            out_bias=self.param((n,), attn + "o_proj.bias") if config.out_bias else None,
            mlp_norm=self.param((n,), prefix + "post_attention_layernorm.weight"),
            gate_up=self.param((m, n), *(f"{gate}.weight" for gate in gates), split=Split.ROWS),
            gate_up_bias=self.param((m,), *(f"{gate}.bias" for gate in gates), split=Split.ROWS) if config.mlp_bias else None,
            down=self.param((n, m), mlp + "down_proj.weight", split=Split.COLUMNS),
            down_bias=self.param((n,), mlp + "down_proj.bias") if config.mlp_bias else None,
        )
