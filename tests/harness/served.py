"""An engine by itself on some device, and what it answers: to be compared with another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.families import Case
from msgspec.structs import replace

from diptych.engine.config import EngineConfig, WorkerConfig
from diptych.engine.engine import Engine
from diptych.engine.loaded_model import devices_of
from diptych.engine.replica import build_replica
from diptych.kvtransfer.local import local_bundle
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef

NOBODY = WorkerRef(WorkerId("w"), Epoch(0), Address(""))
FAMILIES = {
    "llama": Case("Llama", 6, 2, 64),
    "mistral-window": Case("Mistral", 4, 4, 64, {"sliding_window": 20}),
    "qwen2": Case("Qwen2", 2, 1, 64, {"hidden_size": 128}),
    "qwen3": Case("Qwen3", 3, 1, 128),
}
GREEDY = SamplingParams(max_tokens=12, seed=0, temperature=0.0)
DRAWN = SamplingParams(max_tokens=12, seed=5, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)


@dataclass
class Served:
    """What came of one request."""

    tokens: list[int]
    logprobs: list[float]                                  # its prompt's, then its own
    likeliest: list[list[int]]                             # beside each of them


def engine_on(device: str, folder: Path, **changes: Any) -> Engine:
    plain = EngineConfig(str(folder), dtype="float32", device=device, block_size=16, num_blocks=120, max_step_tokens=64, max_sequences=12)
    config = WorkerConfig("test", NOBODY.worker_id, NOBODY.epoch, engine=replace(plain, **changes))
    return build_replica(config, local_bundle(devices_of(config.engine))).engine


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 15, 16, 17, 40, 100, 3, 64, 130, 7, 33, 5][:count]
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def serve(engine: Engine, wanted: list[tuple[list[int], SamplingParams]], num_rouses: int = 0) -> list[Served]:
    """As a worker's loop does: launched whenever a step may be planned; or one by one, the device roused so often before each."""
    served = {RequestId(str(i)): Served([], [], []) for i in range(len(wanted))}
    for i, (prompt, sampling) in enumerate(wanted):
        engine.add(GenerateRequest(RequestId(str(i)), Address(""), tuple(prompt), sampling, Route(decode=NOBODY), 1e9), float(i))
    while engine.has_work:
        if num_rouses and not engine.is_computing:
            for _ in range(num_rouses):
                engine.rouse()
        if (not engine.is_computing if num_rouses else engine.may_plan) and (plan := engine.plan()).chunks:
            engine.launch(plan)
        if engine.is_ready:
            for step in engine.collect():
                assert not step.broke_down
                if (delta := step.delta) is not None:
                    scores, one = (*delta.prompt_logprobs, *delta.logprobs), served[delta.request_id]
                    one.tokens += delta.token_ids
                    one.logprobs += [score.logprob for score in scores]
                    one.likeliest += [[token_id for token_id, _ in score.top] for score in scores]
    assert engine.pool.num_available == engine.pool.num_blocks
    return list(served.values())


EXTRAS: list[dict[str, Any]] = [
    {},
    {"logprobs": 5},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    {"frequency_penalty": 1.3, "logprobs": 0},
    {"logit_bias": {5: 100.0, 6: 99.0}, "frequency_penalty": 60.0},      # now 5, now 6
    {"min_tokens": 9, "stop_token_ids": tuple(range(0, 97, 2)), "logprobs": 2},
    {"prompt_logprobs": 3},
    {"prompt_logprobs": 0, "logprobs": 1, "logit_bias": {7: -100.0}},
    {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.0, "logprobs": 1},
]


def wishes(count: int) -> list[tuple[list[int], SamplingParams]]:
    """`count` requests, each with some of what the device has kernels of its own for."""
    return [(prompt, replace(GREEDY, **EXTRAS[i % len(EXTRAS)], max_tokens=9 + i % 4)) for i, prompt in enumerate(prompts(count))]
