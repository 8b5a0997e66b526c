"""What dies, hangs or is lost while a link is measured: nothing leaks, nothing is lent again too early, and no request waits for it."""

import random

import msgspec
import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster
from harness.probes import DECODE, NO_FLOOR, PREFILL, PROMPT, end_of_faults, happen, run
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.transport import NUM_IMMS
from diptych.messages.handoff import KVProbe, KVProbeAccept, KVRefuse, RefuseReason
from diptych.messages.ids import Imm, WorkerId
from diptych.prefill_worker.probe_times import RETRY_S


def test_a_request_is_served_while_a_probe_hangs() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    while not any(isinstance(letter.message, KVProbeAccept) for letter in cluster.network.in_flight):
        cluster.network.deliver_all()
        cluster.turn()
    cluster.network.in_flight.clear()                        # the writer never learns what it was lent
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.complete
    assert cluster.workers[DECODE].engine.pool.num_held > 0
    run(cluster, 3 * TIMEOUT_S)
    assert len(cluster.links) == 1
    cluster.assert_nothing_leaked()


def test_a_probe_for_an_earlier_life_is_refused() -> None:
    cluster = FakeCluster()
    decode = cluster.workers[DECODE]
    cluster.floor = NO_FLOOR
    cluster.restart(PREFILL)
    cluster.turn(PREFILL)
    probe = next(letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVProbe))
    cluster.kill(DECODE)
    cluster.restart(DECODE)
    cluster.network.in_flight.clear()
    cluster.gateway.send(cluster.workers[DECODE].post.address, probe)
    cluster.network.deliver_all()
    cluster.turn(DECODE)
    refusal = next(letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVRefuse))
    assert refusal.reason is RefuseReason.STALE_EPOCH
    assert decode.ref != cluster.workers[DECODE].ref


def test_a_refusal_for_good_is_not_asked_for_again_until_the_membership_changes(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    asked: list[KVProbe] = []

    def run_refused(seconds: float) -> None:
        end = cluster.now + seconds
        while cluster.now < end:
            for letter in cluster.network.in_flight:
                if isinstance(probe := letter.message, KVProbe):
                    asked.append(probe)
                    cluster.gateway.send(letter.sender, KVRefuse(probe.ticket, RefuseReason.LAYOUT, "pages of another layout"))
            cluster.network.in_flight = [letter for letter in cluster.network.in_flight if not isinstance(letter.message, KVProbe)]
            cluster.step()

    run_refused(20 * RETRY_S)
    assert len(asked) == 1
    assert [record.message for record in caplog.records] == ["link to decode-0 not measured: layout: pages of another layout"]
    cluster.publish()
    run_refused(20 * RETRY_S)
    assert len(asked) == 2
    cluster.publish()
    run(cluster)
    assert len(cluster.links) == 1


def test_a_loan_under_a_counter_that_cannot_be_is_given_back_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, asked = FakeCluster(floor=NO_FLOOR), []
    while not (accepts := [letter.message for letter in cluster.network.in_flight if isinstance(letter.message, KVProbeAccept)]):
        cluster.network.deliver_all()
        cluster.turn()
    cluster.network.in_flight.clear()
    cluster.gateway.send(cluster.workers[PREFILL].post.address, msgspec.structs.replace(accepts[0], imm=Imm(NUM_IMMS)))
    for name in ("write_pages", "stop", "busy_s"):
        monkeypatch.setattr(FakeTransport, name, lambda *arguments: asked.append(arguments) or True)
    cluster.network.deliver_all()
    cluster.turn()
    monkeypatch.undo()
    assert asked == []
    run(cluster, 2 * RETRY_S)
    assert len(cluster.links) == 1
    cluster.assert_nothing_leaked()


def test_what_a_dead_writer_was_lent_comes_back_only_behind_the_fence() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    cluster.kill(PREFILL)
    cluster.transports[DECODE].fences = False
    cluster.publish()
    decode = cluster.workers[DECODE]
    for _ in range(200):
        cluster.turn()
        cluster.now += 0.1
    assert decode.engine.pool.num_held > 0, "used again although the dead writer's pages may still land"
    cluster.transports[DECODE].fences = True
    run(cluster, 2)
    assert not cluster.fabric.in_flight
    cluster.assert_nothing_leaked()


def test_a_living_writer_that_is_silent_keeps_what_it_was_lent() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    for _ in range(5):                                       # it hangs; its page is still under way
        cluster.now += TIMEOUT_S + 1
        cluster.network.deliver_all()
        cluster.turn(DECODE)
    assert cluster.workers[DECODE].engine.pool.num_held > 0
    run(cluster, 2 * TIMEOUT_S)
    cluster.assert_nothing_leaked()
    assert len(cluster.workers[PREFILL].links()) == 1


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
@pytest.mark.parametrize("with_successor", [False, True])
def test_a_death_at_any_step_of_a_probe_leaks_nothing(victim: WorkerId, with_successor: bool) -> None:
    for steps in range(60):
        cluster = FakeCluster(floor=NO_FLOOR)
        cluster.one_thing_at_a_time(steps)
        cluster.kill(victim)
        if with_successor:
            cluster.restart(victim)
        else:
            cluster.publish()
        run(cluster, 2 * TIMEOUT_S)
        cluster.assert_nothing_leaked()
        assert all(link.gbps > 0 for link in cluster.links)
        if with_successor:
            assert len(cluster.workers[PREFILL].links()) == 1


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaks_in_any_history(seed: int) -> None:
    """Messages lost, doubled and out of order; writes that land late; deaths on both sides; time that passes; requests beside it."""
    choose = random.Random(seed)
    cluster = FakeCluster(num_prefill=2, num_decode=2, floor=NO_FLOOR)
    for _ in range(choose.randrange(250)):
        happen(cluster, choose, {"turn": 40, "deliver": 40, "drop": 2, "double": 2, "land": 15, "time": 1, "kill": 1, "submit": 2})
    run(cluster, 2)
    end_of_faults(cluster)
    assert all(len(worker.links()) == 2 for name, worker in cluster.workers.items() if name.startswith("prefill"))
