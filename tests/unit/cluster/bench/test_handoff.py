"""What `bench transfer` says of a handoff: where its time goes, from stamps at the posts."""

from collections.abc import Iterable
from typing import Any, cast

import pytest

from diptych.cluster.bench import handoff_bench
from diptych.cluster.bench.errors import TransferBenchError
from diptych.cluster.bench.handoff_bench import CAUSES, HandoffPair, summary
from diptych.cluster.bench.handoff_worker import Stamp, StampedPost
from diptych.cluster.bench.transfer_peer import Remote
from diptych.messages.codec import Message
from diptych.messages.fake_post import FakeNetwork
from diptych.messages.handoff import KVCommitted, KVDrained, Ticket
from diptych.messages.ids import Epoch, RequestId, WorkerId
from diptych.messages.membership import Member, Role
from diptych.messages.requests import FailureKind, RequestFailed, WorkerRef
from diptych.messages.zmq_post import Keyring, ZmqPost

TICKET = Ticket(WorkerId("d"), Epoch(1), RequestId("r1"), 7)


def stamps(name: str, begins_s: float, steps_us: Iterable[float]) -> list[Stamp]:
    at_s, found = begins_s, []
    for (_, message, sent), step_us in zip(CAUSES, (*steps_us, 0), strict=True):
        found.append(Stamp(RequestId(name), message, sent, at_s))
        at_s += step_us / 1e6
    return found


def test_steps_and_their_sum() -> None:
    """Those of the other end come later in the list, as they do from two processes."""
    seen = stamps("r1", 5.0, [100, 50, 90, 70, 80, 60]) + stamps("r2", 6.0, [100, 50, 90, 70, 80, 160])
    row = summary("shm", 0.02, sorted(seen, key=lambda stamp: stamp.sent), idle_cpu=0.01)
    assert (row.path, row.pause_s, row.count, row.idle_cpu, row.page_bytes) == ("shm", 0.02, 2, 0.01, 64 << 10)
    assert (row.p50_us, row.p99_us) == pytest.approx((500, 549), abs=0.01)
    assert [step.p50_us for step in row.steps] == pytest.approx([100, 50, 90, 70, 80, 110], abs=0.01)
    assert [step.name for step in row.steps][0::5] == ["offer on its way", "counted, committed"]


def test_a_handoff_that_lacks_a_message_is_told_of() -> None:
    with pytest.raises(TransferBenchError, match="KVCommitted"):
        summary("shm", 0.0, stamps("r1", 5.0, [1] * 6)[:-1], 0.0)


def test_the_post_stamps_what_belongs_to_a_handoff_and_passes_all_on(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork()
    here, there = StampedPost(network.post("here")), network.post("there")
    monkeypatch.setattr("time.monotonic", lambda: 3.0)
    messages: list[Message] = [KVCommitted(TICKET), KVDrained(TICKET)]
    for message in messages:
        here.send(there.address, message)
        there.send(here.address, message)
    network.deliver_all()
    assert there.receive(0) == here.receive(0) == messages
    assert here.stamps == [Stamp(RequestId("r1"), "KVCommitted", sent, 3.0) for sent in (True, False)]


class Started:
    """An end that has started."""

    def __init__(self, role: Role, address: str) -> None:
        self._member = Member(WorkerRef(WorkerId(role), Epoch(1), cast(Any, address)), role, "bench", 64, 64, 4096)

    def tell(self, method: str, *_: object) -> None:
        assert method == "start"

    def answer(self) -> Member:
        return self._member

    def call(self, method: str, *_: object) -> None:
        assert method == "tell"


def pair(post: Any, network: FakeNetwork) -> HandoffPair:
    ends = [cast(Remote, Started(role, network.post(role).address)) for role in Role]
    return HandoffPair(cast(ZmqPost, post), ends[0], ends[1], Keyring.new())


def test_a_handoff_that_fails_ends_the_run() -> None:
    network = FakeNetwork()
    gateway = network.post("gateway")
    worker = WorkerRef(WorkerId("prefill"), Epoch(1), gateway.address)
    asking = pair(gateway, network)
    network.mailboxes[gateway.address] = [RequestFailed(RequestId("bench-1"), FailureKind.REFUSED, "no room", True, worker)]
    with pytest.raises(TransferBenchError, match="handoff 1: no room"):
        asking.hand_off(1, 0.0)


def test_a_handoff_without_an_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork()
    monkeypatch.setattr(handoff_bench, "ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(TransferBenchError, match="handoff 1: no end and no span"):
        pair(network.post("gateway"), network).hand_off(1, 0.0)
