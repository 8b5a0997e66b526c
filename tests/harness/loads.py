"""What a router is told of workers, and asked: for tests."""

from diptych.cluster.router.goodput import Goodput, GoodputOptions
from diptych.cluster.router.policy import ClusterView, Objectives, RoutingRequest, WorkerLoad
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import ServiceClass, WorkerRef
from diptych.messages.steps import StepModel

MODEL = StepModel(5e-3, 22e-6, 9e-10, 18e-6, 3.2e-8, error=0.02, num_observed=1000)
CHAT = Objectives(ttft_s=0.4, tpot_s=0.02)
REQUEST = RoutingRequest(tuple(range(1000)), max_new_tokens=4096, objectives=CHAT)


def ref(name: str) -> WorkerRef:
    return WorkerRef(WorkerId(name), Epoch(1), Address(f"fake://{name}"))


def load(
    name: str,
    *,
    waiting: int = 0,
    decoding: int = 0,
    free: int = 1000,
    share: float = 0.0,
    queue: tuple = (),
    sent: int = 0,
    passing: int = 0,
    model: StepModel = MODEL,
) -> WorkerLoad:
    return WorkerLoad(
        ref=ref(name),
        num_requests=decoding + -(-waiting // 1000) + passing,
        num_passing=passing,
        num_waiting_tokens=waiting,
        num_blocks=1000,
        num_free_blocks=free,
        block_size=64,
        prefill_pairs=waiting * 500,
        num_decoding=decoding,
        decode_context=decoding * 1200,
        max_step_tokens=2048,
        prefill_share=share,
        step_model=model,
        num_sent_tokens=sent,
        reported_at=0.0,
        queue=queue,
    )


def view(prefill: list[WorkerLoad], decode: list[WorkerLoad], **fields: object) -> ClusterView:
    return ClusterView(tuple(prefill), tuple(decode), mean_outputs=dict.fromkeys(ServiceClass, 200.0), **fields)


def policy(**options: object) -> Goodput:
    return Goodput(GoodputOptions(**options))
