"""An engine that computes nothing: every request gets its prompt back, token by token, on a steady grid of steps.

    GenerateRequest ──► its first token at once
    each step ────────► the next token of all that run, in one StepTokens a gateway, with a load report
"""

import time
from collections.abc import Iterable

from ...messages.codec import Message
from ...messages.ids import Address, Epoch, RequestId, WorkerId
from ...messages.membership import Member, Role
from ...messages.post import Post
from ...messages.requests import Abort, FinishReason, GenerateRequest, LoadReport, LoadUpdate, StepTokens, TokenDelta, WorkerRef
from ...messages.steps import StepFeatures, StepModel

NUM_BLOCKS, BLOCK_SIZE = 1 << 20, 64
MAX_MODEL_LEN = 1 << 20
MODEL = StepModel(1e-3, 1e-7, 0.0, 1e-7, 0.0, error=0.01, num_observed=1000)
"""Quick enough that a router has no reason to refuse anything."""


class StubEngine:
    def __init__(self, post: Post, gateways: Iterable[Address]) -> None:
        self.ref = WorkerRef(WorkerId("decode-0"), Epoch(1), post.address)
        self._post = post
        self._gateways = tuple(gateways)
        self._running: dict[RequestId, tuple[GenerateRequest, int]] = {}        # with the index of its next token

    @property
    def member(self) -> Member:
        return Member(self.ref, Role.DECODE, "stub", BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN)

    def take(self, messages: Iterable[Message]) -> None:
        begun = []
        for message in messages:
            match message:
                case GenerateRequest():
                    self._running[message.request_id] = (message, message.num_prior_outputs)
                    begun.append(message.request_id)
                case Abort():
                    self._running.pop(message.request_id, None)
                case _:
                    pass
        self._send(begun)

    def step(self) -> None:
        self._send(list(self._running))

    def beat(self) -> None:
        for gateway in self._gateways:
            self._post.send(gateway, LoadUpdate(self._load()))

    def _send(self, request_ids: Iterable[RequestId]) -> None:
        deltas: dict[Address, list[TokenDelta]] = {}
        for request_id in request_ids:
            if request_id in self._running:
                request, index = self._running[request_id]
                deltas.setdefault(request.gateway, []).append(self._next(request, index))
        for gateway, of_gateway in deltas.items():
            self._post.send(gateway, StepTokens(self.ref, tuple(of_gateway), self._load()))

    def _next(self, request: GenerateRequest, index: int) -> TokenDelta:
        token_id = request.token_ids[index % len(request.token_ids)]
        if index + 1 < request.sampling.max_tokens:
            self._running[request.request_id] = (request, index + 1)
            return TokenDelta(request.request_id, index, (token_id,))
        del self._running[request.request_id]
        return TokenDelta(request.request_id, index, (token_id,), FinishReason.LENGTH)

    def _load(self) -> LoadReport:
        count = len(self._running)
        work = StepFeatures(num_decoding=count)
        return LoadReport(self.ref, 0, 0, count, 0, NUM_BLOCKS, NUM_BLOCKS, BLOCK_SIZE, work, step_model=MODEL)


def serve(engine: StubEngine, post: Post, step_s: float, beat_s: float = 0.05) -> None:
    """For ever. A step that comes late does not move the grid."""
    began = time.monotonic()
    next_step, next_beat = began, began
    while True:
        now = time.monotonic()
        engine.take(post.receive(max(0.0, min(next_step, next_beat) - now)))
        now = time.monotonic()
        if now >= next_step:
            engine.step()
            next_step += step_s * ((now - next_step) // step_s + 1)
        if now >= next_beat:
            engine.beat()
            next_beat = now + beat_s
