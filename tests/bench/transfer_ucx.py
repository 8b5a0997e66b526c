"""Pages between two processes of this host, ours over UCX beside NIXL where that is installed: GB/s until the receiver knows of all.

    PYTHONPATH=tests python tests/bench/transfer_ucx.py [--pages 65536x1024 4096x8192] [--rounds 10]

Pages are scattered: page i goes to place p[i] of a random permutation. Ours is timed from `write_pages` until the receiver's counter is
full; NIXL from `transfer` on a prepared request (the preparation is not counted) until its notification is seen; both look every 100 µs.
The two take turns, twice, and never run at the same time: a waiting NIXL agent keeps a core busy.
"""

import argparse
import multiprocessing as mp
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from harness.ucx_peer import byte_layout, ucx_peer

from diptych.kvtransfer.transport import connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.ids import Imm

NIXL_PACKAGES = ("nixl_cu13", "nixl_cu12")
TIMEOUT_S = 60.0
LOOK_S = 1e-4


@dataclass(frozen=True)
class Case:
    page_bytes: int
    num_pages: int

    @property
    def num_bytes(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def order(self) -> list[int]:
        return random.Random(1).sample(range(self.num_pages), self.num_pages)


def ours(case: Case, pipe: Connection) -> None:
    """The writing process: answers each "go" with the seconds of a round, and has its receiver as a child."""
    torch.set_num_threads(1)
    transport = UcxTransport()
    transport.allocate(byte_layout(case.page_bytes), case.num_pages)
    with ucx_peer(case.page_bytes, case.num_pages) as receiver:
        peer = connect_within(transport, receiver.descriptor, TIMEOUT_S)
        pipe.send("ready")
        while pipe.recv() == "go":
            receiver.call("reset", 0)
            receiver.tell("landed_at", 0, case.num_pages, TIMEOUT_S)
            time.sleep(0.01)
            started = time.monotonic()
            transport.write_pages(peer, range(case.num_pages), case.order, Imm(0))
            landed_at = receiver.answer()
            assert isinstance(landed_at, float)
            transport.stop(peer, Imm(0), TIMEOUT_S)
            pipe.send(landed_at - started)
    transport.close()


def nixl_module() -> Any:
    name = next(name for name in NIXL_PACKAGES if find_spec(name))
    return __import__(name)


def nixl_pool(agent: Any, case: Case) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    pool = torch.zeros(case.num_bytes, dtype=torch.uint8)
    agent.register_memory(pool)
    return pool, [(pool.data_ptr() + i * case.page_bytes, case.page_bytes, 0) for i in range(case.num_pages)]


def nixl_receiver(case: Case, pipe: Connection) -> None:
    agent = nixl_module().nixl_agent("receiver")
    pool, pages = nixl_pool(agent, case)
    pipe.send((agent.get_agent_metadata(), pages))
    while pipe.recv() == "go":
        while not any(agent.get_new_notifs().values()):
            time.sleep(LOOK_S)
        pipe.send(time.monotonic())
    del pool


def nixl(case: Case, pipe: Connection) -> None:
    torch.set_num_threads(1)
    context = mp.get_context("spawn")
    to_receiver, theirs = context.Pipe()
    receiver = context.Process(target=nixl_receiver, args=(case, theirs))
    receiver.start()
    agent = nixl_module().nixl_agent("writer")
    pool, pages = nixl_pool(agent, case)
    metadata, remote_pages = to_receiver.recv()
    remote = agent.add_remote_agent(metadata)
    here = agent.prep_xfer_dlist("NIXL_INIT_AGENT", pages, "DRAM")
    there = agent.prep_xfer_dlist(remote, remote_pages, "DRAM")
    pipe.send("ready")
    while pipe.recv() == "go":
        to_receiver.send("go")
        time.sleep(0.01)
        request = agent.make_prepped_xfer("WRITE", here, list(range(case.num_pages)), there, case.order, b"all")
        started = time.monotonic()
        state = agent.transfer(request)
        while state == "PROC":
            time.sleep(LOOK_S)
            state = agent.check_xfer_state(request)
        assert state == "DONE", state
        pipe.send(to_receiver.recv() - started)
        agent.release_xfer_handle(request)
    to_receiver.send("stop")
    receiver.join(TIMEOUT_S)
    del pool


def measure(contestant: Callable[[Case, Connection], None], case: Case, num_rounds: int) -> list[float]:
    """GB/s of each round, after two that warm up."""
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=contestant, args=(case, theirs))
    process.start()
    answer(pipe)
    rates = []
    for _ in range(num_rounds + 2):
        pipe.send("go")
        rates.append(case.num_bytes / answer(pipe) / 1e9)
    pipe.send("stop")
    process.join(TIMEOUT_S)
    return rates[2:]


def answer(pipe: Connection) -> Any:
    assert pipe.poll(TIMEOUT_S), f"no answer within {TIMEOUT_S} s"
    return pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pages", nargs="+", default=["65536x1024", "4096x8192"], help="BYTESxNUMBER")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with_nixl = any(find_spec(name) for name in NIXL_PACKAGES)
    if not with_nixl:
        print("NIXL is not installed (nixl-cu13 or nixl-cu12): ours alone")
    print(f"{'pages':>16}  {'':8}  {'median':>7}  {'best':>7}  {'worst':>7}  GB/s")
    for text in arguments.pages:
        page_bytes, num_pages = (int(part) for part in text.split("x"))
        case = Case(page_bytes, num_pages)
        contestants = {"ours": ours} | ({"NIXL": nixl} if with_nixl else {})
        figures: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(2):
            for name, contestant in contestants.items():
                figures[name] += measure(contestant, case, arguments.rounds)
        for name, rates in figures.items():
            print(f"{text:>16}  {name:8}  {median(rates):7.2f}  {max(rates):7.2f}  {min(rates):7.2f}")


if __name__ == "__main__":
    main()
