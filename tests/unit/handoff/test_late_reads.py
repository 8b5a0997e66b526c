"""Pages are read when they leave, not when they are written: what a write may still read is not computed over.

All fake transports read late. Here the writer gives a handoff up once it has announced it, and needs the memory at once.
"""

import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster

from diptych.messages.ids import WorkerId
from diptych.messages.requests import Abort, FailureKind

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
PROMPT = list(range(20))


@pytest.mark.parametrize("gives_up", ["abort", "deadline"])
def test_a_handoff_that_was_announced_and_given_up_is_served_right_or_not_at_all(gives_up: str) -> None:
    cluster = FakeCluster(num_blocks=6, max_step_tokens=64)
    answer = cluster.submit(PROMPT, max_tokens=4)
    for worker_id in (PREFILL, DECODE, PREFILL):                      # the offer, the accept, all pages and the announcement
        cluster.network.deliver_all()
        cluster.turn(worker_id)
    assert len(cluster.fabric.in_flight) == 1
    cluster.network.deliver_all()
    if gives_up == "abort":                                           # the decode worker has not heard of it yet
        cluster.gateway.send(cluster.workers[PREFILL].ref.address, Abort(answer.request.request_id))
        cluster.network.deliver_all()
    else:
        cluster.now += TIMEOUT_S + 0.01
    other = cluster.submit([900 - i for i in range(20)], max_tokens=1)
    cluster.network.deliver_all()
    for _ in range(3):
        cluster.turn(PREFILL)
    assert not other.tokens, "its KV would be in blocks that are being read"
    cluster.fabric.land_all()
    cluster.workers[DECODE].turn(0.0)                                 # counted as announced: it goes on
    cluster.settle()
    assert other.complete
    again = cluster.submit([*PROMPT, 1, 2], max_tokens=3, prefill=None)
    cluster.settle()
    assert again.complete, "from the prefix cache"                    # and right: the cluster checks each token
    cluster.give_up_unanswered()
    cluster.settle()
    cluster.assert_nothing_leaked()


def test_pages_that_leave_one_by_one_renew_the_writers_deadline() -> None:
    """Half a minute in all, two seconds each; nobody is told that it takes too long."""
    cluster = FakeCluster(max_step_tokens=8, prefill_block_size=8, staging_blocks=1)
    answer = cluster.submit(list(range(60)), max_tokens=3)
    began = cluster.now
    while not answer.ended and cluster.now < began + 90:
        cluster.network.deliver_all()
        if cluster.fabric.in_flight:
            cluster.fabric.land()
        cluster.turn()
        cluster.now += 2.0
    assert cluster.now > began + 2 * TIMEOUT_S
    assert answer.complete
    assert [each.kind for each in [answer.failure] if each is not None] == list[FailureKind]()
