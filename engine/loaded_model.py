"""A model in the ranks of its worker: one Transformer each, with its part of the weights, and a runner over them all."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch

from ..kernels.ops import Ops, UnsupportedByKernels
from ..kernels.selection import OpsNeeds, ops_of_ranks
from ..kvtransfer.layout import KVLayout
from ..kvtransfer.nvlink import cudart
from ..kvtransfer.transport import KVPool
from ..messages.errors import ModelError
from ..models.config import ModelConfig, Shard
from ..models.loader import LoadFormat, load_weights
from ..models.transformer import Transformer
from ..models.weights import weight_plan
from .config import EngineConfig
from .engine import EngineLimits
from .gpu_memory import kv_room, require_room_for_weights
from .model_runner import ModelRunner, TorchRunner
from .prompt_steps import FINE
from .ranked_runner import RankedRunner
from .ranks import Ranks
from .scheduler import MAX_SCORED_TOKENS


@dataclass(frozen=True)
class LoadedModel:
    ranks: Ranks
    models: list[Transformer]                 # of each rank, as all that follows
    ops: list[Ops]

    def kv_room(self, dtype: torch.dtype, layout: KVLayout, engine: EngineConfig) -> int:
        """Bytes that each rank has. Raises PoolTooSmall."""
        return min(self.ranks.run(lambda rank: kv_room(self.models[rank], dtype, layout, engine, self.ranks.devices[rank])))

    def prepare(self, pools: tuple[KVPool, ...], max_rows: int) -> None:
        self.ranks.run(lambda rank: self.ops[rank].prepare(self.models[rank].config.num_heads, pools[rank].tensor, max_rows))

    def runner(self, pools: tuple[KVPool, ...], limits: EngineLimits, layer_group: int) -> ModelRunner:
        """Raises PoolTooSmall: no room for CUDA graphs."""
        if self.ranks.devices[0].type == "cuda":
            runners = self._cuda_runners(pools, limits, layer_group)
        else:
            runners = [TorchRunner(self.models[rank], pools[rank], device, rank == 0) for rank, device in enumerate(self.ranks.devices)]
        return runners[0] if len(runners) == 1 else RankedRunner(self.ranks, runners)

    def _cuda_runners(self, pools: tuple[KVPool, ...], limits: EngineLimits, layer_group: int) -> list[ModelRunner]:
        from .cuda_runner import CudaRunner, SampledTokens, Seat  # needs Triton

        ranks, sampled = self.ranks, SampledTokens(limits.max_sequences, self.ranks.devices[0])

        def runner(rank: int) -> ModelRunner:
            seat = Seat(sampled, rank == 0, lambda shapes: ranks.agree(rank, shapes))
            return CudaRunner(self.models[rank], pools[rank], limits, ranks.devices[rank], layer_group, seat)

        return ranks.run(runner)


def load_model(
    folder: Path,
    config: ModelConfig,
    engine: EngineConfig,
    devices: Sequence[torch.device],
    layout: KVLayout,
    dtype: torch.dtype,
    kv_scales: torch.Tensor,
) -> LoadedModel:
    """Onto the devices of all ranks. Raises ModelError."""
    needs = OpsNeeds(
        head_dim=config.head_dim,
        block_size=layout.block_size,
        dtype=dtype,
        kv_dtype=layout.dtype,
        kv_scales=kv_scales,
        max_rows=max(engine.max_step_tokens, engine.max_sequences) + FINE,          # the padding of a step with prompts
        logit_rows=engine.max_sequences + min(MAX_SCORED_TOKENS, engine.max_step_tokens),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )
    _require_atomics(devices)
    try:
        ranked = ops_of_ranks(devices, needs)
    except UnsupportedByKernels as refused:
        raise ModelError(f"{config.architecture} in blocks of {layout.block_size} tokens: {refused}") from refused
    ranks = Ranks(devices, ranked.abort)
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])

    def check(rank: int) -> None:
        if devices[rank].type == "cuda":
            require_room_for_weights(weight_plan(config, Shard(rank, engine.tp)), dtype, devices[rank])

    def load(rank: int) -> Transformer:
        shard, device = Shard(rank, engine.tp), devices[rank]
        weights = load_weights(folder, config, dtype, device, LoadFormat(engine.load_format), shard)
        return Transformer(config.of_rank(shard), weights, ranked.ops[rank])

    with ExitStack() as undo:
        undo.callback(ranks.close)
        ranks.run(check)
        loaded = LoadedModel(ranks, ranks.run(load), list(ranked.ops))
        undo.pop_all()
    return loaded


def _require_atomics(devices: Sequence[torch.device]) -> None:
    """By which ranks on GPUs tell each other. Raises ModelError."""
    if devices[0].type == "cpu" or not torch.cuda.is_available():
        return
    for here, there in permutations(devices, 2):
        assert here.index is not None
        if not cudart.has_native_atomics(here.index, there.index):
            raise ModelError(f"tp {len(devices)}: {here} and {there} have no atomic operations on each other's memory, so no NVLink")


def devices_of(engine: EngineConfig) -> list[torch.device]:
    """Of each rank: from the current GPU on, or the one that is named."""
    device = torch.device(engine.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return [device] * engine.tp
    first = torch.cuda.current_device() if device.index is None else device.index
    if first + engine.tp > torch.cuda.device_count():
        raise ModelError(f"tp {engine.tp}: {torch.cuda.device_count()} GPUs are here, the first to be used is number {first}")
    return [torch.device("cuda", first + rank) for rank in range(engine.tp)]
