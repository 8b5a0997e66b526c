"""Clusters that measure their links: for how long they run, what happens to them, and what they should find."""

import random
from collections.abc import Mapping, Sequence

from harness.fake_cluster import PAGE_S, TIMEOUT_S, FakeCluster

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


def happen(
    cluster: FakeCluster, choose: random.Random, weights: Mapping[str, int], pauses: Sequence[float] = (0.1, TIMEOUT_S + 0.1)
) -> str:
    """One of the events with these weights → which. What is not known here is the caller's to do."""
    letters, writes = len(cluster.network.in_flight), len(cluster.fabric.in_flight)
    [event] = choose.choices(list(weights), list(weights.values()))
    match event:
        case "turn":
            cluster.turn()
        case "deliver" if letters:
            cluster.network.deliver(choose.randrange(letters))
        case "drop" if letters:
            cluster.network.drop(choose.randrange(letters))
        case "double" if letters:
            cluster.network.double(choose.randrange(letters))
        case "land" if writes:
            cluster.fabric.land(choose.randrange(writes))
        case "time":
            cluster.now += choose.choice(pauses)
        case "kill":
            victim = choose.choice(list(cluster.workers))
            cluster.kill(victim)
            cluster.restart(victim)
        case "submit":
            cluster.submit(PROMPT[: choose.randint(1, 20)], max_tokens=3)
    return event


def end_of_faults(cluster: FakeCluster) -> None:
    """What messages were lost for ends by its deadline, and nothing has leaked."""
    for pause in (TIMEOUT_S + 1, TIMEOUT_S + 1, 200.0):
        cluster.now += pause
        run(cluster, 2)
        cluster.give_up_unanswered()
        run(cluster, 2)
    cluster.assert_nothing_leaked()
