"""Real workers on real models and transports, in one process: only the network between them is the fake one, and it is well-behaved."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from diptych.decode_worker.worker import DecodeWorker
from diptych.engine.config import EngineConfig, ReceiverPool, WorkerConfig
from diptych.engine.worker import Worker
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.ids import Epoch, RequestId, WorkerId
from diptych.messages.membership import Membership
from diptych.messages.requests import (
    GenerateRequest,
    RequestFailed,
    RequestSpan,
    Route,
    SamplingParams,
    StepTokens,
    TokenDelta,
    TokenLogprobs,
)
from diptych.prefill_worker.worker import PrefillWorker


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    done: bool = False


class ShmCluster:
    def __init__(self, prefill: WorkerConfig, decode: WorkerConfig) -> None:
        self.network = FakeNetwork()
        self.gateway = self.network.post("gateway")
        self.prefill: Worker = PrefillWorker(prefill, self.network.post("prefill"))
        self.decode: Worker = DecodeWorker(decode, self.network.post("decode"))
        self.workers = (self.prefill, self.decode)
        self.spans: list[RequestSpan] = []
        self._num_requests = 0
        for worker in self.workers:
            worker.update_membership(Membership(1, tuple(w.member for w in self.workers), (self.gateway.address,)))

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, split: bool) -> list[Result]:
        """All at once; by prefill worker and decode worker, or by the decode worker alone."""
        return self.generate_by([Route(self.decode.ref, self.prefill.ref if split else None)] * len(prompts), prompts, sampling)

    def generate_by(self, routes: list[Route], prompts: list[list[int]], sampling: SamplingParams) -> list[Result]:
        """All at once, each by its route."""
        results: dict[RequestId, Result] = {}
        for route, prompt in zip(routes, prompts, strict=True):
            self._num_requests += 1
            request_id = RequestId(f"r{self._num_requests}")
            results[request_id] = Result()
            request = GenerateRequest(request_id, self.gateway.address, tuple(prompt), sampling, route, timeout_s=60)
            self.gateway.send(route.first.address, request)
        give_up_at = time.monotonic() + 60
        while not all(result.done for result in results.values()):
            assert time.monotonic() < give_up_at, "no end within 60 s"
            self._turn(results)
        self._turn({})
        return list(results.values())

    def _turn(self, results: dict[RequestId, Result]) -> None:
        self.network.deliver_all()
        for worker in self.workers:
            worker.turn(0.0)
        self.network.deliver_all()
        for message in self.gateway.receive(0):
            assert not isinstance(message, RequestFailed), message
            if isinstance(message, RequestSpan):
                self.spans.append(message)
            if isinstance(message, StepTokens):
                for delta in message.deltas:
                    _take(results[delta.request_id], delta)


def _take(result: Result, delta: TokenDelta) -> None:
    assert delta.index == len(result.token_ids)
    result.token_ids += delta.token_ids
    result.logprobs += delta.logprobs
    result.deltas.append(delta)
    result.done = delta.finish is not None


@contextmanager
def shm_cluster(
    model: Path, prefill: EngineConfig | None = None, decode: EngineConfig | None = None, transports: tuple[str, ...] = ("shm",)
) -> Iterator[ShmCluster]:
    plain = EngineConfig(str(model), block_size=4, num_blocks=128, max_step_tokens=64)
    name = f"test{uuid4().hex[:8]}"
    prefill, decode = prefill or plain, decode or plain
    receiver, finest = ReceiverPool(decode.block_size, decode.kv_dtype), max(prefill.tp, decode.tp)
    cluster = ShmCluster(
        WorkerConfig(name, WorkerId("prefill-0"), Epoch(1), prefill, transports, receiver=receiver, finest_tp=finest),
        WorkerConfig(name, WorkerId("decode-0"), Epoch(1), decode, transports, finest_tp=finest),
    )
    try:
        yield cluster
        for worker in cluster.workers:
            pool = worker.engine.pool
            assert pool.num_free + pool.num_cached == pool.num_blocks, f"{worker.ref.worker_id} leaks {pool.num_held} blocks"
            assert worker.num_handoffs() == 0
    finally:
        for worker in cluster.workers:
            worker.close()
