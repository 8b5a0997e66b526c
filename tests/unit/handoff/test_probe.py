"""Links are measured when workers meet: without leaks, whatever dies or is lost meanwhile, and never at a request's cost."""

import logging
import random
from functools import partial

import msgspec
import pytest
from harness.fake_cluster import PAGE_S, TIMEOUT_S, FakeCluster
from harness.process_cluster import process_cluster
from harness.ucx import needs_ucx
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.kvtransfer.fake import FakeTransport
from diptych.kvtransfer.selection import AS_FAST
from diptych.kvtransfer.transport import NUM_IMMS, Peer
from diptych.messages.errors import PeerGone
from diptych.messages.handoff import KVProbe, KVProbeAccept, KVRefuse, RefuseReason
from diptych.messages.ids import Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor
from diptych.messages.requests import FailureKind
from diptych.prefill_worker.link_prober import LINK_WAIT_S
from diptych.prefill_worker.probe import Floor
from diptych.prefill_worker.probe_times import REPEAT_S, RETRY_S

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
NO_FLOOR = Floor(0.0, refuse=True)
PROMPT = list(range(20))


def run(cluster: FakeCluster, seconds: float = 0.5) -> None:
    end = cluster.now + seconds
    while cluster.now < end:
        cluster.step()


def gbps(cluster: FakeCluster) -> float:
    return cluster.transports[PREFILL].pool.layout.page_bytes / PAGE_S / 1e9


def test_every_pair_is_measured_once_and_told_to_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(num_prefill=2, num_decode=2, floor=NO_FLOOR)
    run(cluster, 2 * RETRY_S + 0.5)                          # a decode worker lends to one at a time
    pairs = [(link.worker.worker_id, link.decode_id) for link in cluster.links]
    assert sorted(pairs) == [(f"prefill-{i}", f"decode-{j}") for i in range(2) for j in range(2)]
    for link in cluster.links:
        assert (link.transport, link.refused) == ("fake", False)
        assert link.latency_s == pytest.approx(PAGE_S)
        assert link.gbps == pytest.approx(gbps(cluster))
    assert sum("GB/s" in record.message for record in caplog.records) == 4
    assert sorted(cluster.workers[PREFILL].status().links, key=str) == sorted(
        (link for link in cluster.links if link.worker.worker_id == PREFILL), key=str
    )
    cluster.assert_nothing_leaked()


def test_a_restarted_peer_is_measured_anew() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    cluster.kill(DECODE)
    cluster.restart(DECODE)
    assert cluster.workers[PREFILL].links() != ()
    run(cluster)
    assert len(cluster.links) == 2
    assert len(cluster.workers[PREFILL].links()) == 1


def test_below_the_floor_a_pair_is_not_used_until_it_is_faster() -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    run(cluster)
    assert cluster.links[0].refused
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.failure is not None
    assert (answer.failure.kind, answer.failure.retryable) == (FailureKind.REFUSED, True)
    assert f"{gbps(cluster):.2f} GB/s" in answer.failure.message
    assert "the floor of 1000 GB/s" in answer.failure.message
    single = cluster.submit(PROMPT, max_tokens=1)            # needs no link
    run(cluster)
    assert single.complete
    cluster.transports[PREFILL].page_s = 1e-12
    run(cluster, REPEAT_S + 1)
    assert not cluster.links[-1].refused
    again = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert again.complete
    cluster.assert_nothing_leaked()


def chosen(cluster: FakeCluster) -> tuple[str, list[str]]:
    """By the last measurement."""
    link = cluster.links[-1]
    return link.transport, [other.transport for other in link.others]


def transport_of(cluster: FakeCluster) -> str:
    """That a handoff uses now."""
    answer = cluster.submit([*PROMPT, len(cluster.answers)], max_tokens=3)
    run(cluster)
    assert answer.complete
    return cluster.spans[-1].transport


def test_the_fastest_transport_is_used_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(floor=NO_FLOOR, others=("fast", "slow"))
    fast, slow = cluster.others[PREFILL]
    fast.page_s, slow.page_s = PAGE_S / 4, 3 * PAGE_S
    run(cluster)
    [link] = cluster.links
    assert chosen(cluster) == ("fast", ["fake", "slow"])
    assert [figures.latency_s for figures in (link, *link.others)] == pytest.approx([PAGE_S / 4, PAGE_S, 3 * PAGE_S])
    assert [figures.gbps for figures in (link, *link.others)] == pytest.approx([4 * gbps(cluster), gbps(cluster), gbps(cluster) / 3])
    measured = [record.getMessage() for record in caplog.records if "GB/s" in record.getMessage()]
    assert len(measured) == 1
    assert all(name in measured[0] for name in ("over fast", "fake", "slow"))
    assert transport_of(cluster) == "fast"
    run(cluster, 2 * REPEAT_S)
    assert len(cluster.links) == 1, "measured anew for no reason"
    cluster.assert_nothing_leaked()


def test_the_specs_order_decides_between_transports_that_are_about_as_fast() -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("other",))
    cluster.others[PREFILL][0].page_s = 0.95 * PAGE_S
    run(cluster)
    assert chosen(cluster) == ("fake", ["other"])


def test_the_floor_is_for_the_fastest() -> None:
    cluster = FakeCluster(floor=Floor(2 * gbps(FakeCluster()), refuse=True), others=("fast",))
    cluster.others[PREFILL][0].page_s = PAGE_S / 4
    run(cluster)
    assert [(link.transport, link.refused) for link in cluster.links] == [("fast", False)]


def test_a_transport_that_does_not_reach_is_passed_over_and_measured_once_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("far",))
    [far] = cluster.others[PREFILL]
    far.page_s = PAGE_S / 4
    connect = far.connect
    monkeypatch.setattr(far, "connect", lambda descriptor: None)
    run(cluster, LINK_WAIT_S + 1)
    assert chosen(cluster) == ("fake", [])
    assert transport_of(cluster) == "fake"
    monkeypatch.setattr(far, "connect", connect)
    run(cluster, REPEAT_S)
    assert chosen(cluster) == ("far", ["fake"])
    assert transport_of(cluster) == "far"
    cluster.assert_nothing_leaked()


def test_a_fall_back_is_measured_and_so_is_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR, others=("fast",))
    [fast] = cluster.others[PREFILL]
    fast.page_s = PAGE_S / 4
    run(cluster)
    assert chosen(cluster) == ("fast", ["fake"])
    connect = fast.connect

    def refuse(descriptor: MemoryDescriptor) -> Peer:
        raise PeerGone("cut")

    monkeypatch.setattr(fast, "connect", refuse)
    run(cluster)
    assert chosen(cluster) == ("fake", [])
    assert transport_of(cluster) == "fake"
    monkeypatch.setattr(fast, "connect", connect)
    run(cluster, REPEAT_S)
    assert chosen(cluster) == ("fast", ["fake"])
    assert transport_of(cluster) == "fast"
    cluster.assert_nothing_leaked()


def test_a_link_that_was_down_is_measured_anew_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    connect = cluster.transports[PREFILL].connect
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", lambda descriptor: None)
    run(cluster)
    assert len(cluster.links) == 1
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", connect)
    cluster.transports[PREFILL].page_s = 2 * PAGE_S
    run(cluster)
    assert [link.gbps for link in cluster.links] == pytest.approx([gbps(cluster), gbps(cluster) / 2])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaks_over_two_transports(seed: int) -> None:
    """One of them comes and goes; messages are lost, and both sides die."""
    choose = random.Random(seed)
    cluster = FakeCluster(floor=NO_FLOOR, others=("other",))
    for _ in range(choose.randrange(200)):
        letters, writes = len(cluster.network.in_flight), len(cluster.fabric.in_flight)
        match choose.choices(["turn", "deliver", "drop", "land", "time", "kill", "cut", "submit"], [40, 40, 2, 15, 1, 1, 2, 2])[0]:
            case "turn":
                cluster.turn()
            case "deliver" if letters:
                cluster.network.deliver(choose.randrange(letters))
            case "drop" if letters:
                cluster.network.drop(choose.randrange(letters))
            case "land" if writes:
                cluster.fabric.land(choose.randrange(writes))
            case "time":
                cluster.now += choose.choice([0.1, LINK_WAIT_S, TIMEOUT_S + 0.1])
            case "kill":
                victim = choose.choice(list(cluster.workers))
                cluster.kill(victim)
                cluster.restart(victim)
            case "cut":
                other = cluster.others[PREFILL][0]
                other.connect = choose.choice([lambda descriptor: None, partial(FakeTransport.connect, other)])
            case "submit":
                cluster.submit(PROMPT[: choose.randint(1, 20)], max_tokens=3)
    other = cluster.others[PREFILL][0]
    other.connect = partial(FakeTransport.connect, other)
    for pause in (TIMEOUT_S + 1, TIMEOUT_S + 1, 200.0):
        cluster.now += pause
        run(cluster, 2)
        cluster.give_up_unanswered()
        run(cluster, 2)
    cluster.assert_nothing_leaked()
    assert chosen(cluster) == ("fake", ["other"])


def test_a_warning_is_all_if_the_spec_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=False))
    run(cluster)
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.complete
    assert [r.message.partition("; ")[2] for r in caplog.records] == ["below the floor of 1000 GB/s, used all the same"]


def test_a_probe_waits_for_memory_and_for_handoffs() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    blocks = cluster.workers[DECODE].engine.pool.take(14)
    assert blocks is not None
    run(cluster)
    assert cluster.links == []
    cluster.workers[DECODE].engine.pool.release(blocks)
    cluster.submit(PROMPT, max_tokens=3)
    for _ in range(20):                                      # the handoff is under way, and its pages do not land
        cluster.network.deliver_all()
        cluster.turn()
        cluster.now += 0.1
    assert not any(isinstance(letter.message, KVProbe) for letter in cluster.network.in_flight)
    assert cluster.links == []
    run(cluster, RETRY_S + 1)
    assert len(cluster.links) == 1
    assert all(answer.complete for answer in cluster.answers.values())


def test_blocks_that_are_only_cached_are_lent() -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    pool, first = cluster.workers[DECODE].engine.pool, 0
    while pool.num_free >= 4:                                # fewer would be no loan
        cluster.submit([first + token for token in PROMPT], max_tokens=2)
        run(cluster)
        first += 1
    cluster.kill(PREFILL)
    cluster.restart(PREFILL)
    run(cluster, RETRY_S)
    assert len(cluster.links) == 2
    cluster.assert_nothing_leaked()


def never_quiet(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    prober = cluster.workers[PREFILL]._prober
    monkeypatch.setattr(prober, "tick", lambda now, is_quiet, tick=prober.tick: tick(now, False))


def test_a_refused_link_is_measured_beside_others_handoffs_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    run(cluster)
    assert cluster.links[0].refused
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S + 1)
        assert len(cluster.links) == 1
        run(cluster, REPEAT_S)
        assert [link.refused for link in cluster.links] == [True, True], "it is not used because of an earlier figure"
        cluster.transports[PREFILL].page_s = 1e-12
        run(cluster, 2 * REPEAT_S)
        assert [link.refused for link in cluster.links] == [True, True, False]
        run(cluster, 4 * REPEAT_S)
        assert len(cluster.links) == 3
    cluster.assert_nothing_leaked()


def test_a_pair_that_is_never_quiet_is_measured_beside_its_handoffs_and_once_more_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    cluster = FakeCluster(floor=NO_FLOOR)
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S - 1)
        assert cluster.links == []
        run(cluster, 2)
        assert len(cluster.links) == 1
        assert caplog.records[-1].getMessage().endswith("a page (measured beside handoffs)")
        run(cluster, 4 * REPEAT_S)
        assert len(cluster.links) == 1, "it is fast enough"
    run(cluster)
    assert len(cluster.links) == 2
    run(cluster, 4 * REPEAT_S)
    assert len(cluster.links) == 2
    cluster.assert_nothing_leaked()


def test_a_figure_beside_handoffs_refuses_no_link_but_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    with monkeypatch.context() as patch:
        never_quiet(cluster, patch)
        run(cluster, REPEAT_S + 1)
        assert [(link.below_floor, link.refused) for link in cluster.links] == [(True, False)]
        assert caplog.records[0].getMessage().endswith("used all the same (measured beside handoffs)")
        assert cluster.submit(PROMPT, max_tokens=3).failure is None
        run(cluster, 2 * REPEAT_S)
        assert all(answer.complete for answer in cluster.answers.values())
        assert [link.refused for link in cluster.links] == [False, False]
    run(cluster, REPEAT_S)
    assert [link.refused for link in cluster.links] == [False, False, True]


def test_a_handoff_that_begins_beside_a_probe_is_not_the_links_fault() -> None:
    cluster = FakeCluster(floor=Floor(1e3, refuse=True))
    while not cluster.fabric.in_flight:
        cluster.network.deliver_all()
        cluster.turn()
    answer = cluster.submit(PROMPT, max_tokens=3)
    run(cluster)
    assert answer.complete
    assert [link.refused for link in cluster.links] == [False]
    run(cluster, REPEAT_S)
    assert [link.refused for link in cluster.links] == [False, True]


def test_a_link_that_is_found_anew_under_load_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(floor=NO_FLOOR)
    run(cluster)
    never_quiet(cluster, monkeypatch)
    connect = cluster.transports[PREFILL].connect
    with monkeypatch.context() as patch:
        patch.setattr(cluster.transports[PREFILL], "connect", lambda descriptor: None)
        run(cluster, RETRY_S + 1)
    monkeypatch.setattr(cluster.transports[PREFILL], "connect", connect)
    cluster.transports[PREFILL].page_s = 2 * PAGE_S
    run(cluster, REPEAT_S + RETRY_S + 1)
    assert [link.gbps for link in cluster.links] == pytest.approx([gbps(cluster), gbps(cluster) / 2])


def test_who_is_not_to_measure_never_does() -> None:
    cluster = FakeCluster()
    run(cluster, 2 * REPEAT_S)
    cluster.submit(PROMPT, max_tokens=3)
    run(cluster, 2 * REPEAT_S)
    assert cluster.links == []


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


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
@pytest.mark.parametrize("with_successor", [False, True])
def test_a_death_at_any_step_of_a_probe_leaks_nothing(victim: WorkerId, with_successor: bool) -> None:
    for steps in range(60):
        cluster = FakeCluster(floor=NO_FLOOR)
        one_thing_at_a_time(cluster, steps)
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


def one_thing_at_a_time(cluster: FakeCluster, steps: int) -> None:
    for step in range(steps):
        if step % 3 == 0:
            cluster.turn()
        elif step % 3 == 1 and cluster.network.in_flight:
            cluster.network.deliver()
        elif cluster.fabric.in_flight:
            cluster.fabric.land()


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_nothing_leaks_in_any_history(seed: int) -> None:
    """Messages lost, doubled and out of order; writes that land late; deaths on both sides; time that passes; requests beside it."""
    choose = random.Random(seed)
    cluster = FakeCluster(num_prefill=2, num_decode=2, floor=NO_FLOOR)
    for _ in range(choose.randrange(250)):
        letters, writes = len(cluster.network.in_flight), len(cluster.fabric.in_flight)
        match choose.choices(["turn", "deliver", "drop", "double", "land", "time", "kill", "submit"], [40, 40, 2, 2, 15, 1, 1, 2])[0]:
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
                cluster.now += choose.choice([0.1, TIMEOUT_S + 0.1])
            case "kill":
                victim = choose.choice(list(cluster.workers))
                cluster.kill(victim)
                cluster.restart(victim)
            case "submit":
                cluster.submit(PROMPT[: choose.randint(1, 20)], max_tokens=3)
    run(cluster, 2)
    for pause in (TIMEOUT_S + 1, TIMEOUT_S + 1, 200.0):
        cluster.now += pause
        run(cluster, 2)
        cluster.give_up_unanswered()
        run(cluster, 2)
    cluster.assert_nothing_leaked()
    assert all(len(worker.links()) == 2 for name, worker in cluster.workers.items() if name.startswith("prefill"))


@pytest.mark.parametrize("transport", ["shm", pytest.param("ucx", marks=needs_ucx)])
def test_processes_measure_their_link_and_a_successor_anew(transport: str) -> None:
    with process_cluster(transport, "prefill-0", "decode-0", probe_links=True) as cluster:
        cluster.pump(lambda: len(cluster.links) == 1, 20.0)
        cluster.kill("decode-0")
        cluster.start("decode-0")
        cluster.submit(PROMPT, max_tokens=5)
        cluster.pump(lambda: len(cluster.links) == 2, 20.0)
        cluster.finish(20.0)
        cluster.assert_whole()
    for link in cluster.links:
        assert (link.worker.worker_id, link.decode_id, link.transport) == (PREFILL, DECODE, transport)
        assert 0 < link.latency_s < 1
        assert link.gbps > 0


@needs_ucx
def test_processes_measure_all_transports_and_use_the_fastest() -> None:
    """Pages of a few bytes: which one that is depends on the machine."""
    with process_cluster("shm,ucx", "prefill-0", "decode-0", probe_links=True) as cluster:
        cluster.pump(lambda: len(cluster.links) == 1, 20.0)
        [link] = cluster.links
        cluster.submit(PROMPT, max_tokens=5)
        cluster.finish(20.0)
        cluster.assert_whole()
    figures = [link, *link.others]
    assert sorted(each.transport for each in figures) == ["shm", "ucx"]
    assert all(each.gbps > 0 and 0 < each.latency_s < 1 for each in figures)
    assert link.gbps >= AS_FAST * max(each.gbps for each in figures)


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


def test_a_worker_that_drains_does_not_hold_up_the_others() -> None:
    cluster = FakeCluster(num_decode=2, floor=NO_FLOOR)
    cluster.workers[DECODE].drain()
    cluster.publish()
    run(cluster, 2 * RETRY_S)
    assert [link.decode_id for link in cluster.links] == ["decode-1"]


def test_what_a_counter_was_busy_with_before_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last handoff that used it may have been confirmed before its writer put the time down; so may a round of the probe."""
    cluster, busy_s, asked = FakeCluster(floor=NO_FLOOR), FakeTransport.busy_s, []

    def late(self: FakeTransport, peer: Peer, imm: Imm) -> float:
        asked.append(imm)
        return PAGE_S / 100 + (busy_s(self, peer, imm) if len(asked) > 2 else 0.0)

    monkeypatch.setattr(FakeTransport, "busy_s", late)
    run(cluster)
    assert cluster.links[0].latency_s == pytest.approx(PAGE_S)


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
