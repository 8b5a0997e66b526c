"""The failures of today's systems that the KV transfer can cause, each provoked between real processes: on `shm`, on `ucx`, and between two
GPUs on `nvlink`.

Asserted each time: no wrong token (the harness checks every one), no leak (`assert_whole`: free + cached = total), no hang (every wait
has a limit), the survivor is the same process as before, and recovery within 5 s. Those of routing and of the front end have their tests
in tests/unit/cluster, those of the wire in tests/unit/messages.
"""

import logging
import signal
from collections.abc import Iterator

import pytest
import torch
from harness.fake_cluster import FakeCluster
from harness.process_cluster import BLOCK_SIZE, ProcessCluster, process_cluster
from harness.ucx import needs_ucx
from harness.ucx_peer import byte_layout, ucx_peer

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.transport import connect_within
from diptych.kvtransfer.ucx.transport import UcxTransport
from diptych.messages.ids import WorkerId

RECOVERY_S = 5.0
LIMIT_S = 30.0
PAIR = ("prefill-0", "decode-0")


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(params=["shm", pytest.param("ucx", marks=needs_ucx), pytest.param("nvlink", marks=[pytest.mark.gpu2, TWO_GPUS])])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[BLOCK_SIZE, 6], ids=["equal", "converted"])
def pair(transport: str, request: pytest.FixtureRequest) -> Iterator[ProcessCluster]:
    """Between pools of equal layouts, and of different ones."""
    with process_cluster(transport, *PAIR, prefill_block_size=request.param) as cluster:
        yield cluster


def prompt(seed: int, num_tokens: int = 30) -> list[int]:
    return torch.randint(0, 900, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(cluster: ProcessCluster, num_requests: int, **options: bool) -> None:
    for seed in range(num_requests):
        cluster.submit(prompt(seed), max_tokens=6, **options)


def some_tokens(cluster: ProcessCluster) -> bool:
    return any(answer.outputs for answer in cluster.answers)


@pytest.mark.parametrize("victim", PAIR)
@pytest.mark.parametrize("round_", range(2))
def test_a_peers_restart_crashes_or_wedges_the_survivor(pair: ProcessCluster, victim: str, round_: int) -> None:
    """vllm #49238, #58063; smg #2382, #2503"""
    survivor = next(name for name in PAIR if name != victim)
    pid = pair.workers[survivor].process.pid
    load(pair, 8 + 4 * round_)
    pair.pump(lambda: some_tokens(pair), LIMIT_S)
    pair.kill(victim)
    pair.workers[survivor].books()                       # it answers while its peer is dead
    pair.start(victim)
    pair.finish(LIMIT_S)
    late = pair.submit(prompt(99), max_tokens=3)
    pair.finish(RECOVERY_S)
    assert len(late.outputs) == 3
    assert not late.failures
    assert (pair.workers[survivor].process.pid, pair.workers[survivor].process.is_alive()) == (pid, True)
    pair.assert_whole()


def test_garbage_after_a_failed_expired_or_stale_transfer(pair: ProcessCluster) -> None:
    """vllm #52234; sglang #17259, #22716, #24527, #30233: blocks that were given up in mid-transfer serve others at once."""
    load(pair, 6)
    pair.pump(lambda: some_tokens(pair), LIMIT_S)
    for answer in pair.answers[::2]:
        pair.abort(answer)                               # its pages may still be under way
    pair.kill("prefill-0")
    pair.start("prefill-0")                              # and the decode worker meets an epoch that it has not seen
    for seed in range(20, 32):
        pair.submit(prompt(seed, 60), max_tokens=4)
    pair.finish(LIMIT_S)
    assert all(len(answer.outputs) == 4 for answer in pair.answers[6:])
    pair.assert_whole()


def test_blocks_leak_after_abort_or_reject(pair: ProcessCluster) -> None:
    """vllm #41269, #29987, #46283; dynamo #7489, #13691, #14507"""
    for round_ in range(4):
        load(pair, 6)
        pair.pump(lambda: some_tokens(pair), LIMIT_S)
        for answer in pair.answers[-6 + round_ :]:
            pair.abort(answer)
    refused = pair.submit(prompt(1, 400), max_tokens=3, retries=False)           # more than the pool holds
    pair.finish(LIMIT_S)
    assert refused.failures
    pair.assert_whole()


def test_one_failed_transfer_blacklists_a_peer_for_ever(pair: ProcessCluster) -> None:
    """sglang #23272, #37022: a decode worker that stood still for longer than every deadline is used again, and nobody was restarted."""
    pids = [worker.process.pid for worker in pair.workers.values()]
    first = pair.submit(prompt(1), max_tokens=3)
    pair.finish(LIMIT_S)
    assert len(first.outputs) == 3
    pair.signal("decode-0", signal.SIGSTOP)
    lost = [pair.submit(prompt(seed), max_tokens=3, retries=False) for seed in range(2, 5)]
    pair.finish(LIMIT_S)
    assert all(answer.failures for answer in lost)
    pair.signal("decode-0", signal.SIGCONT)
    late = pair.submit(prompt(9), max_tokens=3)
    pair.finish(RECOVERY_S)
    assert len(late.outputs) == 3
    assert [worker.process.pid for worker in pair.workers.values()] == pids
    pair.assert_whole()


@pytest.mark.parametrize("victim", PAIR)
def test_requests_hang(pair: ProcessCluster, victim: str) -> None:
    """dynamo #13088, #11914, #13559: with a worker dead and none in its place each request ends, and a later worker serves anew."""
    load(pair, 6, retries=False)
    pair.pump(lambda: some_tokens(pair), LIMIT_S)
    pair.kill(victim)
    pair.finish(RECOVERY_S)
    pair.assert_whole(RECOVERY_S)
    pair.start(victim)
    late = pair.submit(prompt(50), max_tokens=3)
    pair.finish(RECOVERY_S)
    assert len(late.outputs) == 3
    pair.assert_whole()


@needs_ucx
def test_a_silent_fall_back_to_tcp(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """vllm #52607, #26382; nixl #1097"""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    transport = UcxTransport()
    transport.allocate(byte_layout(4096), 8)
    with ucx_peer(4096, 8) as far, caplog.at_level(logging.WARNING):
        connect_within(transport, far.descriptor, 5.0)
    transport.close()
    assert [record.levelname for record in caplog.records if "lanes tcp/" in record.getMessage()] == ["WARNING"]


def test_descriptors_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm #50913, #55434 (112k descriptors for one transfer): one write for each chunk and layer group, however many pages."""
    cluster, sizes = FakeCluster(num_blocks=32, max_step_tokens=32), []
    write_pages = FakeTransport.write_pages

    def counted(self: FakeTransport, peer: object, src: list[int], dst: list[int], imm: int) -> None:
        sizes.append(len(src))
        write_pages(self, peer, src, dst, imm)

    monkeypatch.setattr(FakeTransport, "write_pages", counted)
    answer = cluster.submit(list(range(120)), max_tokens=2)
    cluster.settle()
    assert answer.complete
    num_layers = cluster.workers[WorkerId("decode-0")].replica.pool.layout.num_layers
    assert sum(sizes) == 30 * num_layers
    assert len(sizes) <= 4 * num_layers + 1
    cluster.assert_nothing_leaked()
