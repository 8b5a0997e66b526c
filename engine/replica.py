"""From a WorkerConfig to one model replica with its memory. Fails before anything large is allocated, where it can."""

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.kv_storage import FP8
from ..kernels.ops import Ops, UnsupportedByKernels
from ..kernels.selection import ops_for
from ..kvtransfer.bundle import TransportBundle
from ..kvtransfer.layout import KVLayout
from ..kvtransfer.selection import Owner, make_transports
from ..kvtransfer.staging import Staging
from ..kvtransfer.transport import Bundle, KVMemory, KVPool
from ..messages.errors import ModelError, PoolTooSmall
from ..messages.ids import WorkerId
from ..messages.steps import StepModel
from ..models.config import ModelConfig
from ..models.loader import LoadFormat, load_kv_scales, load_weights
from ..models.transformer import Transformer
from ..models.weights import weight_plan
from .calibration import calibrate, warm_up
from .config import EngineConfig, ReceiverPool, WorkerConfig
from .engine import Engine, EngineLimits
from .gpu_memory import kv_room, require_room_for_weights
from .model_runner import ModelRunner, TorchRunner
from .predictor import PRIOR

NUM_SAMPLES = 64                # of a weights file, evenly spread
SAMPLE_BYTES = 64 << 10
DEFAULT_KV_BYTES = 256 << 20      # on the CPU
STAGING_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}      # where pages for pools of another layout are made
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CALIBRATION_S = 0.25              # to measure steps before anything is served
GPU_LAYER_GROUPS = 8               # a push takes the host as long as it takes the GPU to compute a layer or two
GPU_CALIBRATION_S = 3.0           # whose longest steps take a fifth of a second


@dataclass(frozen=True)
class Replica:
    engine: Engine
    pool: KVPool
    transport: TransportBundle
    layer_group: int                          # layers whose pages leave together
    step_model: StepModel = PRIOR             # of this model on this device, as far as is known before anything is served
    staging: Staging | None = None            # of a prefill worker whose receivers' pools have another layout

    @property
    def outbound(self) -> tuple[Bundle, KVMemory]:
        """What pages for other workers are written over, and from."""
        return (self.transport, self.pool) if self.staging is None else (self.staging.transport, self.staging.pool)

    def close(self) -> None:
        self.transport.close()
        if self.staging is not None:
            self.staging.transport.close()


def build_replica(config: WorkerConfig, transport: TransportBundle | None = None) -> Replica:
    """Raises ModelError, PoolTooSmall, ClusterError (no shared memory, no UCX). `transport` makes the pool; None: the config's."""
    torch.set_num_threads(config.num_threads)
    folder, engine = Path(config.engine.model_path), config.engine
    model_config = ModelConfig.from_folder(folder)
    dtype, device, load_format = _dtype(engine, model_config), _device(engine), _load_format(engine)
    kv_scales = load_kv_scales(folder, model_config, load_format)
    layout = KVLayout(
        model=fingerprint(folder, load_format),
        dtype=_kv_dtype(engine.kv_dtype, dtype),
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=engine.block_size,
    )
    layout_there = _layout_there(config.receiver, layout, dtype)
    num_blocks = _num_blocks(engine, layout, device)
    if num_blocks is not None:
        _limits(engine, model_config, num_blocks)            # refuses before anything large is loaded
    ops = _ops(device, model_config, layout, dtype, kv_scales)
    if device.type == "cuda":
        require_room_for_weights(weight_plan(model_config), dtype, device)
    model = Transformer(model_config, load_weights(folder, model_config, dtype, device, load_format), ops)
    if num_blocks is None:
        room = kv_room(model, dtype, layout, engine, device) - (STAGING_BYTES[device.type] if layout_there != layout else 0)
        num_blocks = _blocks_in(room, "what the model leaves of the GPU,", layout)
    limits = _limits(engine, model_config, num_blocks)
    transport = transport or _transports(config, config.worker_id)
    pool = transport.allocate(layout, num_blocks)
    ops.prepare(model_config.num_heads, pool.tensor, min(limits.max_step_tokens, limits.max_model_len))
    staging = _staging(config, pool, layout_there, kv_scales) if layout_there != layout else None
    layer_group = engine.layer_group or (1 if device.type == "cpu" else math.ceil(layout.num_layers / GPU_LAYER_GROUPS))
    runner, budget_s = _runner(model, pool, limits, device, layer_group), CALIBRATION_S
    if device.type == "cuda":
        warm_up(runner, limits)
        budget_s = GPU_CALIBRATION_S
    step_model = calibrate(runner, limits, time.monotonic, budget_s)
    return Replica(Engine(runner, num_blocks, limits), pool, transport, layer_group, step_model, staging)


def _layout_there(receiver: ReceiverPool | None, layout: KVLayout, dtype: torch.dtype) -> KVLayout:
    """Of the workers that KV is handed to."""
    if receiver is None:
        return layout
    return replace(layout, block_size=receiver.block_size, dtype=_kv_dtype(receiver.kv_dtype, dtype))


def _staging(config: WorkerConfig, pool: KVPool, layout: KVLayout, kv_scales: Tensor) -> Staging:
    """Never more blocks than the whole pool would fill."""
    transport = _transports(config, WorkerId(f"{config.worker_id}.staging"))
    num_blocks = -(-pool.num_blocks * pool.layout.block_size // layout.block_size)
    room = max(1, STAGING_BYTES[pool.tensor.device.type] // layout.block_bytes)
    return Staging(pool, transport.allocate(layout, min(num_blocks, room)), transport, kv_scales)


def _transports(config: WorkerConfig, owner: WorkerId) -> TransportBundle:
    return make_transports(config.transports, Owner(config.cluster, owner, config.epoch, config.engine.device))


def _runner(model: Transformer, pool: KVPool, limits: EngineLimits, device: torch.device, layer_group: int) -> ModelRunner:
    if device.type == "cpu":
        return TorchRunner(model, pool, device)
    from .cuda_runner import CudaRunner  # needs Triton

    return CudaRunner(model, pool, limits, device, layer_group)


def _device(engine: EngineConfig) -> torch.device:
    device = torch.device(engine.device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and torch.cuda.is_available() else device


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


def _num_blocks(engine: EngineConfig, layout: KVLayout, device: torch.device) -> int | None:
    """None: as many as the model will leave room for."""
    if engine.num_blocks is not None:
        return engine.num_blocks
    if engine.kv_memory_bytes is None and device.type == "cuda":
        return None
    return _blocks_in(DEFAULT_KV_BYTES if engine.kv_memory_bytes is None else engine.kv_memory_bytes, "kv_memory_bytes", layout)


def _blocks_in(num_bytes: int, whose: str, layout: KVLayout) -> int:
    if num_bytes < layout.block_bytes:
        raise PoolTooSmall(f"{whose} {num_bytes}: one block of {layout.block_size} tokens takes {layout.block_bytes}")
    return num_bytes // layout.block_bytes


def _limits(engine: EngineConfig, model: ModelConfig, num_blocks: int) -> EngineLimits:
    room = num_blocks * engine.block_size
    wanted = engine.max_model_len or min(model.max_position_embeddings, room)
    if wanted > model.max_position_embeddings:
        raise ModelError(f"max_model_len {wanted} is over the model's {model.max_position_embeddings} positions")
    if not 0 < wanted <= room:
        raise PoolTooSmall(f"max_model_len {wanted}: the KV pool of {num_blocks} blocks holds {room} tokens")
    return EngineLimits(engine.block_size, wanted, engine.max_step_tokens, engine.max_sequences, engine.prefix_cache)


def _ops(device: torch.device, model: ModelConfig, layout: KVLayout, dtype: torch.dtype, kv_scales: Tensor) -> Ops:
    try:
        return ops_for(device, model.head_dim, layout.block_size, dtype, layout.dtype, kv_scales)
    except UnsupportedByKernels as refused:
        raise ModelError(f"{model.architecture} in blocks of {layout.block_size} tokens: {refused}") from refused


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
