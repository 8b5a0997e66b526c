"""Clusters that measure their links: for how long they run, and what they should find."""

from harness.fake_cluster import PAGE_S, FakeCluster

from diptych.messages.ids import WorkerId
from diptych.prefill_worker.probe import Floor

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
NO_FLOOR = Floor(0.0, refuse=True)
PROMPT = list(range(20))


def run(cluster: FakeCluster, seconds: float = 0.5) -> None:
    end = cluster.now + seconds
    while cluster.now < end:
        cluster.step()


def gbps(cluster: FakeCluster) -> float:
    return cluster.transports[PREFILL].pool.layout.page_bytes / PAGE_S / 1e9
