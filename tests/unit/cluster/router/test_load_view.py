import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.router.load_view import MEMORY, SETTLE_S, LoadView
from diptych.cluster.router.policy import Path
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.membership import Member, Membership, Role
from diptych.messages.requests import FillingLoad, LoadReport, Route, ServiceClass, WorkerRef

P0, D0, D1 = (WorkerRef(WorkerId(name), Epoch(1), Address(f"fake://{name}")) for name in ("p0", "d0", "d1"))
SPLIT = Route(decode=D0, prefill=P0)
LOCAL = Route(decode=D0)
R = RequestId("r")


def member(ref: WorkerRef, *, draining: bool = False) -> Member:
    role = Role.PREFILL if ref.worker_id.startswith("p") else Role.DECODE
    return Member(ref, role, "layout", block_size=16, num_blocks=100, max_model_len=1000, draining=draining)


def loads(*refs: WorkerRef, now: float = 0.0) -> LoadView:
    view = LoadView(silent_after_s=3.0)
    view.set_membership(Membership(1, tuple(map(member, refs)), ()), now)
    return view


def report(ref: WorkerRef, *, waiting: int = 0, tokens: int = 0, running: int = 0, reserved: int = 0, free: int = 100) -> LoadReport:
    return LoadReport(ref, waiting, tokens, running, reserved, 100, free, 16)


def test_a_new_worker_counts_as_idle_until_it_reports():
    view = loads(P0, D0).view(0.0)
    assert [(w.ref, w.num_requests, w.num_free_blocks) for w in (*view.prefill, *view.decode)] == [(P0, 0, 100), (D0, 0, 100)]


def test_a_workers_gpus_are_its_members():
    view = LoadView(silent_after_s=3.0)
    view.set_membership(Membership(1, (msgspec.structs.replace(member(D0), tp=4), member(P0)), ()), 0.0)
    assert [worker.tp for worker in (*view.view(0.0).prefill, *view.view(0.0).decode)] == [1, 4]


def test_a_report_is_the_load():
    view = loads(D0)
    view.heard(D0, report(D0, waiting=1, tokens=30, running=5, reserved=2, free=40), 1.0)
    [worker] = view.view(1.0).decode
    assert (worker.num_requests, worker.num_waiting_tokens, worker.num_free_blocks, worker.used_share) == (8, 30, 40, 0.6)
    view.heard(D0, msgspec.structs.replace(report(D0), busy_s=0.09), 2.0)
    assert view.view(2.0).decode[0].busy_s == 0.09


def test_what_was_sent_counts_at_once_on_both_workers():
    view = loads(P0, D0)
    view.sent(R, SPLIT, num_tokens=33, now=1.0)
    [prefill], [decode] = view.view(1.0).prefill, view.view(1.0).decode
    assert (prefill.num_requests, prefill.num_waiting_tokens, prefill.num_free_blocks) == (1, 33, 97)
    assert (decode.num_requests, decode.num_waiting_tokens, decode.num_free_blocks) == (1, 0, 97)


def test_what_passes_a_prefill_worker_on_is_told_from_what_stays():
    view = loads(P0, D0)
    view.heard(P0, msgspec.structs.replace(report(P0, waiting=3, running=2, reserved=4), num_passing=7), 0.9)
    view.sent(R, SPLIT, num_tokens=33, now=1.0)
    view.sent(RequestId("s"), Route(decode=P0), num_tokens=33, now=1.0)
    [prefill], [decode] = view.view(1.0).prefill, view.view(1.0).decode
    assert (prefill.num_requests, prefill.num_passing) == (11, 8)
    assert (decode.num_requests, decode.num_passing) == (1, 0)
    view.ended(R, SPLIT)
    assert view.view(1.0).prefill[0].num_passing == 7


def test_batch_work_is_told_from_what_it_gives_way_to():
    view = loads(P0, D0)
    filling = FillingLoad(num_requests=5, num_decoding=3, decode_context=300, num_blocks=20)
    view.heard(D0, msgspec.structs.replace(report(D0, waiting=2, running=6), filling=filling), 0.9)
    for name, route in (("r", SPLIT), ("s", LOCAL)):
        view.sent(RequestId(name), route, 33, 1.0, ServiceClass.BATCH)
    view.sent(RequestId("t"), SPLIT, 33, 1.0)
    [prefill], [decode] = view.view(1.0).prefill, view.view(1.0).decode
    assert (prefill.num_requests, prefill.num_passing, prefill.num_filling) == (2, 2, 0)
    assert (decode.num_requests, decode.num_expected, decode.num_filling, decode.filling) == (11, 1, 7, filling)
    view.arrived(RequestId("r"), SPLIT)
    view.ended(RequestId("s"), LOCAL)
    assert view.view(1.0).decode[0].num_filling == 5


def test_on_the_local_path_it_counts_once():
    view = loads(D0)
    view.sent(R, LOCAL, num_tokens=33, now=1.0)
    [decode] = view.view(1.0).decode
    assert (decode.num_requests, decode.num_waiting_tokens, decode.num_free_blocks) == (1, 33, 97)


def test_a_report_that_may_be_older_does_not_settle_it():
    view = loads(P0, D0)
    view.sent(R, SPLIT, num_tokens=33, now=1.0)
    view.heard(P0, report(P0), 1.0 + SETTLE_S / 2)
    assert view.view(1.1).prefill[0].num_waiting_tokens == 33
    view.heard(P0, report(P0, waiting=1, tokens=33), 1.0 + SETTLE_S)
    assert view.view(1.1).prefill[0].num_waiting_tokens == 33


def reading(ref: WorkerRef, *last_read: tuple[str, float]) -> LoadReport:
    return msgspec.structs.replace(report(ref), last_read=tuple((RequestId(name), ago_s) for name, ago_s in last_read))


def test_a_report_settles_what_its_worker_had_read_and_what_was_sent_before_it():
    view = loads(P0, D0)
    for name, num_tokens in (("a", 10), ("b", 200), ("c", 3000)):
        view.sent(RequestId(name), SPLIT, num_tokens, now=1.0)
    view.heard(P0, reading(P0, ("another gateway's", 0.0), ("b", 0.0)), 1.001)
    [worker] = view.view(1.001).prefill
    assert (worker.num_waiting_tokens, worker.num_sent_tokens, worker.sent_at) == (3000, 3000, 1.0)
    view.heard(P0, reading(P0, ("c", 0.0)), 1.002)
    assert view.view(1.002).prefill[0].sent_at is None


def test_messages_take_half_of_the_usual_way_there_and_back():
    """The worker says how long ago it had read the request: of what is left, each way takes half. One that took long changes nothing."""
    view = loads(P0, D0)
    assert view.view(0.0).prefill[0].message_s == 0.0
    for name, sent_at, ago_s, heard_at in (("a", 1.0, 0.03, 1.034), ("b", 2.0, 0.0, 2.5), ("c", 3.0, 0.1, 3.102)):
        view.sent(RequestId(name), SPLIT, 10, sent_at)
        view.heard(P0, reading(P0, (name, ago_s)), heard_at)
        view.heard(P0, reading(P0, (name, ago_s)), heard_at + 1)             # told again, as of an older way
        view.heard(D0, None, heard_at)
    assert view.view(3.2).prefill[0].message_s == pytest.approx(0.002)
    for number in range(20):
        view.sent(RequestId(str(number)), SPLIT, 10, 10.0 + number)
        view.heard(P0, reading(P0, (str(number), 0.0)), 10.02 + number)
        view.heard(D0, None, 10.02 + number)
    assert view.view(29.1).prefill[0].message_s == pytest.approx(0.01), "ways change"


def test_the_decode_worker_is_charged_until_it_has_the_request():
    view = loads(P0, D0)
    view.sent(R, SPLIT, num_tokens=33, now=1.0)
    view.heard(D0, report(D0), 2.0)
    assert view.view(2.0).decode[0].num_requests == 1
    view.arrived(R, SPLIT)
    assert view.view(2.0).decode[0].num_requests == 0


def test_an_ended_request_counts_nowhere():
    view = loads(P0, D0)
    view.sent(R, SPLIT, num_tokens=33, now=1.0)
    view.ended(R, SPLIT)
    assert [w.num_requests for w in (*view.view(1.0).prefill, *view.view(1.0).decode)] == [0, 0]


def test_silence_is_death_until_it_speaks():
    view = loads(D0, D1)
    view.heard(D0, None, 1.0)
    assert [w.ref for w in view.view(3.5).decode] == [D0]
    assert not view.lives(D1, 3.5)
    view.heard(D1, None, 4.5)
    assert [w.ref for w in view.view(4.5).decode] == [D1]


def test_prefill_workers_stand_in_while_nobody_decodes():
    view = loads(P0, D0)
    view.sent(R, LOCAL, num_tokens=33, now=0.0)
    view.heard(P0, None, 3.5)
    [alone] = view.view(3.5).decode
    assert (alone.ref, alone.num_requests, view.view(3.5).prefill) == (P0, 0, ())
    view.heard(D0, None, 3.6)
    assert [[w.ref for w in pool] for pool in (view.view(3.6).prefill, view.view(3.6).decode)] == [[P0], [D0]]
    assert view.view(9.0).decode == view.view(9.0).prefill == ()


def test_a_prefill_worker_alone_may_be_asked_for():
    view = loads(P0, D0)
    assert [[w.ref for w in pool] for pool in (view.view(0.0, Path.ALONE).prefill, view.view(0.0, Path.ALONE).decode)] == [[], [P0]]
    assert [w.ref for w in view.view(0.0, Path.LOCAL).decode] == [D0]
    assert loads(D0).view(0.0, Path.ALONE).decode == ()


def test_a_draining_worker_lives_and_gets_nothing_new():
    view = loads(D0, D1)
    view.set_membership(Membership(2, (member(D0, draining=True), member(D1)), ()), 0.0)
    assert [w.ref for w in view.view(0.0).decode] == [D1]
    assert view.lives(D0, 0.0)


def test_who_is_absent_is_dead_and_cannot_come_back_by_speaking():
    view = loads(D0, D1)
    assert view.set_membership(Membership(2, (member(D1),), ()), 0.0)
    view.heard(D0, report(D0), 0.0)
    assert not view.lives(D0, 0.0)
    assert [each.worker for each in view.reports] == []


def test_an_old_membership_changes_nothing():
    view = loads(D0)
    assert not view.set_membership(Membership(1, (), ()), 0.0)
    assert view.lives(D0, 0.0)


def test_a_worker_keeps_its_load_over_a_change_elsewhere():
    view = loads(D0)
    view.heard(D0, report(D0, running=7), 1.0)
    view.set_membership(Membership(2, (member(D0), member(D1)), ()), 2.0)
    assert [w.num_requests for w in view.view(2.0).decode] == [7, 0]


@given(st.lists(st.tuples(st.sampled_from(ServiceClass), st.integers(1, 5000)), max_size=60))
def test_a_class_is_as_long_as_its_own_answers_or_as_all_while_none_of_it_has_ended(answers):
    view = loads(D0)
    for service_class, num_outputs in answers:
        view.ended(R, LOCAL, num_outputs, service_class)
    seen = view.view(0.0).mean_outputs
    assert set(seen) == (set(ServiceClass) if answers else set())
    for each in seen:
        counted = [n for which, n in answers if which is each] or [n for _, n in answers]
        assert seen[each] == pytest.approx(sum(counted) / len(counted), rel=1e-9) or len(counted) > MEMORY


def test_of_long_histories_the_last_answers_count():
    view = loads(D0)
    for num_outputs in [1000] * 500 + [10] * 4 * MEMORY:
        view.ended(R, LOCAL, num_outputs)
    assert 10 < view.view(0.0).mean_outputs[ServiceClass.DEFAULT] < 50


def test_messages_about_unknown_workers_are_harmless():
    view = loads()
    view.heard(D0, report(D0), 0.0)
    view.sent(R, SPLIT, 10, 0.0)
    view.ended(R, SPLIT)
    assert view.view(0.0).decode == ()


KINDS = st.sampled_from(["sent", "ended", "heard", "read", "wait"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 5), st.integers(1, 70), st.sampled_from([0.0, 0.02, SETTLE_S])), max_size=40)


@given(STEPS)
def test_sums_are_those_of_the_requests(steps):
    """Against all of them, looked at one by one."""
    view, now, outstanding = loads(D0), 0.0, {}
    for kind, number, num_tokens, wait_s in steps:
        now += wait_s
        request_id = RequestId(str(number))
        if kind == "sent":
            view.sent(request_id, LOCAL, num_tokens, now)
            outstanding.pop(request_id, None)
            outstanding[request_id] = (now, num_tokens)
        elif kind == "ended":
            view.ended(request_id, LOCAL)
            outstanding.pop(request_id, None)
        elif kind in ("heard", "read"):
            view.heard(D0, reading(D0, (str(number), 0.0)) if kind == "read" else report(D0), now)
            known = list(outstanding).index(request_id) + 1 if kind == "read" and request_id in outstanding else 0
            outstanding = {each: sent for each, sent in list(outstanding.items())[known:] if now - sent[0] < SETTLE_S}
        [worker] = view.view(now).decode
        tokens = [tokens for _, tokens in outstanding.values()]
        assert (worker.num_requests, worker.num_waiting_tokens) == (len(tokens), sum(tokens))
        assert worker.num_free_blocks == 100 - sum(-(-each // 16) for each in tokens)
        assert worker.prefill_pairs == sum(each * (each + 1) // 2 for each in tokens)
        assert worker.num_sent_tokens == sum(tokens)
        assert worker.sent_at == next((at for at, _ in outstanding.values()), None)
