"""Handoffs of one block, one after the other, between two production workers on an idle pair: `bench transfer --parts handoff`.

    this process: the gateway and the controller ──request──► prefill worker ═══ one page of 64 KiB ═══► decode worker ──token 1──► here

KVWriter, KVReceiver, their sessions and the post are a deployment's; only the model does no more than store KV. A handoff lasts from the
moment when the writer sends KVOffer until the receiver, with the blocks committed, sends KVCommitted: between lie three messages, one page.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ...messages.ids import RequestId
from ...messages.membership import Member, Membership, Role
from ...messages.requests import GenerateRequest, RequestFailed, RequestSpan, Route, SamplingParams, StepTokens
from ...messages.zmq_post import Keyring, ZmqPost
from .errors import TransferBenchError
from .handoff_worker import BLOCK_TOKENS, LAYOUT, Stamp, WorkerEnd
from .transfer_peer import Path, Remote, remote
from .transfer_rows import HandoffRow, HandoffStep

NUM_AFTER = {0.002: 1000, 0.02: 500}
"""How many handoffs after a pause of so many seconds, in which both loops look for more, or have gone to sleep."""

WARM_UPS, QUICK_HANDOFFS = 100, 50
IDLE_S = 1.0                    # to see what idle workers cost
ANSWER_TIMEOUT_S = 10.0
CAUSES = [
    ("offer on its way", "KVOffer", True),
    ("admission", "KVOffer", False),
    ("accept on its way", "KVAccept", True),
    ("page written, announced", "KVAccept", False),
    ("announcement on its way", "KVLanded", True),
    ("counted, committed", "KVLanded", False),
    ("", "KVCommitted", True),
]
"""What begins with which message, sent or received; the last ends the handoff."""


def handoff_rows(path: Path, gpus: tuple[str | None, str | None], quick: bool) -> list[HandoffRow]:
    """One for each pause. Raises TransferBenchError, ClusterError."""
    rows = []
    with _pair(path, gpus) as pair:
        pair.hand_off(QUICK_HANDOFFS if quick else WARM_UPS, 0.0)
        pair.stamps()
        idle_cpu = pair.idle_cpu(IDLE_S)
        for pause_s, count in NUM_AFTER.items():
            pair.hand_off(QUICK_HANDOFFS if quick else count, pause_s)
            rows.append(summary(path.name, pause_s, pair.stamps(), idle_cpu))
    return rows


def summary(path: str, pause_s: float, stamps: Iterable[Stamp], idle_cpu: float) -> HandoffRow:
    """Raises TransferBenchError: a handoff lacks one of its messages."""
    by_request: dict[RequestId, dict[tuple[str, bool], float]] = defaultdict(dict)
    for stamp in stamps:
        by_request[stamp.request_id][stamp.message, stamp.sent] = stamp.at_s
    try:
        moments = np.array([[seen[message, sent] for _, message, sent in CAUSES] for seen in by_request.values()])
    except KeyError as missing:
        raise TransferBenchError(f"{path}: a handoff without {missing}") from None
    whole = _step("offer to commit", moments[:, -1] - moments[:, 0])
    steps = [_step(name, took_s) for (name, _, _), took_s in zip(CAUSES, np.diff(moments).T, strict=False)]
    return HandoffRow(path, LAYOUT.page_bytes, pause_s, len(moments), whole.p50_us, whole.p99_us, steps, idle_cpu)


def _step(name: str, took_s: NDArray[np.float64]) -> HandoffStep:
    p50_us, p99_us = 1e6 * np.quantile(took_s, [0.5, 0.99])
    return HandoffStep(name, float(p50_us), float(p99_us))


class HandoffPair:
    def __init__(self, post: ZmqPost, prefill: Remote, decode: Remote, keyring: Keyring) -> None:
        self._post, self._ends = post, (prefill, decode)
        for end, role in zip(self._ends, Role, strict=True):
            end.tell("start", role, keyring)
        self._members: tuple[Member, ...] = tuple(end.answer() for end in self._ends)
        for end in self._ends:
            end.call("tell", Membership(1, self._members, (post.address,)))
        self._num_sent = 0

    def hand_off(self, count: int, pause_s: float) -> None:
        """One after the other, each after the pause."""
        for _ in range(count):
            time.sleep(pause_s)
            self._once()

    def _once(self) -> None:
        prefill, decode = (member.ref for member in self._members)
        self._num_sent += 1
        request = GenerateRequest(
            request_id=RequestId(f"bench-{self._num_sent}"),
            gateway=self._post.address,
            token_ids=(self._num_sent,) * BLOCK_TOKENS,
            sampling=SamplingParams(max_tokens=2, seed=0, temperature=0.0),
            route=Route(decode, prefill),
            timeout_s=ANSWER_TIMEOUT_S,
        )
        self._post.send(prefill.address, request)
        self._await_end()

    def _await_end(self) -> None:
        """Both ends are done: the answer's last token is here, and the writer's account of the handoff."""
        missing, give_up_at = {"end", "span"}, time.monotonic() + ANSWER_TIMEOUT_S
        while missing:
            if time.monotonic() >= give_up_at:
                raise TransferBenchError(f"handoff {self._num_sent}: no {' and no '.join(sorted(missing))} in {ANSWER_TIMEOUT_S} s")
            for message in self._post.receive(ANSWER_TIMEOUT_S):
                match message:
                    case RequestSpan():
                        missing.discard("span")
                    case StepTokens() if any(delta.finish for delta in message.deltas):
                        missing.discard("end")
                    case RequestFailed():
                        raise TransferBenchError(f"handoff {self._num_sent}: {message.message}")

    def stamps(self) -> list[Stamp]:
        return [stamp for end in self._ends for stamp in end.call("stamps")]

    def idle_cpu(self, seconds: float) -> float:
        """Cores that both processes take together while nothing is asked of them."""
        before = sum(end.call("cpu_s") for end in self._ends)
        time.sleep(seconds)
        return float(sum(end.call("cpu_s") for end in self._ends) - before) / seconds


@contextmanager
def _pair(path: Path, gpus: tuple[str | None, str | None]) -> Iterator[HandoffPair]:
    cluster, keyring = f"bench{uuid4().hex[:8]}", Keyring.new()
    with ExitStack() as stack:
        ends = [stack.enter_context(remote(path, cluster, f"{role}-0", gpu, WorkerEnd)) for role, gpu in zip(Role, gpus, strict=True)]
        post = ZmqPost(keyring)
        stack.callback(post.close)
        yield HandoffPair(post, ends[0], ends[1], keyring)
