"""Handoffs between pools of different block sizes: everything that holds for equal ones, and the staging pages beside it."""

from harness.fake_cluster import FakeCluster

PROMPT = list(range(20))


def test_thin() -> None:
    for size in (1, 2, 3, 6, 8, 16):
        for staging in (1, 2, 40):
            cluster = FakeCluster(prefill_block_size=size, staging_blocks=staging)
            for n in (1, 3, 4, 7, 20, 33):
                answer = cluster.submit(list(range(n)), max_tokens=3)
                cluster.settle(10)
                assert answer.complete, (size, staging, n, answer)
            cluster.assert_nothing_leaked()
