"""From a WorkerConfig to one model replica with its memory. Fails before anything large is allocated, where it can."""

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.kv_storage import FP8
from ..kvtransfer.layout import KVLayout
from ..kvtransfer.selection import Owner, make_sharded, make_transports
from ..kvtransfer.staging import Staging
from ..kvtransfer.transport import Bundle, KVMemory
from ..messages.errors import ModelError, PoolTooSmall
from ..messages.ids import WorkerId
from ..messages.steps import StepModel
from ..models.config import ModelConfig, Shard
from ..models.loader import LoadFormat, load_kv_scales
from .calibration import calibrate, warm_up
from .config import EngineConfig, ReceiverPool, WorkerConfig
from .engine import Engine, EngineLimits
from .loaded_model import devices_of, load_model
from .predictor import PRIOR
from .ranks import Ranks

NUM_SAMPLES = 64                # of a weights file, evenly spread
SAMPLE_BYTES = 64 << 10
DEFAULT_KV_BYTES = 256 << 20      # on the CPU
STAGING_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}      # where pages for pools of another layout are made
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CALIBRATION_S = 0.35              # to measure steps before anything is served
GPU_LAYER_GROUPS = 8               # a push takes the host as long as it takes the GPU to compute a layer or two
GPU_CALIBRATION_S = 3.0           # whose longest steps take a fifth of a second


@dataclass(frozen=True)
class Replica:
    engine: Engine
    pool: KVMemory
    transport: Bundle
    layer_group: int                          # layers whose pages leave together
    step_model: StepModel = PRIOR             # of this model on this device, as far as is known before anything is served
    staging: Staging | None = None            # of a prefill worker whose receivers' pools have another layout
    ranks: Ranks | None = None                # whose threads compute; None: the engine's runner has none

    @property
    def outbound(self) -> tuple[Bundle, KVMemory]:
        """What pages for other workers are written over, and from."""
        return (self.transport, self.pool) if self.staging is None else (self.staging.transport, self.staging.pool)

    def close(self) -> None:
        self.transport.close()
        if self.staging is not None:
            self.staging.transport.close()
        if self.ranks is not None:
            self.ranks.close()


def build_replica(config: WorkerConfig, transport: Bundle | None = None) -> Replica:
    """Raises ModelError, PoolTooSmall, ClusterError (no shared memory, no UCX). `transport` makes the pool; None: the config's."""
    torch.set_num_threads(config.num_threads)
    folder, engine = Path(config.engine.model_path), config.engine
    model_config = ModelConfig.from_folder(folder)
    dtype, devices = _dtype(engine, model_config), devices_of(engine)
    kv_scales = load_kv_scales(folder, model_config, _load_format(engine))
    layout = _layout(config, model_config, dtype)
    layout_there = _layout_there(config.receiver, layout, dtype)
    num_blocks = _num_blocks(engine, layout)
    if num_blocks is not None:
        _limits(engine, model_config, num_blocks)            # refuses before anything large is loaded
    model, is_cpu = load_model(folder, model_config, engine, devices, layout, dtype, kv_scales), devices[0].type == "cpu"
    with ExitStack() as undo:                                # whatever fails from here on leaves no thread, and no memory that is shared
        undo.callback(model.ranks.close)
        if num_blocks is None:
            room = model.kv_room(dtype, layout, engine) - (STAGING_BYTES["cuda"] // engine.tp if layout_there != layout else 0)
            num_blocks = _blocks_in(room, "what the model leaves of the GPU,", layout, layout.rank_block_bytes)
        limits = _limits(engine, model_config, num_blocks)
        transport = transport or _transports(config, config.worker_id, devices)
        undo.callback(transport.close)
        pool = transport.allocate(layout, num_blocks)
        model.prepare(pool.ranks, min(limits.max_step_tokens, limits.max_model_len))
        staging = _staging(config, pool, layout_there, kv_scales, devices) if layout_there != layout else None
        if staging is not None:
            undo.callback(staging.transport.close)
        layer_group = engine.layer_group or (1 if is_cpu else math.ceil(layout.num_layers / GPU_LAYER_GROUPS))
        runner, budget_s = model.runner(pool.ranks, limits, layer_group), CALIBRATION_S
        if not is_cpu:
            warm_up(runner, limits)
            budget_s = GPU_CALIBRATION_S
        step_model = calibrate(runner, limits, time.monotonic, budget_s)
        replica = Replica(Engine(runner, num_blocks, limits), pool, transport, layer_group, step_model, staging, model.ranks)
        undo.pop_all()
    return replica


def _layout(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> KVLayout:
    """Raises ModelError: the ranks of this pool, or of the finest one, cannot share the heads."""
    engine, finest = config.engine, max(config.finest_tp, config.engine.tp)
    for tp in (engine.tp, finest):
        model.of_rank(Shard(0, tp))
    return KVLayout(
        model=fingerprint(Path(engine.model_path), _load_format(engine)),
        dtype=_kv_dtype(engine.kv_dtype, dtype),
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=engine.block_size,
        tp_size=engine.tp,
        piece_heads=model.num_kv_heads // finest if finest > 1 else 0,
    )


def _layout_there(receiver: ReceiverPool | None, layout: KVLayout, dtype: torch.dtype) -> KVLayout:
    """Of the workers that KV is handed to."""
    if receiver is None:
        return layout
    return replace(layout, block_size=receiver.block_size, dtype=_kv_dtype(receiver.kv_dtype, dtype))


def _staging(config: WorkerConfig, pool: KVMemory, layout: KVLayout, kv_scales: Tensor, devices: Sequence[torch.device]) -> Staging:
    """Never more blocks than the whole pool would fill."""
    transport = _transports(config, WorkerId(f"{config.worker_id}.staging"), devices)
    num_blocks = -(-pool.num_blocks * pool.layout.block_size // layout.block_size)
    room = max(1, STAGING_BYTES[devices[0].type] // layout.block_bytes)
    return Staging(pool, transport.allocate(layout, min(num_blocks, room)), transport, kv_scales)


def _transports(config: WorkerConfig, owner: WorkerId, devices: Sequence[torch.device]) -> Bundle:
    """Where all workers have one rank, pages are written whole."""
    whose = Owner(config.cluster, owner, config.epoch, config.engine.device)
    if max(config.finest_tp, len(devices)) == 1:
        return make_transports(config.transports, whose)
    return make_sharded(config.transports, whose, [str(device) for device in devices])


def fingerprint(folder: Path, load_format: LoadFormat) -> str:
    """Equal for folders with the same config and the same weights, as far as headers, sizes and samples of each file tell."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    digest.update(load_format.encode())
    if load_format is LoadFormat.SAFETENSORS:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as weights:
                for start in range(0, size, max(size // NUM_SAMPLES, SAMPLE_BYTES)):
                    weights.seek(start)
                    digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _num_blocks(engine: EngineConfig, layout: KVLayout) -> int | None:
    """None: as many as the model will leave room for."""
    if engine.num_blocks is not None:
        return engine.num_blocks
    if engine.kv_memory_bytes is None and engine.device != "cpu":
        return None
    num_bytes = DEFAULT_KV_BYTES if engine.kv_memory_bytes is None else engine.kv_memory_bytes
    return _blocks_in(num_bytes, "kv_memory_bytes", layout, layout.block_bytes)


def _blocks_in(num_bytes: int, whose: str, layout: KVLayout, block_bytes: int) -> int:
    if num_bytes < block_bytes:
        raise PoolTooSmall(f"{whose} {num_bytes}: one block of {layout.block_size} tokens takes {block_bytes}")
    return num_bytes // block_bytes


def _limits(engine: EngineConfig, model: ModelConfig, num_blocks: int) -> EngineLimits:
    room = num_blocks * engine.block_size
    wanted = engine.max_model_len or min(model.max_position_embeddings, room)
    if wanted > model.max_position_embeddings:
        raise ModelError(f"max_model_len {wanted} is over the model's {model.max_position_embeddings} positions")
    if not 1 < wanted <= room:
        text = f"max_model_len {wanted}: the KV pool of {num_blocks} blocks holds {room} tokens"
        raise PoolTooSmall(f"{text}, and a prompt of one and its answer take 2" if room == 1 or wanted == 1 else text)
    return EngineLimits(engine.block_size, wanted, engine.max_step_tokens, engine.max_sequences, engine.prefix_cache)


def _load_format(engine: EngineConfig) -> LoadFormat:
    if engine.load_format not in list(LoadFormat):
        raise ModelError(f"load_format {engine.load_format!r} is none of {', '.join(LoadFormat)}")
    return LoadFormat(engine.load_format)


def _dtype(engine: EngineConfig, model: ModelConfig) -> torch.dtype:
    if engine.dtype == "auto":
        return torch.float32 if engine.device == "cpu" else model.dtype
    if engine.dtype not in DTYPES:
        raise ModelError(f"dtype {engine.dtype!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[engine.dtype]


def _kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    known = DTYPES | {"auto": dtype, "fp8_e4m3": FP8}
    if name not in known:
        raise ModelError(f"kv_dtype {name!r} is none of {', '.join(known)}")
    return known[name]
