"""Real prefill and decode workers on a fake network, fabric and clock; the test decides what is delivered, landed and when.

The model is `FakeRunner`: each of its tokens depends on all KV that it reads, so a wrong page anywhere shows as a wrong token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from harness.sharded_runner import ShardedRunner, sharded_layout

from diptych.decode_worker.worker import DecodeWorker
from diptych.engine.config import EngineConfig, WorkerConfig
from diptych.engine.engine import Engine, EngineLimits
from diptych.engine.fake_runner import FakeRunner, fake_layout, next_token
from diptych.engine.replica import Replica
from diptych.engine.worker import Worker
from diptych.kvtransfer.bundle import TransportBundle
from diptych.kvtransfer.fake import FakeFabric, FakeTransport, as_pages
from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.sharded import ShardedBundle
from diptych.kvtransfer.staging import Staging
from diptych.kvtransfer.transport import Bundle, KVPool, PageIds, Peer
from diptych.messages.fake_post import FakeNetwork, FakePost
from diptych.messages.ids import Address, Epoch, Imm, RequestId, WorkerId
from diptych.messages.membership import Membership, Role
from diptych.messages.requests import (
    Abort,
    FinishReason,
    GenerateRequest,
    LinkMeasured,
    RequestFailed,
    RequestSpan,
    Route,
    SamplingParams,
    StepTokens,
    TransferFailed,
)
from diptych.prefill_worker.probe import Floor
from diptych.prefill_worker.worker import PrefillWorker

BLOCK_SIZE = 4
TIMEOUT_S = 10.0
PAGE_S = 1e-6
STEP_S, WAIT_S = 0.01, 0.1


@dataclass(frozen=True)
class LateWrite:
    """Reads its pages only when it lands, as a NIC may: what was written over them meanwhile lands in their place."""

    writer: bytes
    target: bytes
    source: KVPool
    src_pages: list[int]
    dst_pages: tuple[int, ...]
    imm: Imm

    @property
    def pages(self) -> torch.Tensor:
        return as_pages(self.source)[self.src_pages]


class LateTransport(FakeTransport):
    def write_pages(self, peer: Peer, src_pages: PageIds, dst_pages: PageIds, imm: Imm) -> None:
        super().write_pages(peer, src_pages, dst_pages, imm)
        left = self.fabric.in_flight.pop()
        self.fabric.in_flight.append(LateWrite(left.writer, left.target, self.pool, list(src_pages), left.dst_pages, imm))


@dataclass
class Answer:
    """What a client of the fake gateway has seen of one request."""

    request: GenerateRequest
    tokens: dict[int, int] = field(default_factory=dict)
    finish: FinishReason | None = None
    finish_index: int | None = None
    failure: RequestFailed | None = None
    aborted: bool = False
    lost: bool = False                     # its worker was killed

    @property
    def ended(self) -> bool:
        return self.complete or self.failure is not None or self.aborted or self.lost

    @property
    def complete(self) -> bool:
        return self.finish_index is not None and all(i in self.tokens for i in range(self.finish_index + 1))


class FakeCluster:
    def __init__(
        self,
        num_prefill: int = 1,
        num_decode: int = 1,
        num_blocks: int = 16,
        max_step_tokens: int = 8,
        floor: Floor | None = None,
        prefill_block_size: int = BLOCK_SIZE,
        staging_blocks: int = 2,
        others: Sequence[str] = (),
        num_layers: int = 2,
        gathers: bool = False,
        tps: tuple[int, int] | None = None,
    ) -> None:
        """With a floor links are probed, and each page takes PAGE_S. Prefill workers whose blocks are of another size convert pages in
        a pool of `staging_blocks`. `others`: transports beside the one called fake, which comes first. `gathers`: its links are such.
        `tps`: ranks of a prefill worker, of a decode worker; None: pages are written whole."""
        self.now = 1000.0
        self.floor = floor
        self.block_sizes = {Role.PREFILL: prefill_block_size, Role.DECODE: BLOCK_SIZE}
        self.tps = None if tps is None else dict(zip((Role.PREFILL, Role.DECODE), tps, strict=True))
        self.staging_blocks = staging_blocks
        self.other_names = others
        self.others: dict[WorkerId, list[FakeTransport]] = {}
        self.links: list[LinkMeasured] = []
        self.network = FakeNetwork()
        self.fabric = FakeFabric()
        self.gateway: FakePost = self.network.post("gateway")
        self.num_blocks = num_blocks
        self.max_step_tokens = max_step_tokens
        self.num_layers, self.gathers = num_layers, gathers
        self.workers: dict[WorkerId, Worker] = {}
        self.transports: dict[WorkerId, FakeTransport] = {}
        self.answers: dict[RequestId, Answer] = {}
        self.spans: list[RequestSpan] = []
        self.transfer_failures: list[TransferFailed] = []
        self.uninformed: set[WorkerId] = set()               # whom news of members does not reach until `tell_late_news`
        self.late_news: list[tuple[Worker, Membership]] = []
        self._epoch = 0
        self._version = 0
        self._num_requests = 0
        for role, count in ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode)):
            for i in range(count):
                self.start(role, WorkerId(f"{role}-{i}"))
        self.publish()

    def start(self, role: Role, worker_id: WorkerId) -> None:
        self._epoch += 1
        name = f"{worker_id}.{self._epoch}"
        ranks = [self._transports(name, rank) for rank in range(self.num_ranks(role))]
        block_size = self.block_sizes[role]
        num_blocks = -(-self.num_blocks * BLOCK_SIZE // block_size)
        bundle, staging = self._bundle(ranks), None
        pool = bundle.allocate(self._layout(role, block_size), num_blocks)
        limits = EngineLimits(block_size, self.num_blocks * BLOCK_SIZE, self.max_step_tokens, max_sequences=4)
        engine = Engine(FakeRunner(pool) if self.tps is None else ShardedRunner(pool), num_blocks, limits)
        (transport, *others), *further = ranks
        others += [each for of_rank in further for each in of_rank]
        if block_size != BLOCK_SIZE:
            transport, *late = [LateTransport(self.fabric, f"{name}.{rank}.staging".encode()) for rank in range(len(ranks))]
            out = self._bundle([[each] for each in (transport, *late)])
            staging = Staging(pool, out.allocate(self._layout(role, BLOCK_SIZE), self.staging_blocks), out)
            others += late
        replica = Replica(engine, pool, bundle, layer_group=1, staging=staging)
        self.transports[worker_id], self.others[worker_id] = transport, others
        for each in (transport, *others):
            each.page_s = PAGE_S if self.floor else 0.0
        config = WorkerConfig("fake", worker_id, Epoch(self._epoch), EngineConfig("none"), handoff_timeout_s=TIMEOUT_S)
        if self.floor is not None:
            floor = {"min_gbps": self.floor.min_gbps, "refuse_below_floor": self.floor.refuse}
            config = msgspec.structs.replace(config, probe_links=True, **floor)
        make = PrefillWorker if role is Role.PREFILL else DecodeWorker
        self.workers[worker_id] = make(config, self.network.post(name), replica, clock=lambda: self.now)

    def num_ranks(self, role: Role) -> int:
        return 1 if self.tps is None else self.tps[role]

    def _transports(self, name: str, rank: int) -> list[FakeTransport]:
        own = f"{name}.{rank}" if rank else name
        first = LateTransport(self.fabric, own.encode())
        first.gathers = self.gathers
        return [first, *(LateTransport(self.fabric, f"{own}.{other}".encode(), other) for other in self.other_names)]

    def _bundle(self, ranks: list[list[FakeTransport]]) -> Bundle:
        bundles = [TransportBundle(transports) for transports in ranks]
        return bundles[0] if self.tps is None else ShardedBundle(bundles)

    def _layout(self, role: Role, block_size: int) -> KVLayout:
        if self.tps is None:
            return fake_layout(block_size, self.num_layers)
        return sharded_layout(self.num_ranks(role), block_size, self.num_layers)

    def transports_of(self, worker_id: WorkerId) -> list[FakeTransport]:
        """Of all its ranks."""
        return [self.transports[worker_id], *self.others[worker_id]]

    def publish(self) -> None:
        """All members learn who lives, at once: membership does not travel on the faulty network."""
        self._version += 1
        members = tuple(worker.member for worker in self.workers.values())
        membership = Membership(self._version, members, (self.gateway.address,), Epoch(self._epoch + 1))
        for worker_id, worker in self.workers.items():
            if worker_id in self.uninformed:
                self.late_news.append((worker, membership))
            else:
                worker.update_membership(membership)

    def tell_late_news(self) -> None:
        self.uninformed.clear()
        for worker, membership in self.late_news:
            worker.update_membership(membership)
        self.late_news.clear()

    def kill(self, worker_id: WorkerId) -> None:
        worker = self.workers.pop(worker_id)
        self.network.kill(worker.post.address)
        for transport in self.transports_of(worker_id):
            self.fabric.kill(transport.location)
        for answer in self.answers.values():
            route = answer.request.route
            if not answer.ended and worker.ref in (route.prefill, route.decode):
                answer.lost = True
                self._send_aborts(answer.request)

    def restart(self, worker_id: WorkerId) -> None:
        self.start(Role(worker_id.split("-")[0]), worker_id)
        self.publish()

    # the gateway

    def submit(self, prompt: list[int], max_tokens: int, prefill: str | None = "prefill-0", decode: str = "decode-0") -> Answer:
        self._num_requests += 1
        route = Route(self.workers[WorkerId(decode)].ref, self.workers[WorkerId(prefill)].ref if prefill else None)
        request = GenerateRequest(
            request_id=RequestId(f"r{self._num_requests}"),
            gateway=self.gateway.address,
            token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0),
            route=route,
            timeout_s=100.0,
        )
        self.answers[request.request_id] = answer = Answer(request)
        self.gateway.send(route.first.address, request)
        return answer

    def abort(self, answer: Answer) -> None:
        answer.aborted = True
        self._send_aborts(answer.request)

    def _send_aborts(self, request: GenerateRequest) -> None:
        for ref in (request.route.prefill, request.route.decode):
            if ref is not None:
                self.gateway.send(ref.address, Abort(request.request_id))

    def read_gateway(self) -> None:
        for message in self.gateway.receive(0):
            match message:
                case StepTokens():
                    for delta in message.deltas:
                        self._take(delta.request_id, delta.index, delta.token_ids, delta.finish)
                case RequestFailed():
                    answer = self.answers[message.request_id]
                    if not answer.ended:
                        answer.failure = message
                        self._send_aborts(answer.request)
                case RequestSpan():
                    self.spans.append(message)
                case TransferFailed():
                    self.transfer_failures.append(message)
                case LinkMeasured():
                    self.links.append(message)

    def _take(self, request_id: RequestId, index: int, token_ids: tuple[int, ...], finish: FinishReason | None) -> None:
        answer = self.answers[request_id]
        for offset, token_id in enumerate(token_ids):
            assert answer.tokens.setdefault(index + offset, token_id) == token_id, f"{request_id}: two tokens at {index + offset}"
        if finish is not None:
            answer.finish, answer.finish_index = finish, index + len(token_ids) - 1
        self.check(answer)

    def check(self, answer: Answer) -> None:
        """Every token that was delivered is the one a single correct engine would have sampled."""
        known = list(answer.request.token_ids)
        for index in sorted(answer.tokens):
            if index != len(known) - len(answer.request.token_ids):
                return                                       # a gap: what follows is checked once it is filled
            assert answer.tokens[index] == next_token(known, self.num_layers), f"{answer.request.request_id}: wrong token {index}"
            known.append(answer.tokens[index])

    # driving

    def turn(self, worker_id: WorkerId | None = None) -> None:
        for worker in [self.workers[worker_id]] if worker_id else list(self.workers.values()):
            worker.turn(0.0)
        self.read_gateway()

    def settle(self, seconds: float = 4.0) -> None:
        """No more faults: everything is delivered and time goes on until nothing is left to do, or for so long."""
        end = self.now + seconds
        while self.now < end:
            self.step()
            if self.is_quiet and self.idle:
                return

    def step(self) -> None:
        """Everything is delivered, all take a turn, and time goes on: by more when there is only a deadline to wait for."""
        self.network.deliver_all()
        self.fabric.land_all()
        self.turn()
        self.now += WAIT_S if self.is_quiet else STEP_S

    def one_thing_at_a_time(self, steps: int) -> None:
        """A turn, a message, a write, and so on: stopped anywhere, something is half done."""
        for step in range(steps):
            if step % 3 == 0:
                self.turn()
            elif step % 3 == 1 and self.network.in_flight:
                self.network.deliver()
            elif self.fabric.in_flight:
                self.fabric.land()

    @property
    def is_quiet(self) -> bool:
        """Nothing is on its way and nothing is computed."""
        computing = any(worker.engine.scheduler.running for worker in self.workers.values())
        return not self.network.in_flight and not self.fabric.in_flight and not computing

    @property
    def idle(self) -> bool:
        return not any(worker.engine.sequences or worker.num_handoffs() for worker in self.workers.values())

    def give_up_unanswered(self) -> None:
        """What a gateway does with a request that makes no progress: its tokens may have been lost on the way."""
        for answer in self.answers.values():
            if not answer.ended:
                self.abort(answer)

    def assert_nothing_leaked(self) -> None:
        for worker_id, worker in self.workers.items():
            pool = worker.engine.pool
            assert pool.num_free + pool.num_cached == pool.num_blocks, f"{worker_id}: {pool.num_held} of {pool.num_blocks} blocks leaked"
            assert worker.num_handoffs() == 0, f"{worker_id}: {worker.num_handoffs()} handoffs left"
            assert not worker.engine.sequences, f"{worker_id}: {len(worker.engine.sequences)} sequences left"
            reserved = worker.engine.scheduler.num_reserved
            assert reserved == 0, f"{worker_id}: {reserved} places kept for handoffs that have ended"
            if (staging := worker.replica.staging) is not None:
                num_pages = staging.pool.num_blocks * staging.layout.num_layers
                assert staging.num_free == num_pages, f"{worker_id}: {num_pages - staging.num_free} of {num_pages} staging pages leaked"


def addresses(cluster: FakeCluster) -> list[Address]:
    return [worker.post.address for worker in cluster.workers.values()]
