"""What a prefill loses by sending its KV, by how the pages leave: `python tests/bench/push_cost.py MODEL_FOLDER` on two GPUs.

One prompt of 8192 tokens in one step, random weights; a receiver on the second GPU counts. All ways take turns in a new order each round;
of each the difference to the same round's prompt that sends nothing, and how long after the step's end the last page was counted.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

os.environ["CUDA_VISIBLE_DEVICES"] = "0"             # the receiver's process is given the other one

import torch

from diptych.cluster.bench import transfer_peer
from diptych.cluster.bench.engine_bench import NOBODY, request_of
from diptych.cluster.bench.transfer_peer import COUNT_TIMEOUT_S, IMM, Remote, remote
from diptych.engine.config import EngineConfig, WorkerConfig
from diptych.engine.replica import Replica, build_replica
from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.nvlink.transport import NvlinkTransport
from diptych.kvtransfer.plan import PagePlan, leave_after
from diptych.kvtransfer.transport import connect_within
from diptych.messages.ids import BlockId, Epoch, WorkerId
from diptych.models.config import ModelConfig

PROMPT_TOKENS, BLOCK_SIZE = 8192, 64
NUM_BLOCKS = 2 * PROMPT_TOKENS // BLOCK_SIZE + 8     # the upper half takes what is "sent" to this GPU itself, over whatever KV lies there
ROUNDS, PAUSE_S = 20, 0.03


@dataclass(frozen=True)
class Way:
    name: str
    leaves: Callable[[int, int], bool]               # after this layer, of so many
    engine: str = "sm"
    most: int | None = None                          # pages of one write
    is_local: bool = False                           # into this GPU's own memory: without a link


def main(model_folder: str) -> None:
    model, cluster = ModelConfig.from_folder(Path(model_folder)), f"bench{uuid4().hex[:8]}"
    transport = NvlinkTransport(cluster, WorkerId("writer"), Epoch(1), torch.device("cuda"))
    limits = {"max_model_len": PROMPT_TOKENS + BLOCK_SIZE, "max_step_tokens": PROMPT_TOKENS, "max_sequences": 4, "num_blocks": NUM_BLOCKS}
    config = EngineConfig(model_folder, load_format="dummy", device="cuda", block_size=BLOCK_SIZE, prefix_cache=False, **limits)
    replica = build_replica(WorkerConfig("bench", NOBODY.worker_id, NOBODY.epoch, config), TransportBundle([transport]))
    for block in replica.pool.tensor:
        block.normal_()
    group = replica.layer_group
    ways = [
        Way("each group of layers", lambda layer, layers: leave_after(layer, layers, group, gathers=False)),
        Way("one page after each", lambda layer, layers: leave_after(layer, layers, group, gathers=False), most=1),
        Way("each group, into own memory", lambda layer, layers: leave_after(layer, layers, group, gathers=False), is_local=True),
        Way("after the last layer", lambda layer, layers: layer + 1 == layers),
        Way("gathered, by SMs", lambda layer, layers: leave_after(layer, layers, group, gathers=True)),
        Way("gathered, by either", lambda layer, layers: leave_after(layer, layers, group, gathers=True), "either"),
        Way("gathered, by copy engines", lambda layer, layers: leave_after(layer, layers, group, gathers=True), "copy"),
    ]
    with remote(transfer_peer.Path("nvlink", "nvlink", "cuda"), cluster, "receiver", "1") as receiver:
        prefill = Prefill(replica, model, transport, receiver)
        rounds = [prefill.round(ways) for _ in range(ROUNDS + 2)][2:]
    replica.close()
    print(f"alone: {statistics.median(each[None][0] for each in rounds):.1f} ms")
    for way in ways:
        more = [each[way.name][0] - each[None][0] for each in rounds]
        low, middle, high = statistics.quantiles(more, n=4)
        late = statistics.median(each[way.name][1] for each in rounds)
        print(f"{way.name}: {middle:+.2f} ms ({low:+.2f} to {high:+.2f}), counted {late:+.2f} ms after the step")


class Prefill:
    def __init__(self, replica: Replica, model: ModelConfig, transport: NvlinkTransport, receiver: Remote) -> None:
        self._replica, self._model, self._transport, self._receiver = replica, model, transport, receiver
        self._peer = connect_within(transport, receiver.call("allocate", replica.pool.layout, NUM_BLOCKS), COUNT_TIMEOUT_S)
        self._target = transport._targets[self._peer.descriptor.location]
        upper_half = transport._words.data_ptr() + (NUM_BLOCKS // 2) * replica.pool.layout.block_bytes
        memory = SimpleNamespace(pool=upper_half, counters=self._target.memory.counters)
        self._own = SimpleNamespace(memory=memory, num_pages=self._target.num_pages)
        self._num_prompts = 0

    def round(self, ways: list[Way]) -> dict[str | None, tuple[float, float]]:
        """By the way's name, None for none: milliseconds of the step, and from its end to the last page's count."""
        order = [None, *ways]
        random.shuffle(order)
        return {way.name if way else None: self._once(way) for way in order}

    def _once(self, way: Way | None) -> tuple[float, float]:
        engine, num_layers = self._replica.engine, self._replica.pool.layout.num_layers
        self._num_prompts += 1
        engine.add(request_of(self._num_prompts, PROMPT_TOKENS, 1, self._model), 0.0)
        step = engine.plan()
        blocks = step.chunks[0].sequence.blocks
        plan = PagePlan(num_layers, list(blocks), [BlockId(i) for i in range(len(blocks))], 0)

        def on_layer(layer: int) -> None:
            if way is not None and way.leaves(layer, num_layers):
                writes = plan.take(range(layer + 1), len(blocks))
                self._transport.write_pages(self._peer, writes.src[: way.most], writes.dst[: way.most], IMM)

        if way is not None:
            self._aim(way)
            self._receiver.call("reset")
            num_writes = sum(way.leaves(layer, num_layers) for layer in range(num_layers))
            self._receiver.tell("counted_at", num_writes * way.most if way.most else plan.num_pages)
        torch.cuda.synchronize()
        started_s = time.monotonic()
        engine.execute(step, on_layer)
        ended_s = time.monotonic()
        counted_s = ended_s if way is None else self._receiver.answer()
        assert way is None or self._transport.stop(self._peer, IMM, COUNT_TIMEOUT_S)
        time.sleep(PAUSE_S)
        return 1e3 * (ended_s - started_s), 1e3 * (counted_s - ended_s)

    def _aim(self, way: Way) -> None:
        target: Any = self._own if way.is_local else self._target
        self._transport._targets[self._peer.descriptor.location] = target
        self._transport._engine = way.engine  # type: ignore[assignment]


if __name__ == "__main__":
    main(*sys.argv[1:])
