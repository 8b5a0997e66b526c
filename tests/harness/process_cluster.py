"""Real workers in processes of their own, on ZeroMQ and a real transport; the test is their controller and gateway, and kills them.

The model is `FakeRunner`: each of its tokens depends on all KV that it reads, so a wrong page anywhere shows as a wrong token.
Over `nvlink` the pools are in GPU memory: prefill workers see the first GPU alone, decode workers the second.
"""

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import NamedTuple
from uuid import uuid4

import torch
from harness.nvlink_peer import visible_gpu

from diptych.decode_worker.worker import DecodeWorker
from diptych.engine.config import EngineConfig, WorkerConfig
from diptych.engine.engine import Engine, EngineLimits
from diptych.engine.fake_runner import FakeRunner, fake_layout, next_token
from diptych.engine.replica import Replica
from diptych.engine.worker import Worker
from diptych.kvtransfer.selection import Owner, make_transports
from diptych.kvtransfer.staging import Staging
from diptych.messages.ids import Epoch, RequestId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import Abort, GenerateRequest, LinkMeasured, RequestFailed, Route, SamplingParams, StepTokens
from diptych.messages.zmq_post import Keyring, ZmqPost
from diptych.prefill_worker.worker import PrefillWorker

BLOCK_SIZE, NUM_BLOCKS, STAGING_BLOCKS = 4, 64, 2
ANSWER_TIMEOUT_S = 20.0


class Books(NamedTuple):
    num_held: int                             # blocks neither free nor cached
    num_handoffs: int
    num_sequences: int


def make_worker(config: WorkerConfig, role: Role, post: ZmqPost) -> Worker:
    device = "cuda" if "nvlink" in config.transports else "cpu"
    if device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(list(Role).index(role))          # CUDA has not been started yet
    transport = make_transports(config.transports, Owner(config.cluster, config.worker_id, config.epoch, device))
    block_size = config.engine.block_size
    num_blocks = NUM_BLOCKS * BLOCK_SIZE // block_size
    pool = transport.allocate(fake_layout(block_size), num_blocks)
    limits = EngineLimits(block_size, num_blocks * block_size, max_step_tokens=16, max_sequences=8)
    staging = None
    if role is Role.PREFILL and block_size != BLOCK_SIZE:
        outbound = make_transports(config.transports, Owner(config.cluster, f"{config.worker_id}.staging", config.epoch, device))
        staging = Staging(pool, outbound.allocate(fake_layout(BLOCK_SIZE), STAGING_BLOCKS), outbound)
    replica = Replica(Engine(FakeRunner(pool), num_blocks, limits), pool, transport, layer_group=1, staging=staging)
    return (PrefillWorker if role is Role.PREFILL else DecodeWorker)(config, post, replica)


def serve(pipe: Connection, config: WorkerConfig, role: Role, keyring: Keyring) -> None:
    torch.set_num_threads(1)
    worker = make_worker(config, role, ZmqPost(keyring))
    pipe.send(worker.member)
    while True:
        worker.turn(0.001)
        while pipe.poll():
            match pipe.recv():
                case Membership() as membership:
                    worker.update_membership(membership)
                case "books":
                    pool = worker.engine.pool
                    pipe.send(Books(pool.num_held, worker.num_handoffs(), len(worker.engine.sequences)))
                case "close":
                    worker.close()
                    worker.post.close()
                    return


class WorkerProcess:
    def __init__(self, config: WorkerConfig, role: Role, keyring: Keyring) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["diptych.prefill_worker.worker", "diptych.decode_worker.worker", "diptych.messages.zmq_post"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, config, role, keyring), daemon=True)
        self.process.start()
        self.member: Member = self.answer()

    def answer(self) -> object:
        assert wait([self.pipe, self.process.sentinel], ANSWER_TIMEOUT_S), f"no answer in {ANSWER_TIMEOUT_S} s"
        assert self.pipe.poll(), f"the process has ended: exit code {self.process.exitcode}"
        return self.pipe.recv()

    def books(self) -> Books:
        self.pipe.send("books")
        answer = self.answer()
        assert isinstance(answer, Books)
        return answer


@dataclass
class Answer:
    """A request as its client sees it; a new attempt has a new id."""

    prompt: list[int]
    max_tokens: int
    outputs: list[int] = field(default_factory=list)
    request_id: RequestId | None = None       # of the attempt under way
    route: Route | None = None
    ended: bool = False
    failures: list[str] = field(default_factory=list)
    retries: bool = True
    early: dict[int, int] = field(default_factory=dict)       # tokens 0 and 1 come from different workers, in any order
    last: int | None = None                   # index of the last token


class ProcessCluster:
    def __init__(self, transports: tuple[str, ...], timeout_s: float, probe_links: bool, prefill_block_size: int) -> None:
        self.name = f"test{uuid4().hex[:8]}"
        self.transports, self.timeout_s = transports, timeout_s
        self.keyring = Keyring.new()
        self.gateway = ZmqPost(self.keyring)
        self.workers: dict[str, WorkerProcess] = {}
        self.answers: list[Answer] = []
        self.links: list[LinkMeasured] = []
        self._probe_links = probe_links
        self._block_sizes = {Role.PREFILL: prefill_block_size, Role.DECODE: BLOCK_SIZE}
        self._epoch = self._version = self._num_requests = 0

    def start(self, *names: str) -> None:
        for name in names:
            self._epoch += 1
            role = Role(name.split("-")[0])
            config = WorkerConfig(
                cluster=self.name,
                worker_id=WorkerId(name),
                epoch=Epoch(self._epoch),
                engine=EngineConfig("none", block_size=self._block_sizes[role]),
                transports=self.transports,
                handoff_timeout_s=self.timeout_s,
                probe_links=self._probe_links,
            )
            self.workers[name] = WorkerProcess(config, role, self.keyring)
        self.publish()

    def publish(self) -> None:
        self._version += 1
        members = tuple(worker.member for worker in self.workers.values())
        membership = Membership(self._version, members, (self.gateway.address,), Epoch(self._epoch + 1))
        for worker in self.workers.values():
            worker.pipe.send(membership)

    def signal(self, name: str, number: signal.Signals) -> None:
        pid = self.workers[name].process.pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self, name: str) -> None:
        """And confirms the death to all; what went that way is tried anew once there is a route."""
        self.signal(name, signal.SIGKILL)
        dead = self.workers.pop(name)
        dead.process.join(10.0)
        self.publish()
        for answer in [a for a in self.answers if a.route is not None and dead.member.ref in (a.route.prefill, a.route.decode)]:
            self._give_up(answer, "died")

    def submit(self, prompt: list[int], max_tokens: int, retries: bool = True) -> Answer:
        answer = Answer(prompt, max_tokens, retries=retries)
        self.answers.append(answer)
        return answer

    def abort(self, answer: Answer) -> None:
        answer.ended = True
        self._abort_attempt(answer)

    def _abort_attempt(self, answer: Answer) -> None:
        if answer.route is not None and answer.request_id is not None:
            for ref in (answer.route.prefill, answer.route.decode):
                if ref is not None:
                    self.gateway.send(ref.address, Abort(answer.request_id))
        answer.request_id = answer.route = answer.last = None
        answer.early.clear()

    def _give_up(self, answer: Answer, text: str) -> None:
        answer.failures.append(text)
        self._abort_attempt(answer)
        answer.ended = answer.ended or not answer.retries

    def _send(self, answer: Answer) -> None:
        """Prompt and delivered tokens to a route of those that live; the answers take turns."""
        roles = {role: [w.member.ref for name, w in self.workers.items() if name.startswith(role)] for role in Role}
        if not all(roles.values()):
            return
        self._num_requests += 1
        turn = self._num_requests
        answer.request_id = RequestId(f"r{turn}")
        answer.route = Route(*(roles[role][turn % len(roles[role])] for role in (Role.DECODE, Role.PREFILL)))
        request = GenerateRequest(
            request_id=answer.request_id,
            gateway=self.gateway.address,
            token_ids=(*answer.prompt, *answer.outputs),
            sampling=SamplingParams(max_tokens=answer.max_tokens, seed=1, temperature=0.0),
            route=answer.route,
            timeout_s=30.0,
            num_prior_outputs=len(answer.outputs),
        )
        self.gateway.send(answer.route.first.address, request)

    def pump(self, until: Callable[[], bool], timeout_s: float) -> float:
        """The gateway's loop, until the condition holds; returns the seconds that took."""
        started = time.monotonic()
        while not until():
            assert time.monotonic() < started + timeout_s, f"not within {timeout_s} s: {[a for a in self.answers if not a.ended]}"
            for answer in self.answers:
                if not answer.ended and answer.request_id is None:
                    self._send(answer)
            for message in self.gateway.receive(0.01):
                match message:
                    case StepTokens():
                        for delta in message.deltas:
                            self._take(delta.request_id, delta.index, delta.token_ids, delta.finish is not None)
                    case LinkMeasured():
                        self.links.append(message)
                    case RequestFailed():
                        for answer in [a for a in self.answers if a.request_id == message.request_id]:
                            self._give_up(answer, f"{message.kind}: {message.message}")
        return time.monotonic() - started

    def _take(self, request_id: RequestId, index: int, token_ids: tuple[int, ...], finished: bool) -> None:
        for answer in [a for a in self.answers if a.request_id == request_id]:
            answer.early |= {index + offset: token_id for offset, token_id in enumerate(token_ids)}
            if finished:
                answer.last = index + len(token_ids) - 1
            while len(answer.outputs) in answer.early:
                token_id = answer.early.pop(len(answer.outputs))
                assert token_id == next_token([*answer.prompt, *answer.outputs]), f"wrong token {len(answer.outputs)}: {answer}"
                answer.outputs.append(token_id)
            answer.ended = answer.last is not None and len(answer.outputs) > answer.last

    def finish(self, timeout_s: float) -> float:
        return self.pump(lambda: all(answer.ended for answer in self.answers), timeout_s)

    def assert_whole(self, timeout_s: float = 10.0) -> None:
        """free + cached = total, no handoff and no sequence is left, on every worker."""
        self.pump(lambda: all(worker.books() == Books(0, 0, 0) for worker in self.workers.values()), timeout_s)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.pipe.send("close")
        for worker in self.workers.values():
            worker.process.join(10.0)
            worker.process.kill()
        self.gateway.close()


@contextmanager
def process_cluster(
    transports: str, *names: str, timeout_s: float = 2.0, probe_links: bool = False, prefill_block_size: int = BLOCK_SIZE
) -> Iterator[ProcessCluster]:
    """`transports`: one, or several with commas. Prefill workers with blocks of another size convert pages in STAGING_BLOCKS."""
    cluster = ProcessCluster(tuple(transports.split(",")), timeout_s, probe_links, prefill_block_size)
    try:
        cluster.start(*names)
        yield cluster
    finally:
        cluster.close()
