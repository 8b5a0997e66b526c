"""A sequence that was preempted comes before handoffs that have not begun: new prompts must not starve it."""

from harness.fake_cluster import FakeCluster

from diptych.messages.ids import WorkerId


def test_a_preempted_sequence_gets_its_memory_back_first() -> None:
    cluster = FakeCluster()
    decode = cluster.workers[WorkerId("decode-0")]
    long = [cluster.submit([n] * 20, max_tokens=24, prefill=None) for n in (1, 2)]      # 11 of 16 blocks each
    while not decode.num_preempted:
        cluster.network.deliver_all()
        cluster.turn()
    late = cluster.submit([3, 4, 5, 6], max_tokens=3)
    num_turns = 0
    while decode.engine.scheduler.waiting:
        cluster.network.deliver_all()
        cluster.fabric.land_all()
        cluster.turn()
        num_turns += 1
        assert set(late.tokens) <= {0}, "decoded while an older sequence waited for memory"
    assert num_turns > 4, "it did not wait"
    cluster.settle()
    assert late.complete
    assert all(answer.complete for answer in long)
    cluster.assert_nothing_leaked()
