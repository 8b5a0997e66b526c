"""What decode steps lose while pages arrive beside them: `bench transfer --parts decode`.

    receiver: a replica that decodes a batch ◄═══ pages, into blocks that no sequence uses ═══ writer: the same layout, no model

The same batch decodes on and on, in segments that take turns: alone, while pages come at the pace of a prefill, and while they come
without a pause. On a GPU the model has Llama-3-8B's shape and random weights, and its steps are CUDA graphs, each launched while the one
before runs; on a CPU it is the one that comes with the package. Weights and KV are random: zeros run faster than anything real.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path as Folder
from uuid import uuid4

import numpy as np
from msgspec import Struct

from ...engine.config import EngineConfig, WorkerConfig
from ...engine.replica import build_replica
from ...kvtransfer.layout import KVLayout
from ...kvtransfer.transport import IdArray
from ...messages.ids import BlockId, Epoch, WorkerId
from ...messages.membership import MemoryDescriptor
from ...messages.requests import TokenDelta
from ...models.config import ModelConfig
from ...models.embedded.path import embedded_model_path
from .engine_bench import fill_with_noise, request_of
from .transfer_peer import IMM, Path, Remote, TransportEnd, remote
from .transfer_rows import LoadRow

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 128_001,
    "torch_dtype": "bfloat16",
}
BATCHES = (1, 64)
WARM_UP_STEPS = 5
PAGE_GROUPS = 8  # an arrival comes in so many pieces, as from a prefill's groups of layers
MAX_UNDER_WAY = 4  # pieces: the link is never without one
LOOK_S = 0.0001


class Shape(Struct, frozen=True):
    """How much is measured."""

    context: int  # tokens of each sequence
    arriving_bytes: int  # a prompt's KV
    prefill_s: float  # in which it comes at a prefill's pace: 8192 tokens of an 8B model on a GPU
    steps: int  # of a segment
    rounds: int


ON_GPU = Shape(context=1024, arriving_bytes=1 << 30, prefill_s=0.2, steps=40, rounds=7)
ON_CPU = Shape(context=128, arriving_bytes=64 << 20, prefill_s=0.2, steps=12, rounds=5)
QUICK = Shape(context=32, arriving_bytes=4 << 20, prefill_s=0.1, steps=3, rounds=2)


class Landing(Struct, frozen=True):
    """Where the pages go."""

    descriptor: MemoryDescriptor
    layout: KVLayout
    blocks: list[BlockId]


class DecodingEnd:
    """The receiver: one replica, driven as a worker drives it."""

    def __init__(self, path: Path, cluster: str, name: str) -> None:
        self._path, self._cluster, self._name = path, cluster, WorkerId(name)

    def start(self, shape: Shape) -> Landing:
        """Raises ModelError, PoolTooSmall, ClusterError."""
        with _model_folder(self._path.device) as folder:
            config = _config(self._path, folder, shape)
            self._replica = build_replica(WorkerConfig(self._cluster, self._name, Epoch(1), config, (self._path.transport,)))
            self._model, self._shape = ModelConfig.from_folder(folder), shape
        pool, layout = self._replica.pool, self._replica.pool.layout
        fill_with_noise(pool)
        (descriptor,) = self._replica.transport.register(pool)
        blocks = self._replica.engine.pool.take(shape.arriving_bytes // layout.block_bytes)
        assert blocks is not None, "the pool was sized for this"
        return Landing(descriptor, layout, blocks)

    def decode(self, batch: int) -> None:
        """From now on, instead of what was decoded before."""
        engine = self._replica.engine
        for sequence in engine.sequences:
            engine.finish(sequence)
        for i in range(batch):
            request = request_of(i, self._shape.context, _num_steps(self._shape), self._model)
            blocks = engine.pool.take(-(-self._shape.context // engine.limits.block_size))
            assert blocks is not None, "the pool was sized for this"
            engine.adopt(request, TokenDelta(request.request_id, 0, (1,)), blocks, 0.0)

    def step_ms(self, num_steps: int) -> float:
        """Mean of so many steps, after some that are not counted."""
        engine = self._replica.engine
        for done in range(WARM_UP_STEPS + num_steps):
            if done == WARM_UP_STEPS:
                started = time.perf_counter()
            while engine.may_plan:
                engine.launch(engine.plan())
            engine.collect()
        ms = 1e3 * (time.perf_counter() - started) / num_steps
        while engine.is_computing:
            engine.collect()
        return ms

    def num_counted(self) -> int:
        return self._replica.transport.num_landed(IMM)

    def close(self) -> None:
        self._replica.transport.close()


class FlowingEnd(TransportEnd):
    """The writer."""

    def share_out(self, here: IdArray, there: IdArray) -> None:
        """Into the pieces in which the pages go."""
        self._groups = list(zip(np.array_split(here, PAGE_GROUPS), np.array_split(there, PAGE_GROUPS), strict=True))

    def flow(self, seconds: float, period_s: float) -> None:
        """One piece a period, if the link takes it; 0: as fast as it goes."""
        transport, peer = self.running
        started, before = time.monotonic(), transport.stats.num_pages
        num_started = 0
        for i in count():
            time.sleep(max(0.0, started + i * period_s - time.monotonic()))
            here, there = self._groups[i % PAGE_GROUPS]
            while num_started - (transport.stats.num_pages - before) > MAX_UNDER_WAY * len(here):
                time.sleep(LOOK_S)
            if time.monotonic() - started > seconds:
                return
            transport.write_pages(peer, here, there, IMM)
            num_started += len(here)


def decode_rows(path: Path, gpus: tuple[str | None, str | None], quick: bool) -> list[LoadRow]:
    """`gpus`: the writer's, the receiver's. Raises TransferBenchError, ModelError, PoolTooSmall, ClusterError."""
    shape = QUICK if quick else ON_GPU if path.device == "cuda" else ON_CPU
    cluster = f"bench{uuid4().hex[:8]}"
    with (
        remote(path, cluster, "writer", gpus[0], FlowingEnd) as writer,
        remote(path, cluster, "receiver", gpus[1], DecodingEnd) as receiver,
    ):
        pair = DecodePair(path, shape, writer, receiver)
        return [row for batch in BATCHES for row in pair.rows(batch)]


class DecodePair:
    def __init__(self, path: Path, shape: Shape, writer: Remote, receiver: Remote) -> None:
        self._path, self._shape, self._writer, self._receiver = path, shape, writer, receiver
        landing: Landing = receiver.call("start", shape)
        writer.call("allocate", landing.layout, len(landing.blocks))
        writer.call("connect", landing.descriptor)
        num_layers = landing.layout.num_layers
        layers = np.arange(num_layers)[:, None]
        here, there = (np.asarray(blocks) * num_layers + layers for blocks in (range(len(landing.blocks)), landing.blocks))
        writer.call("share_out", here.ravel(), there.ravel())
        self._page_bytes = landing.layout.page_bytes

    def rows(self, batch: int) -> list[LoadRow]:
        """At a prefill's pace, and as fast as it goes."""
        self._receiver.call("decode", batch)
        paces = {"a prompt arrives": self._shape.prefill_s / PAGE_GROUPS, "pages without a pause": 0.0}
        found: dict[str, list[tuple[float, float, float]]] = {pace: [] for pace in paces}
        for _ in range(self._shape.rounds):
            for pace, period_s in paces.items():
                alone_ms = self._receiver.call("step_ms", self._shape.steps)
                found[pace].append((alone_ms, *self._beside(alone_ms, period_s)))
        return [
            LoadRow(self._path.name, f"receiver: decode steps of {batch}, {pace}", *map(statistics.median, zip(*rounds, strict=True)))
            for pace, rounds in found.items()
        ]

    def _beside(self, alone_ms: float, period_s: float) -> tuple[float, float]:
        """→ ms a step, GB/s between two looks at the receiver's counter."""
        self._writer.tell("flow", 2 * (WARM_UP_STEPS + self._shape.steps) * alone_ms / 1e3, period_s)
        before, started = self._receiver.call("num_counted"), time.monotonic()
        ms = self._receiver.call("step_ms", self._shape.steps)
        num_pages, seconds = self._receiver.call("num_counted") - before, time.monotonic() - started
        self._writer.answer()
        self._writer.call("stop")
        return ms, num_pages * self._page_bytes / seconds / 1e9


@contextmanager
def _model_folder(device: str) -> Iterator[Folder]:
    if device == "cpu":
        yield embedded_model_path()
        return
    with tempfile.TemporaryDirectory() as name:
        (Folder(name) / "config.json").write_text(json.dumps(LLAMA_3_8B))
        yield Folder(name)


def _num_steps(shape: Shape) -> int:
    """That a batch takes in all: alone and beside, at two paces, and one that was launched ahead."""
    return 4 * shape.rounds * (WARM_UP_STEPS + shape.steps + 1) + 2


def _config(path: Path, folder: Folder, shape: Shape) -> EngineConfig:
    block_size = 64 if path.device == "cuda" else 16
    model = ModelConfig.from_folder(folder)
    length = shape.context + _num_steps(shape)
    dtype_bytes = model.dtype.itemsize
    block_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * block_size * dtype_bytes
    decoding = max(BATCHES) * (-(-length // block_size) + 1)  # one more each: or the next step could not be planned ahead
    return EngineConfig(
        model_path=str(folder),
        load_format="dummy",
        device=path.device,
        block_size=block_size,
        num_blocks=decoding + shape.arriving_bytes // block_bytes,
        max_model_len=length,
        max_step_tokens=512,
        max_sequences=max(BATCHES),
        prefix_cache=False,
    )
