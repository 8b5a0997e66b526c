"""Which Triton kernels a replica compiles while it is built, and which of them only once it serves: in a process of its own, as a
process compiles each kernel once."""

import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from msgspec.structs import replace

STEPS = 400


def compiled_in_service(folder: Path, **changes: Any) -> tuple[int, list[str]]:
    """(number of kernels compiled before it served, names and arguments of those after)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(_serve, str(folder), changes).result(timeout=240)


def _serve(folder: str, changes: dict[str, Any]) -> tuple[int, list[str]]:
    import triton

    from diptych.engine.config import EngineConfig, WorkerConfig
    from diptych.engine.loaded_model import devices_of
    from diptych.engine.replica import build_replica
    from diptych.kvtransfer.local import local_bundle
    from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
    from diptych.messages.requests import GenerateRequest, Route, SamplingParams, WorkerRef

    compiled: list[str] = []
    triton.knobs.runtime.jit_cache_hook = lambda **what: compiled.append(f"{what['fn'].name} {what['repr']}") and False
    nobody = WorkerRef(WorkerId("w"), Epoch(0), Address(""))
    config = EngineConfig(folder, load_format="dummy", dtype="bfloat16", device="cuda", block_size=16, num_blocks=400, max_sequences=24)
    worker = WorkerConfig("test", nobody.worker_id, nobody.epoch, engine=replace(config, **changes))
    engine = build_replica(worker, local_bundle(devices_of(worker.engine))).engine
    before, draw = len(compiled), random.Random(1)
    longest = engine.limits.max_model_len - 40
    for step in range(STEPS):
        while len(engine.sequences) < draw.choice((0, 1, 3, 8, 14, 30)):
            length = max(1, min(int(draw.lognormvariate(4, 1.5)), longest))
            sampling = SamplingParams(
                max_tokens=draw.randint(1, 30),
                seed=step,
                temperature=draw.choice((0.0, 0.8)),
                top_k=draw.choice((0, 40)),
                top_p=draw.choice((1.0, 0.9)),
                logprobs=draw.choice((None, None, None, 0, 3)),
                repetition_penalty=draw.choice((1.0, 1.0, 1.0, 1.3)),
                logit_bias=draw.choice(({}, {}, {}, {3: 1.0}, dict.fromkeys(range(300), 0.5))),
                prompt_logprobs=draw.choice((None,) * 15 + (0, 2)),
            )
            prompt = tuple(draw.randrange(1000) for _ in range(length))
            request_id = RequestId(str(draw.getrandbits(64)))
            engine.add(GenerateRequest(request_id, Address(""), prompt, sampling, Route(decode=nobody), 1e9), float(step))
        if engine.may_plan and (plan := engine.plan()).chunks:
            engine.launch(plan)
        if engine.is_ready:
            engine.collect()
    return before, compiled[before:]
