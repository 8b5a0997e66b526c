"""The log of decisions: bounded whatever happens, and true to what was decided and what came."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.gateway.decisions import MAX_CHOICES, DecisionKind, DecisionLog, RequestExplanation
from diptych.cluster.gateway.errors import Overloaded
from diptych.cluster.gateway.generation import Generation, GenerationState, Prompt
from diptych.cluster.router.policy import Explanation, Objectives, Prediction, Queue, Refuse
from diptych.messages.ids import Address, Epoch, WorkerId
from diptych.messages.requests import Route, SamplingParams, TokenDelta, WorkerRef

GATEWAY = Address("fake://g")
SLO = Objectives(ttft_s=0.5, tpot_s=0.05)


def ref(name: str) -> WorkerRef:
    return WorkerRef(WorkerId(name), Epoch(1), Address(f"fake://{name}"))


SPLIT, LOCAL = Route(decode=ref("d0"), prefill=ref("p0")), Route(decode=ref("d0"))


def prediction(route: Route, ttft_s: float = 0.1, *, keeps: bool = True) -> Prediction:
    return Prediction(route, ttft_s, ttft_s + 0.01, 0.02, 0.3, 1.5, keeps, keeps)


def generation(name: str = "cmpl-a-0") -> Generation:
    prompt = Prompt(name, (1, 2, 3), SamplingParams(max_tokens=10, seed=1), deadline=700.0, objectives=SLO)
    return Generation(prompt, wake=lambda: None, arrived_at=100.0)


def log_of(*response_ids: str, capacity: int = 10) -> DecisionLog:
    log = DecisionLog(capacity)
    for response_id in response_ids:
        log.begin(response_id, f"x-{response_id}")
    return log


def test_a_request_from_its_waits_to_its_end():
    log, one = log_of("cmpl-a"), generation()
    ways = (prediction(SPLIT), prediction(LOCAL, math.inf, keeps=False))
    for now in (100.0, 100.1):
        log.decided(one, Explanation(Queue("nobody has room"), ways, 128.0, math.inf), now)
    log.decided(one, Explanation(SPLIT, ways, 128.0, 0.3), 100.2)
    one.start_attempt(SPLIT, GATEWAY, 100.2)

    [open_choice] = log.find("cmpl-a").choices
    assert (open_choice.state, open_choice.kept_objectives, open_choice.ttft_s) == (GenerationState.RUNNING, None, None)
    one.deliver([TokenDelta("r", 0, (7,))], 100.4)
    one.deliver([TokenDelta("r", 1, (8,))], 100.42)
    one.move(GenerationState.FINISHED)
    log.ended(one)

    found = log.find("cmpl-a")
    [choice] = found.choices
    assert found.request_id == "x-cmpl-a"
    assert (choice.state, choice.path, choice.num_outputs, choice.kept_objectives) == (GenerationState.FINISHED, "split", 2, True)
    assert (choice.ttft_s, choice.tpot_s) == (pytest.approx(0.4), pytest.approx(0.02))
    [attempt] = choice.attempts
    assert (attempt.kind, attempt.prefill, attempt.decode, attempt.num_waits) == (DecisionKind.ROUTE, "p0", "d0", 2)
    assert attempt.decided_after_s == pytest.approx(0.2)
    assert [(each.prefill, each.chosen, each.ttft_s) for each in attempt.candidates] == [("p0", True, 0.1), (None, False, None)]


def test_retries_are_attempts_of_their_own():
    log, one = log_of("cmpl-a"), generation()
    log.decided(one, Explanation(SPLIT), 100.0)
    one.start_attempt(SPLIT, GATEWAY, 100.0)
    log.retried(one, "p0 died")
    one.move(GenerationState.QUEUED)
    log.decided(one, Explanation(Refuse("full", 1.0)), 100.1)
    log.decided(one, Explanation(LOCAL), 100.2)
    first, second = log.find("cmpl-a").choices[0].attempts
    assert (first.prefill, first.failure) == ("p0", "p0 died")
    assert (second.prefill, second.failure, second.num_waits) == (None, "", 1)


def test_a_refusal_keeps_its_reason_and_is_found_by_what_its_client_saw():
    log, one = log_of("cmpl-a"), generation()
    log.decided(one, Explanation(Refuse("too late", 2.0), (prediction(SPLIT, 9.0, keeps=False),)), 100.0)
    one.move(GenerationState.REFUSED)
    one.error = Overloaded("too late", 2.0)
    log.ended(one)
    [choice] = log.find("x-cmpl-a").choices
    assert (choice.state, choice.error, choice.kept_objectives) == (GenerationState.REFUSED, "too late", False)
    assert (choice.attempts[0].kind, choice.attempts[0].reason) == (DecisionKind.REFUSE, "too late")


def test_all_choices_are_there_in_order():
    log = log_of("cmpl-a")
    for index in (2, 0, 1):
        log.decided(generation(f"cmpl-a-{index}"), Explanation(LOCAL), 100.0)
    assert [each.index for each in log.find("cmpl-a").choices] == [0, 1, 2]


def test_of_a_request_with_very_many_choices_the_first_are_kept():
    """A client chooses how many; the log's size is the deployment's to choose."""
    log = log_of("cmpl-a")
    for index in range(1024):
        one = generation(f"cmpl-a-{index}")
        log.decided(one, Explanation(LOCAL, (prediction(LOCAL),)), 100.0)
        if index % 2:
            one.start_attempt(LOCAL, GATEWAY, 100.0)
            log.retried(one, "d0 died")
            one.move(GenerationState.ABORTED)
            log.ended(one)
    assert [each.index for each in log.find("cmpl-a").choices] == list(range(MAX_CHOICES))


def test_off_keeps_nothing():
    log, one = log_of("cmpl-a", capacity=0), generation()
    log.decided(one, Explanation(LOCAL), 100.0)
    log.ended(one)
    assert (log.on, len(log), log.find("cmpl-a"), log.find("x-cmpl-a")) == (False, 0, None, None)


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=60))
def test_the_last_are_kept_and_no_more(capacity, steps):
    """Whatever is told of whichever request, begun, forgotten or unknown; header ids may be used again."""
    log, begun = DecisionLog(capacity), []
    for number, (client, what) in enumerate(steps):
        if what == 0:
            log.begin(f"cmpl-{number}", f"x-{client}")
            begun.append((f"cmpl-{number}", f"x-{client}"))
        elif what == 1:
            log.decided(generation(f"cmpl-{client}-0"), Explanation(LOCAL), 100.0)
        else:
            log.ended(generation(f"cmpl-{client}-0"))
    kept = begun[-capacity:]
    assert len(log) == len(kept)
    assert all(log.find(response_id).request_id == header for response_id, header in kept)
    assert all(log.find(response_id) is None for response_id, _ in begun[:-capacity])
    for client in range(10):
        last = [response_id for response_id, header in begun if header == f"x-{client}"][-1:]
        found = log.find(f"x-{client}")
        assert [found.response_id] == last if found else last == [] or last[0] not in dict(kept)


def test_it_survives_json():
    log, one = log_of("cmpl-a"), generation()
    log.decided(one, Explanation(SPLIT, (prediction(SPLIT), prediction(LOCAL, math.inf)), 128.0, math.inf), 100.0)
    found = log.find("cmpl-a")
    assert msgspec.json.decode(msgspec.json.encode(found), type=RequestExplanation) == found
