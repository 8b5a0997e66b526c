"""One end of the handoffs that `diptych bench transfer` times: a production worker whose model only stores KV, in a process of its own.

    pipe: start ─► tell ─► … requests come by post, as from a gateway … ─► stamps

The worker's loop runs in a thread beside the pipe's, as under Ray. What it says and hears of handoffs is stamped at the post, on the
monotonic clock, which all processes of a host share.
"""

import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch
from msgspec import Struct

from ...decode_worker.worker import DecodeWorker
from ...engine.config import EngineConfig, WorkerConfig
from ...engine.engine import Engine, EngineLimits
from ...engine.model_runner import ChunkOutput, SyncRunner
from ...engine.replica import Replica
from ...engine.sampler import Sampled
from ...engine.scheduler import StepPlan
from ...engine.worker import Worker
from ...kvtransfer.layout import KVLayout
from ...kvtransfer.selection import Owner, make_transports
from ...kvtransfer.transport import KVMemory
from ...messages.codec import Message
from ...messages.handoff import KVAccept, KVCommitted, KVLanded, KVOffer
from ...messages.ids import Address, Epoch, RequestId, WorkerId
from ...messages.membership import Member, Membership, Role
from ...messages.post import Post
from ...messages.zmq_post import Keyring, ZmqPost
from ...prefill_worker.worker import PrefillWorker
from .transfer_peer import Path

BLOCK_TOKENS, NUM_BLOCKS = 64, 64
LAYOUT = KVLayout("bench", torch.bfloat16, num_layers=1, num_kv_heads=8, head_dim=32, block_size=BLOCK_TOKENS)
"""One page of 64 KiB a block."""

ROLES = {Role.PREFILL: PrefillWorker, Role.DECODE: DecodeWorker}
JOIN_TIMEOUT_S = 10.0


class Stamp(Struct, frozen=True):
    request_id: RequestId
    message: str                              # its type
    sent: bool                                # or received
    at_s: float


class StampedPost:
    """A post that notes when a handoff's messages leave (before it is asked to send) and come (when it hands them over)."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self.stamps: list[Stamp] = []

    @property
    def address(self) -> Address:
        return self._post.address

    @property
    def num_dropped(self) -> int:
        return self._post.num_dropped

    def send(self, to: Address, message: Message) -> None:
        self._stamp(message, sent=True)
        self._post.send(to, message)

    def receive(self, timeout_s: float) -> list[Message]:
        messages = self._post.receive(timeout_s)
        for message in messages:
            self._stamp(message, sent=False)
        return messages

    def forget(self, peer: Address) -> None:
        self._post.forget(peer)

    def update_members(self, members: AbstractSet[Address]) -> None:
        self._post.update_members(members)

    def close(self) -> None:
        self._post.close()

    def _stamp(self, message: Message, sent: bool) -> None:
        if isinstance(message, KVOffer | KVAccept | KVLanded | KVCommitted):
            self.stamps.append(Stamp(message.ticket.request_id, type(message).__name__, sent, time.monotonic()))


class IdleModel(SyncRunner):
    """All KV is 0, and every token. It is stored where a model stores it, by a kernel on a GPU: what pages wait for, and what a step has
    begun with when its handoff is accepted."""

    def __init__(self, pool: KVMemory) -> None:
        (self._pool,) = (each.tensor for each in pool.ranks)

    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> list[ChunkOutput]:
        for chunk in plan.chunks:
            self._pool[chunk.sequence.blocks[-1]].zero_()
        for layer in range(LAYOUT.num_layers):
            if on_layer is not None:
                on_layer(layer)
        return [ChunkOutput(Sampled(0) if chunk.samples else None) for chunk in plan.chunks]


class WorkerEnd:
    def __init__(self, path: Path, cluster: str, name: str) -> None:
        self._path, self._cluster, self._name = path, cluster, WorkerId(name)

    def start(self, role: Role, keyring: Keyring) -> Member:
        """Raises ClusterError."""
        config = WorkerConfig(self._cluster, self._name, Epoch(1), EngineConfig("none"), (self._path.transport,))
        transport = make_transports(config.transports, Owner(self._cluster, self._name, config.epoch, self._path.device))
        pool = transport.allocate(LAYOUT, NUM_BLOCKS)
        limits = EngineLimits(BLOCK_TOKENS, NUM_BLOCKS * BLOCK_TOKENS, max_step_tokens=BLOCK_TOKENS, max_sequences=8, prefix_cache=False)
        replica = Replica(Engine(IdleModel(pool), NUM_BLOCKS, limits), pool, transport, layer_group=1)
        self._post = StampedPost(ZmqPost(keyring))
        self._worker: Worker = ROLES[role](config, self._post, replica)
        self._thread = threading.Thread(target=self._worker.run, name="member", daemon=True)
        self._thread.start()
        return self._worker.member

    def tell(self, membership: Membership) -> None:
        self._worker.update_membership(membership)

    def stamps(self) -> list[Stamp]:
        """Since the last call."""
        taken, self._post.stamps = self._post.stamps, []
        return taken

    def cpu_s(self) -> float:
        """Of this process so far, all threads."""
        return time.process_time()

    def close(self) -> None:
        self._worker.stop()
        self._thread.join(JOIN_TIMEOUT_S)
        self._worker.close()
        self._post.close()
