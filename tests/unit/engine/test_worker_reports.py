"""What a worker tells of itself, and when: heartbeats, its load and status, what others need to know of it."""

import pytest
from harness.fake_cluster import FakeCluster
from harness.worker_turns import ROLES, ask, in_flight, route_to, turn

from diptych.engine.engine import MAX_GATEWAYS
from diptych.engine.urgency import BATCH_PATIENCE_S
from diptych.engine.worker import Worker
from diptych.messages.ids import Address
from diptych.messages.membership import Membership
from diptych.messages.requests import NO_FILLING, FillingLoad, LoadUpdate, Route, ServiceClass
from diptych.messages.steps import StepFeatures

# Heartbeats

def heartbeats(cluster: FakeCluster, worker: Worker, pause_s: float, num_turns: int) -> int:
    num_beats = 0
    for _ in range(num_turns):
        cluster.now += pause_s
        worker.turn(0.0)
        num_beats += len(in_flight(cluster, LoadUpdate))
        cluster.network.in_flight.clear()
    return num_beats


@pytest.mark.parametrize(("pause_s", "num_turns", "expected"), [(0.01, 1000, 200), (0.001, 1000, 20), (1.0, 10, 10)])
def test_heartbeats_come_at_the_rate_and_no_faster(
    cluster: FakeCluster, worker: Worker, pause_s: float, num_turns: int, expected: int
) -> None:
    """heartbeat_s is 0.05; a loop that turns more slowly beats once a turn."""
    heartbeats(cluster, worker, 1.0, 1)
    assert heartbeats(cluster, worker, pause_s, num_turns) == pytest.approx(expected, rel=0.2)


def test_heartbeats_go_to_every_gateway_and_to_no_other(cluster: FakeCluster, worker: Worker) -> None:
    gateways = (Address("fake://g1"), Address("fake://g2"))
    worker.update_membership(Membership(99, worker.membership.workers, gateways))
    cluster.now += 1
    worker.turn(0.0)
    sent = [(letter.to, letter.message) for letter in cluster.network.in_flight]
    assert sent == [(gateway, LoadUpdate(worker.status().load)) for gateway in gateways]


def test_an_idle_loop_wakes_for_its_next_heartbeat(cluster: FakeCluster, worker: Worker) -> None:
    """Also after a message woke it in between: or beats would come at half the rate."""
    worker.turn(0.0)
    heartbeat_s = worker.config.heartbeat_s
    assert worker.idle_wait_s() == pytest.approx(heartbeat_s)
    cluster.now += 0.8 * heartbeat_s
    worker.turn(0.0)
    assert worker.idle_wait_s() == pytest.approx(0.2 * heartbeat_s)
    cluster.now += heartbeat_s
    assert worker.idle_wait_s() == 0.0


# What they tell

def test_load_and_status_count_what_is_there(cluster: FakeCluster) -> None:
    decode = cluster.workers[ROLES[1]]
    for i in range(6):
        ask(cluster, Route(decode.ref), f"r{i}", prompt=[i] * 10)
    turn(cluster, decode)
    load = decode.load()
    assert (load.num_waiting, load.num_running) == (5, 1)       # a step takes 8 tokens
    assert load.num_waiting_tokens == 5 * 10 + 2
    assert load.last_read == (("r5", 0.0),)
    assert (load.num_blocks, load.num_free_blocks, load.block_size) == (16, 13, 4)
    decode.turn(0.0)
    cluster.now += 1                                            # the heartbeat comes in the middle of the third step
    decode.turn(0.0)
    status = decode.status()
    assert (status.num_steps, status.num_tokens_computed) == (2, 16)
    assert status.load.worker == decode.ref
    assert status.load.last_read == (("r5", 1.0),)


def test_batch_work_is_told_apart(cluster: FakeCluster) -> None:
    """Decoding, and on its way here; what a prefill worker hands over is nothing to it. A step holds 8 tokens: one answer is ahead."""
    prefill, decode = (cluster.workers[role] for role in ROLES)
    for name, kind in (("one", ServiceClass.BATCH), ("four", ServiceClass.BATCH), ("seven", ServiceClass.DEFAULT)):
        ask(cluster, Route(decode.ref), name, prompt=[len(name)] * 4, service_class=kind)
    turn(cluster, decode)
    turn(cluster, decode)
    assert decode.load().filling == FillingLoad(num_requests=2, num_decoding=2, decode_context=11, num_blocks=3)
    assert decode.load().work == StepFeatures(num_decoding=1, decode_context=6)
    ask(cluster, Route(decode.ref, prefill.ref), "handed over", service_class=ServiceClass.BATCH)
    turn(cluster, prefill)
    turn(cluster, decode)
    assert (prefill.load().num_passing, prefill.load().filling) == (2, NO_FILLING)
    assert (decode.load().num_reserved, decode.load().filling.num_requests) == (1, 3)
    cluster.now += BATCH_PATIENCE_S
    assert decode.load().filling.num_blocks == 0, "it gives memory to nobody any more"


def test_a_prefill_worker_tells_what_it_will_hand_over_from_what_it_serves_by_itself(cluster: FakeCluster) -> None:
    prefill = cluster.workers[ROLES[0]]
    ask(cluster, route_to(cluster, prefill), "handed over")
    ask(cluster, Route(prefill.ref), "by itself")
    cluster.network.deliver_all()
    prefill.turn(0.0)
    load = prefill.load()
    assert (load.num_waiting + load.num_running, load.num_reserved, load.num_passing) == (2, 1, 2), "one runs and is offered"


def test_a_load_tells_each_gateway_what_of_it_was_read(cluster: FakeCluster, worker: Worker) -> None:
    for name, gateway in (("a", "fake://one"), ("b", "fake://two"), ("c", "fake://one"), ("d", "fake://three")):
        cluster.now += 1
        ask(cluster, route_to(cluster, worker), name, gateway=gateway)
        turn(cluster, worker)
    assert worker.load().last_read == (("b", 2.0), ("c", 1.0), ("d", 0.0))
    for number in range(MAX_GATEWAYS):
        ask(cluster, route_to(cluster, worker), str(number), gateway=f"fake://{number}")
        turn(cluster, worker)
    assert worker.load().last_read == tuple((str(number), 0.0) for number in range(MAX_GATEWAYS)), "gateways that are gone are forgotten"


def test_what_prompts_may_take_is_counted_from_the_end_of_the_steps_under_way(cluster: FakeCluster, worker: Worker) -> None:
    pacer = worker.engine.scheduler.pacer
    assert pacer is not None
    assert pacer._busy_s(cluster.now) == 0.0
    worker._steps.launched(StepFeatures(prefill_tokens=1000), cluster.now)
    assert pacer._busy_s(cluster.now) == pytest.approx(worker._steps.model.step_s(StepFeatures(prefill_tokens=1000)))


def test_member_says_what_others_need(cluster: FakeCluster, worker: Worker) -> None:
    member = worker.member
    assert (member.ref, member.role, member.draining) == (worker.ref, worker.role, False)
    assert (member.num_blocks, member.block_size, member.max_model_len) == (16, 4, 64)
    assert member.layout_hash == worker.replica.pool.layout.hash
    assert [descriptor.transport for descriptor in member.descriptors] == ["fake"]
