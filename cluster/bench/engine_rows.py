"""What `bench engine` reports, and the rooflines it is held against: bytes and FLOPs counted from the model's shape alone."""

from msgspec import Struct

from ...models.config import ModelConfig


class Row(Struct, frozen=True):
    kind: str                 # "prefill", "decode", or a kernel's name
    shape: str
    ms: float                 # median
    floor_ms: float           # the larger of bytes / bandwidth and FLOPs / rate, both as measured in this run
    bound: str                # "bytes" or "FLOPs": which of them that is
    gap_us: float | None = None     # decode: a step's time that the GPU did not work, for want of the host

    @property
    def share(self) -> float:
        return self.floor_ms / self.ms


class Ceilings(Struct, frozen=True):
    bytes_per_s: float        # a device copy, read + written
    flops_per_s: float        # a square matrix product in the model's type


class EngineReport(Struct, frozen=True):
    model: str
    device: str
    versions: str
    ceilings: Ceilings
    rows: list[Row]
    cudnn_prefill_ms: dict[str, float] = {}       # prefill attention's shapes, by torch's cuDNN on contiguous tensors


def linear_elements(model: ModelConfig) -> int:
    """Elements of the matrices that every token passes, but for the head's."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    attention = model.hidden_size * heads + model.num_heads * model.head_dim * model.hidden_size
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


def kv_elements(model: ModelConfig) -> int:
    """Of one token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim


def floor(num_bytes: float, flops: float, ceilings: Ceilings) -> tuple[float, str]:
    """Milliseconds, and what they are due to."""
    by_bytes, by_flops = 1e3 * num_bytes / ceilings.bytes_per_s, 1e3 * flops / ceilings.flops_per_s
    return (by_bytes, "bytes") if by_bytes > by_flops else (by_flops, "FLOPs")


def prefill_work(model: ModelConfig, num_prompts: int, length: int, element_bytes: int) -> tuple[float, float]:
    """Bytes and FLOPs: weights once, KV written once; two FLOPs an element and token, four a query, visible key and head dimension."""
    weights, head = linear_elements(model), model.hidden_size * model.vocab_size
    pairs = num_prompts * length * (length + 1) / 2
    flops = 2 * num_prompts * (length * weights + head) + 4 * pairs * model.num_layers * model.num_heads * model.head_dim
    return element_bytes * (weights + head + num_prompts * length * kv_elements(model)), flops


def decode_work(model: ModelConfig, batch: int, context: int, element_bytes: int) -> tuple[float, float]:
    """Bytes and FLOPs of a step whose sequences have `context` tokens: weights and every sequence's KV once."""
    weights = linear_elements(model) + model.hidden_size * model.vocab_size
    attention = 4 * batch * context * model.num_layers * model.num_heads * model.head_dim
    return element_bytes * (weights + batch * context * kv_elements(model)), 2 * batch * weights + attention
