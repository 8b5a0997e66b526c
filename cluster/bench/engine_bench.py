"""`diptych bench engine`: one replica by itself, driven as a worker drives it.

    ceilings (copy, matrix product) ─► prefill rows ─► decode rows ─► kernel rows, each with its roofline's share

A prefill row is the time from launching a step of whole prompts to having its tokens. A decode row is the time between the ends of
successive steps of the same sequences, each launched while the one before runs; what it exceeds a bare replay of the same CUDA graph by is
the host's share. Weights and KV are random: zeros run faster than anything real. Of several ranks the ceilings add up.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...engine.config import EngineConfig, WorkerConfig
from ...engine.engine import Engine
from ...engine.loaded_model import devices_of
from ...engine.replica import Replica, build_replica
from ...kvtransfer.local import local_bundle
from ...kvtransfer.transport import KVMemory
from ...messages.ids import Address, BlockId, Epoch, RequestId, WorkerId
from ...messages.requests import GenerateRequest, Route, SamplingParams, TokenDelta, WorkerRef
from ...models.config import ModelConfig
from .engine_rows import Ceilings, EngineReport, Row, decode_work, floor, prefill_work
from .kernel_bench import kernel_rows, time_ms

PREFILLS = [(1, 128), (1, 1024), (1, 2048), (1, 8192), (4, 2048), (8, 1024), (1, 16_384)]
DECODES = [(1, 128), (1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096), (1, 16_000)]
QUICK = [(1, 64), (2, 32)]
WARM_UP_STEPS = 10
NOBODY = WorkerRef(WorkerId("bench"), Epoch(0), Address(""))


@dataclass(frozen=True)
class EngineBench:
    model: Path
    load_format: str
    dtype: str
    device: str
    block_size: int
    repeats: int
    quick: bool
    tp: int = 1

    @property
    def prefills(self) -> list[tuple[int, int]]:
        return QUICK if self.quick else PREFILLS

    @property
    def decodes(self) -> list[tuple[int, int]]:
        return QUICK if self.quick else DECODES


def run_engine_bench(bench: EngineBench, console: Console) -> EngineReport:
    """Raises ModelError, PoolTooSmall, ClusterError."""
    config, model = _config(bench, ModelConfig.from_folder(bench.model)), ModelConfig.from_folder(bench.model)
    devices = devices_of(config.engine)
    replica = build_replica(config, local_bundle(devices))
    fill_with_noise(replica.pool)
    of_one = _ceilings(replica.pool.layout.dtype, devices[0], bench.quick)
    ceilings = Ceilings(bench.tp * of_one.bytes_per_s, bench.tp * of_one.flops_per_s)
    rows = []
    for count, length in bench.prefills:
        if length <= model.max_position_embeddings:
            rows.append(_prefill(replica, model, count, length, bench.repeats, ceilings))
    for count, context in bench.decodes:
        if context < model.max_position_embeddings:
            rows.append(_decode(replica, model, count, context, 10 * bench.repeats, ceilings))
    has_kernels = devices[0].type == "cuda" and bench.tp == 1
    kernels, cudnn = kernel_rows(model, replica.pool.ranks[0].tensor, ceilings, bench.quick) if has_kernels else ([], {})
    report = EngineReport(bench.model.name, _where(devices), f"torch {torch.__version__}", ceilings, rows + kernels, cudnn)
    _print(report, console)
    return report


def _where(devices: Sequence[torch.device]) -> str:
    name = torch.cuda.get_device_name(devices[0]) if devices[0].type == "cuda" else "CPU"
    return name if len(devices) == 1 else f"{len(devices)} ranks, each on {name}"


def fill_with_noise(pool: KVMemory) -> None:
    for of_rank in pool.ranks:
        for block in of_rank.tensor:         # block by block: normal_ of all at once takes twice the memory
            block.normal_()


def _config(bench: EngineBench, model: ModelConfig) -> WorkerConfig:
    most = max(count * length for count, length in bench.prefills)
    steps = WARM_UP_STEPS + 10 * bench.repeats + 2
    blocks = max(count * (-(-(context + steps) // bench.block_size)) for count, context in bench.decodes + bench.prefills)
    engine = EngineConfig(
        model_path=str(bench.model),
        load_format=bench.load_format,
        dtype=bench.dtype,
        device=bench.device,
        block_size=bench.block_size,
        num_blocks=blocks + max(count for count, _ in bench.decodes),      # or the next step could not be planned ahead
        max_model_len=min(max(c for _, c in bench.decodes + bench.prefills) + steps, model.max_position_embeddings),
        max_step_tokens=most,
        max_sequences=max(count for count, _ in bench.decodes),
        prefix_cache=False,
        tp=bench.tp,
    )
    return WorkerConfig("bench", NOBODY.worker_id, NOBODY.epoch, engine)


def _ceilings(dtype: torch.dtype, device: torch.device, quick: bool) -> Ceilings:
    size = 512 if quick else 8192
    source = torch.randn(64 * size * size // 8, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), device)
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    return Ceilings(2e3 * source.nbytes / copy_ms, 2e3 * size**3 / time_ms(lambda: a @ b, device))


def _prefill(replica: Replica, model: ModelConfig, count: int, length: int, repeats: int, ceilings: Ceilings) -> Row:
    times = [_prefill_once(replica.engine, model, count, length) for _ in range(repeats + 2)][2:]
    floor_ms, bound = floor(*prefill_work(model, count, length, replica.pool.layout.dtype.itemsize), ceilings)
    return Row("prefill", f"{count}×{length}", 1e3 * statistics.median(times), floor_ms, bound)


def _prefill_once(engine: Engine, model: ModelConfig, count: int, length: int) -> float:
    for i in range(count):
        engine.add(request_of(i, length, 1, model), 0.0)
    started = time.perf_counter()
    while engine.has_work:
        engine.execute(engine.plan())
    return time.perf_counter() - started


def _decode(replica: Replica, model: ModelConfig, count: int, context: int, steps: int, ceilings: Ceilings) -> Row:
    engine = replica.engine
    for i in range(count):
        blocks = engine.pool.take(-(-context // engine.limits.block_size))
        assert blocks is not None, "the pool was sized for this"
        _adopt(engine, request_of(i, context, WARM_UP_STEPS + steps + 2, model), blocks)
    ends = []
    while engine.has_work:
        while engine.may_plan and engine.scheduler.running:
            engine.launch(engine.plan())
        engine.collect()
        ends.append(time.perf_counter())
    times = [b - a for a, b in pairwise(ends)][WARM_UP_STEPS:-1]
    ms = 1e3 * statistics.median(times)
    floor_ms, bound = floor(*decode_work(model, count, context + WARM_UP_STEPS + steps // 2, replica.pool.layout.dtype.itemsize), ceilings)
    bare = _bare_replay_ms(replica, count)
    return Row("decode", f"b{count} ctx {context}", ms, floor_ms, bound, None if bare is None else max(0.0, 1e3 * (ms - bare)))


def _adopt(engine: Engine, request: GenerateRequest, blocks: list[BlockId]) -> None:
    engine.adopt(request, TokenDelta(request.request_id, 0, (1,)), blocks, 0.0)


def _bare_replay_ms(replica: Replica, count: int) -> float | None:
    """The last step's graph again and again, with nothing between. None: there is no such graph, or one in each of several ranks."""
    device, runner = replica.pool.ranks[0].tensor.device, replica.engine.runner
    if device.type == "cpu" or len(replica.pool.ranks) > 1:
        return None
    from ...engine.cuda_runner import CudaRunner  # needs Triton

    assert isinstance(runner, CudaRunner)
    return time_ms(lambda: runner.replay_last(count), device)


def request_of(index: int, length: int, max_tokens: int, model: ModelConfig) -> GenerateRequest:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, model.vocab_size, (length,), generator=generator).tolist()
    return GenerateRequest(
        request_id=RequestId(f"bench-{index}"),
        gateway=Address(""),
        token_ids=tuple(ids),
        sampling=SamplingParams(max_tokens=max_tokens, seed=index, temperature=0.0),
        route=Route(decode=NOBODY),
        timeout_s=1e9,
    )


def _print(report: EngineReport, console: Console) -> None:
    ceilings = report.ceilings
    console.print(f"{report.model} on {report.device}, {report.versions}")
    console.print(f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, matrix product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s", highlight=False)
    table = Table("row", "shape", "ms", "roofline, ms", "share", "bound by", "gap, µs")
    for row in report.rows:
        gap = "" if row.gap_us is None else f"{row.gap_us:.0f}"
        table.add_row(row.kind, row.shape, f"{row.ms:.3f}", f"{row.floor_ms:.3f}", f"{row.share:.0%}", row.bound, gap)
    console.print(table)
    for shape, ms in report.cudnn_prefill_ms.items():
        ours = next(row.ms for row in report.rows if row.kind == "prefill attention" and row.shape == shape)
        console.print(f"prefill attention {shape}: cuDNN {ms:.3f} ms, ratio {ms / ours:.2f}", highlight=False)
