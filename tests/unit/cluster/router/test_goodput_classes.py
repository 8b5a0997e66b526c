"""Routing by goodput where requests are of several classes."""

import msgspec
import pytest
from harness.loads import REQUEST, load, policy, ref, view
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.router.goodput import PRIORITY_MEMORY_S
from diptych.cluster.router.policy import Objectives, Queue, WorkerLoad
from diptych.messages.requests import FillingLoad, Route, ServiceClass

BATCH, PRIORITY = ServiceClass.BATCH, ServiceClass.PRIORITY


def filled(worker: WorkerLoad, num_decoding: int, num_others: int = 0, num_blocks: int = 0) -> WorkerLoad:
    """With batch work."""
    filling = FillingLoad(num_decoding + num_others, num_decoding, 1200 * num_decoding, num_blocks)
    requests = worker.num_requests + filling.num_requests
    return msgspec.structs.replace(worker, num_requests=requests, num_filling=filling.num_requests, filling=filling)


@given(st.integers(0, 60_000), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_batch_work_is_nothing_to_others_but_all_to_itself(waiting, decoding, num_filling, num_others):
    bare = load("d0", waiting=waiting, decoding=decoding)
    as_others = msgspec.structs.replace(load("d0", waiting=waiting, decoding=decoding + num_filling))
    as_others = msgspec.structs.replace(as_others, num_requests=as_others.num_requests + num_others)
    beside = filled(bare, num_filling, num_others)
    alike, more, plain, batch = (
        policy().explain(msgspec.structs.replace(REQUEST, service_class=kind), view([], [worker]), 0.0).predictions[0]
        for worker, kind in ((bare, PRIORITY), (as_others, PRIORITY), (beside, PRIORITY), (beside, BATCH))
    )
    assert (plain.ttft_s, plain.tpot_s, plain.keeps_both) == (alike.ttft_s, alike.tpot_s, alike.keeps_both)
    assert batch.ttft_s == pytest.approx(more.ttft_s)
    assert batch.tpot_s >= more.tpot_s * ((num_filling + 1) / 2 if decoding else 1 - 1e-9), "one goes on in each step"


def test_batch_work_goes_where_it_need_not_give_way():
    cluster = view([], [filled(load("d0", decoding=40), num_decoding=5), filled(load("d1"), num_decoding=60)])
    asked = msgspec.structs.replace(REQUEST, service_class=BATCH, objectives=Objectives(), may_be_late=True)
    assert policy().choose(asked, cluster, 0.0).decode == ref("d1")


def test_memory_of_batch_work_is_free_to_others():
    cluster = view([], [filled(load("d0", free=10), num_decoding=5, num_blocks=20)])
    assert isinstance(policy().choose(REQUEST, cluster, 0.0), Route)
    asked = msgspec.structs.replace(REQUEST, service_class=BATCH)
    assert not policy().explain(asked, cluster, 0.0).predictions[0].keeps_tpot


def test_default_requests_leave_free_what_priority_was_promised_a_token():
    """100 decodes take 12 ms: the next one keeps 20 ms, and would leave no room for who is promised 12."""
    router, cluster = policy(), view([], [load("d0", decoding=100)])
    asked = msgspec.structs.replace(REQUEST, service_class=PRIORITY, objectives=Objectives(0.4, 0.012))
    assert isinstance(router.choose(REQUEST, cluster, 0.0), Route)
    router.explain(asked, cluster, 1.0)
    assert isinstance(router.choose(REQUEST, cluster, 1.0), Route), "nothing is remembered of a question"
    router.choose(asked, cluster, 1.0)
    assert isinstance(router.choose(REQUEST, cluster, 2.0), Queue)
    assert isinstance(router.choose(REQUEST, view([], [load("d0", decoding=20)]), 2.0), Route)
    other, end = msgspec.structs.replace(asked, objectives=Objectives(0.4, 0.015)), 1.0 + PRIORITY_MEMORY_S
    router.choose(other, cluster, 3.0)
    assert "12 ms a token that priority" in router.choose(REQUEST, cluster, 4.0).reason, "the tightest one counts"
    assert isinstance(router.choose(other, cluster, 4.0), Route), "it is left free for them"
    busy = view([], [load("d0", decoding=160)])
    assert isinstance(policy().choose(REQUEST, busy, end), Route)
    assert "15 ms a token that priority" in router.choose(REQUEST, busy, end).reason, "then the next one"
    assert isinstance(router.choose(REQUEST, busy, 4.0 + PRIORITY_MEMORY_S), Route)


def test_nothing_is_left_free_for_who_could_not_be_served_anyway():
    router, cluster = policy(), view([], [load("d0", decoding=20)])
    asked = msgspec.structs.replace(REQUEST, service_class=PRIORITY, objectives=Objectives(0.4, 0.012))
    busy = view([], [load("d0", decoding=100)])
    router.choose(msgspec.structs.replace(asked, objectives=Objectives(0.4, 0.004)), cluster, 0.0)
    assert isinstance(router.choose(REQUEST, busy, 1.0), Route)
    router.choose(asked, cluster, 2.0)
    router.choose(msgspec.structs.replace(asked, objectives=Objectives(0.4, 0.004)), cluster, 3.0)
    assert isinstance(router.choose(REQUEST, busy, 4.0), Queue), "nor does it undo what is left free for others"


@pytest.mark.parametrize("max_sequences", [0, 8])
def test_priority_is_predicted_to_pass_what_is_due_after_it(max_sequences):
    """In its worker's queue, of prompts and for places in steps, it stands where a default request would that came a second earlier."""
    waiting = load("d0", waiting=8000, decoding=8, queue=tuple((due_s, 2000) for due_s in (-0.9, 0.1, 0.2, 0.3)))
    cluster = view([], [msgspec.structs.replace(waiting, max_sequences=max_sequences)])
    early, late, batch = (
        policy().explain(msgspec.structs.replace(REQUEST, service_class=kind), cluster, 0.0).predictions[0]
        for kind in (PRIORITY, ServiceClass.DEFAULT, BATCH)
    )
    assert early.ttft_s < 0.75 * late.ttft_s
    assert batch.ttft_s >= late.ttft_s
    head_start = msgspec.structs.replace(REQUEST, objectives=Objectives(0.4, 0.02), arrived_at=-1.0, may_be_late=True)
    assert policy().explain(head_start, cluster, 0.0).predictions[0].ttft_s == pytest.approx(early.ttft_s)


def test_what_was_promised_no_first_token_passes_what_is_due_later_still():
    cluster = view([], [load("d0", waiting=4000, queue=((20.0, 4000),))])
    asked = msgspec.structs.replace(REQUEST, objectives=Objectives())
    alone = policy().explain(REQUEST, view([], [load("d0")]), 0.0).predictions[0]
    assert policy().explain(asked, cluster, 0.0).predictions[0].ttft_s == pytest.approx(alone.ttft_s, rel=0.2)
