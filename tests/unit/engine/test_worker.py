"""What both roles share, on a fake network and clock: refusals, deadlines, memberships, tokens, and the loop itself."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster
from harness.worker_turns import PROMPT, ROLES, answers, ask, in_flight, route_to, turn

from diptych.engine.block_pool import chain_hashes
from diptych.engine.fake_runner import next_token
from diptych.engine.model_runner import ChunkOutput, StepOutputs
from diptych.engine.scheduler import StepPlan
from diptych.engine.step_watch import STEP_LIMIT_S
from diptych.engine.worker import ALERT_S, ATTENTION_S, LOOK_AFTER_S, MOST_UNLEARNED, Worker
from diptych.messages.codec import Message
from diptych.messages.errors import StepStuck
from diptych.messages.handoff import KVAccept, KVLanded
from diptych.messages.ids import Address, Epoch, RequestId, WorkerId
from diptych.messages.membership import Membership, Role
from diptych.messages.requests import Abort, FailureKind, GenerateRequest, RequestFailed, Route, StepTokens, WorkerRef

PATHS = pytest.mark.parametrize("prefill", ["prefill-0", None], ids=["split", "local"])


def run_until(cluster: FakeCluster, condition: Callable[[], bool]) -> None:
    for _ in range(50):
        if condition():
            return
        cluster.network.deliver_all()
        cluster.fabric.land_all()
        cluster.turn()
    raise AssertionError("not within 50 rounds")


# What is refused

@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epoch": Epoch(99)}, "meant for {id} epoch 99, this is {id} epoch {epoch}"),
        ({"worker_id": WorkerId("other-7")}, "meant for other-7 epoch {epoch}, this is {id} epoch {epoch}"),
    ],
)
def test_a_request_for_another_life_is_refused(cluster: FakeCluster, worker: Worker, change: dict[str, object], text: str) -> None:
    meant: WorkerRef = msgspec.structs.replace(worker.ref, **change)
    right = route_to(cluster, worker)
    ask(cluster, Route(meant) if right.prefill is None else Route(right.decode, meant))
    expected = text.format(id=worker.ref.worker_id, epoch=worker.ref.epoch)
    assert turn(cluster, worker) == [RequestFailed(RequestId("r"), FailureKind.REFUSED, expected, True, worker.ref)]
    assert worker.engine.sequences == []


def test_a_decode_worker_takes_no_request_that_goes_by_prefill(cluster: FakeCluster) -> None:
    prefill, decode = (cluster.workers[each] for each in ROLES)
    asked = ask(cluster, Route(decode.ref, prefill.ref))
    cluster.network.drop()
    cluster.gateway.send(decode.ref.address, asked)
    [failed] = turn(cluster, decode)
    assert isinstance(failed, RequestFailed)
    assert (failed.kind, failed.retryable) == (FailureKind.REFUSED, True)


def test_draining_takes_nothing_new_and_finishes_what_it_has(cluster: FakeCluster, worker: Worker) -> None:
    split = "prefill-0" if worker.role is Role.PREFILL else None
    running = cluster.submit(PROMPT, 4, split)
    run_until(cluster, lambda: bool(worker.engine.sequences))
    worker.drain()
    assert worker.member.draining
    refused = cluster.submit(PROMPT, 4, split)
    cluster.settle()
    assert running.complete
    assert refused.failure is not None
    assert refused.failure.kind is FailureKind.REFUSED
    assert refused.failure.retryable
    assert f"{worker.ref.worker_id} is draining" in refused.failure.message
    cluster.assert_nothing_leaked()


def test_a_prompt_over_the_context_can_never_run(cluster: FakeCluster, worker: Worker) -> None:
    ask(cluster, route_to(cluster, worker), prompt=[1] * 65)
    expected = RequestFailed(RequestId("r"), FailureKind.INVALID, "65 tokens; this worker takes 1 to 64", False, worker.ref)
    assert turn(cluster, worker) == [expected]


def test_a_doubled_request_is_ignored(cluster: FakeCluster, worker: Worker) -> None:
    """Together with the first, and while that one is under way."""
    asked = ask(cluster, route_to(cluster, worker))
    cluster.network.double()
    sent = turn(cluster, worker)
    cluster.gateway.send(worker.ref.address, asked)
    for _ in range(12):
        sent += turn(cluster, worker)
    deltas = [delta for message in sent if isinstance(message, StepTokens) for delta in message.deltas]
    assert [delta.index for delta in deltas] == ([0, 1, 2, 3] if worker.role is Role.DECODE else [0])
    assert worker.engine.pool.num_held == (0 if worker.role is Role.DECODE else 3)


def test_an_abort_of_what_is_unknown_is_nothing(cluster: FakeCluster, worker: Worker) -> None:
    cluster.gateway.send(worker.ref.address, Abort(RequestId("never heard of")))
    assert turn(cluster, worker) == []


def test_an_abort_frees_at_once_and_is_not_answered(cluster: FakeCluster, worker: Worker) -> None:
    asked = ask(cluster, route_to(cluster, worker))
    run_until(cluster, lambda: worker.engine.pool.num_held > 0)
    answers(cluster)
    cluster.gateway.send(worker.ref.address, Abort(asked.request_id))
    assert turn(cluster, worker) == []
    assert worker.engine.sequences == []
    assert worker.engine.pool.num_held == 0


# Deadlines

@PATHS
def test_a_request_without_an_end_in_its_time_fails(cluster: FakeCluster, prefill: str | None) -> None:
    """Held up because all blocks are taken by somebody else."""
    worker = cluster.workers[WorkerId(prefill or "decode-0")]
    taken = worker.engine.pool.take(worker.engine.pool.num_free) or []
    answer = cluster.submit(PROMPT, 4, prefill)
    for pause_s in (0.0, 99.9):
        cluster.now += pause_s
        cluster.network.deliver_all()
        cluster.turn()
    assert not answer.ended
    cluster.now += 0.2
    cluster.turn()
    assert answers(cluster) == [
        RequestFailed(answer.request.request_id, FailureKind.TIMEOUT, f"no end within 100 s on {worker.ref.worker_id}", True, worker.ref)
    ]
    worker.engine.pool.release(taken)
    cluster.settle()
    cluster.assert_nothing_leaked()


# Memberships

def test_an_older_membership_is_ignored(cluster: FakeCluster, worker: Worker) -> None:
    worker.turn(0.0)
    current = worker.membership
    for version in (current.version - 1, current.version):
        worker.update_membership(Membership(version, (), ()))
        worker.turn(0.0)
        assert worker.membership is current
    worker.update_membership(Membership(current.version + 1, (), ()))
    worker.turn(0.0)
    assert worker.membership.workers == ()


def without_gateway(cluster: FakeCluster) -> None:
    cluster._version += 1
    members = tuple(worker.member for worker in cluster.workers.values())
    for worker in cluster.workers.values():
        worker.update_membership(Membership(cluster._version, members, ()))


@pytest.mark.parametrize(
    ("prefill", "reached"),
    [
        ("prefill-0", GenerateRequest), ("prefill-0", KVAccept), ("prefill-0", KVLanded), ("prefill-0", StepTokens),
        (None, GenerateRequest), (None, StepTokens),
    ],
)  # fmt: skip
def test_a_gateway_that_is_gone_takes_its_requests_with_it(cluster: FakeCluster, prefill: str | None, reached: type) -> None:
    """In every stage, also where the decode worker holds blocks for a sequence that does not run yet."""
    cluster.submit(PROMPT, 40, prefill)
    for _ in range(50):
        if in_flight(cluster, reached):
            break
        cluster.network.deliver_all()
        cluster.fabric.land_all()
        cluster.turn()
    assert in_flight(cluster, reached)
    without_gateway(cluster)
    cluster.turn()
    if reached is GenerateRequest:
        cluster.network.in_flight.clear()                  # it died before it was read
    for worker in cluster.workers.values():
        assert not worker.engine.sequences
    cluster.settle()
    cluster.assert_nothing_leaked()
    num_steps = [worker._num_steps for worker in cluster.workers.values()]
    assert max(num_steps) <= 6, "an answer of 40 tokens was computed for nobody"


def test_a_late_request_of_a_gateway_that_is_gone_is_answered_to_nobody(cluster: FakeCluster) -> None:
    decode, gateway = cluster.workers[ROLES[1]], cluster.gateway.address
    cluster.turn()
    without_gateway(cluster)
    cluster.turn()
    cluster.network.in_flight.clear()
    ask(cluster, Route(decode.ref))
    for _ in range(4):
        cluster.network.deliver_all()
        decode.turn(0.0)
    assert decode._num_tokens >= len(PROMPT), "it did come"
    assert not [letter for letter in cluster.network.in_flight if letter.to == gateway]
    cluster.settle()
    cluster.assert_nothing_leaked()


def test_other_gateways_requests_go_on(cluster: FakeCluster) -> None:
    decode = cluster.workers[ROLES[1]]
    both = (cluster.gateway.address, Address("fake://other"))
    decode.update_membership(Membership(50, cluster.workers[ROLES[0]].membership.workers, both))
    decode.turn(0.0)
    ours, theirs = ask(cluster, Route(decode.ref), "ours"), ask(cluster, Route(decode.ref), "theirs", gateway="fake://other")
    turn(cluster, decode)
    decode.update_membership(Membership(51, (), both[:1]))
    decode.turn(0.0)
    assert [s.id for s in decode.engine.sequences] == [ours.request_id]
    assert theirs.request_id != ours.request_id


def test_a_dead_peer_is_forgotten(cluster: FakeCluster) -> None:
    """What is queued for it will never be read."""
    prefill, decode = (cluster.workers[each] for each in ROLES)
    cluster.turn()
    cluster.submit(PROMPT, 4)
    cluster.network.deliver_all()
    prefill.turn(0.0)
    assert any(letter.to == decode.ref.address for letter in cluster.network.in_flight)
    prefill.update_membership(Membership(99, (prefill.member,), (cluster.gateway.address,)))
    prefill.turn(0.0)
    assert not any(letter.to == decode.ref.address for letter in cluster.network.in_flight)
    assert prefill.num_handoffs() == 0


# Tokens and the loop

@PATHS
def test_one_message_a_step_and_gateway(cluster: FakeCluster, prefill: str | None) -> None:
    worker = cluster.workers[WorkerId(prefill or "decode-0")]
    for i in range(3):
        ask(cluster, route_to(cluster, worker), f"r{i}", prompt=[i, i])
    [step] = turn(cluster, worker)
    assert isinstance(step, StepTokens)
    assert [delta.request_id for delta in step.deltas] == ["r0", "r1", "r2"]
    assert [delta.token_ids for delta in step.deltas] == [(next_token([i, i]),) for i in range(3)]
    assert step.load is not None


@PATHS
def test_an_answer_is_right(cluster: FakeCluster, prefill: str | None) -> None:
    answer = cluster.submit(PROMPT, 9, prefill)
    cluster.settle()
    assert answer.complete
    assert len(answer.tokens) == 9
    assert len(cluster.spans) == (prefill is not None)


@dataclass
class Deferred:
    """Computed, though the device does not say so yet."""

    outputs: StepOutputs
    has_ended: bool = False

    def is_ready(self) -> bool:
        return self.has_ended

    def wait(self) -> list[ChunkOutput]:
        return self.outputs.wait()


def test_tokens_do_not_wait_for_the_next_step_to_be_launched(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, steps, seen = cluster.workers[ROLES[0]], list[Deferred](), list[Message]()
    launch = worker.engine.runner.launch

    def ahead(plan: StepPlan, on_layer: Callable[[int], None]) -> Deferred:
        def finished(layer: int) -> None:
            if steps:
                steps[0].has_ended = True
            on_layer(layer)
            assert not [each for each in answers(cluster) if isinstance(each, StepTokens)], "a launch as quick as that is not held up"
            cluster.now += 2 * LOOK_AFTER_S
            on_layer(layer)
            seen.extend(answers(cluster))

        steps.append(Deferred(launch(plan, finished)))
        return steps[-1]

    monkeypatch.setattr(worker.engine.runner, "launch", ahead)
    monkeypatch.setattr(type(worker.engine.runner), "runs_ahead", True)
    for name in ("a", "b"):
        ask(cluster, route_to(cluster, worker), name, prompt=PROMPT[:8])
        turn(cluster, worker)
    (tokens,) = [message for message in seen if isinstance(message, StepTokens)]
    assert [delta.request_id for delta in tokens.deltas] == ["a"]
    assert (tokens.load.busy_s, tokens.load.work.prefill_tokens) == (0.0, 8), "the step of b, which is being launched, counts once"
    assert worker.load().busy_s > 0
    assert worker.load().work.prefill_tokens == 0


def test_a_worker_on_a_cpu_learns_in_each_turn(cluster: FakeCluster) -> None:
    """For it never rests under load."""
    worker = cluster.workers[ROLES[0]]
    for number in range(3):
        ask(cluster, route_to(cluster, worker), f"a{number}", prompt=PROMPT[:8])
        turn(cluster, worker)
        assert worker._steps.num_unlearned == 0


def test_a_worker_on_a_gpu_learns_while_nothing_is_awaited_of_it(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, steps = cluster.workers[ROLES[0]], list[Deferred]()
    worker._alert_s = ALERT_S
    ask(cluster, route_to(cluster, worker), "a", prompt=PROMPT[:8])
    turn(cluster, worker)
    turn(cluster, worker)
    assert worker._steps.num_unlearned == 1, "an answer may come"
    cluster.now += ATTENTION_S
    turn(cluster, worker)
    assert worker._steps.num_unlearned == 0

    launch = worker.engine.runner.launch
    monkeypatch.setattr(type(worker.engine.runner), "runs_ahead", True)
    monkeypatch.setattr(worker.engine.runner, "launch", lambda *step: steps.append(Deferred(launch(*step))) or steps[-1])
    for name in ("b", "c"):
        ask(cluster, route_to(cluster, worker), name, prompt=PROMPT[:8])
        turn(cluster, worker)
    steps[0].has_ended = True
    turn(cluster, worker)
    assert worker._steps.num_unlearned == 1
    turn(cluster, worker)
    assert worker._steps.num_unlearned == 0, "while c is computed nothing else is to be done"


def test_steps_do_not_pile_up_without_being_learned_from(cluster: FakeCluster) -> None:
    worker, unlearned = cluster.workers[ROLES[0]], list[int]()
    worker._alert_s = ALERT_S
    for number in range(MOST_UNLEARNED + 3):
        ask(cluster, route_to(cluster, worker), f"a{number}", prompt=PROMPT[:8])
        turn(cluster, worker)
        unlearned.append(worker._steps.num_unlearned)
    assert unlearned == [*range(1, MOST_UNLEARNED + 1), *[MOST_UNLEARNED] * 3]


def test_an_offer_matches_what_the_last_step_computed(cluster: FakeCluster) -> None:
    """It comes before the next step is planned."""
    worker = cluster.workers[ROLES[1]]
    ask(cluster, Route(worker.ref), "a", prompt=PROMPT)
    turn(cluster, worker)
    found = worker.engine.pool.match(chain_hashes(PROMPT, worker.engine.limits.block_size))
    assert len(found) == min(len(PROMPT), worker.engine.limits.max_step_tokens) // worker.engine.limits.block_size > 0


def test_every_turn_and_every_layer_moves_the_loop_on(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands still for longer than either of them hangs, and cannot say so itself."""
    worker, stood = cluster.workers[ROLES[1]], list[float]()
    launch = worker.engine.runner.launch

    def slow(plan: StepPlan, on_layer: Callable[[int], None]) -> object:
        def finished(layer: int) -> None:
            cluster.now += 30.0
            stood.append(worker.still_s)
            on_layer(layer)

        return launch(plan, finished)

    monkeypatch.setattr(worker.engine.runner, "launch", slow)
    cluster.now += 30.0
    assert worker.still_s == 30.0
    ask(cluster, Route(worker.ref))
    turn(cluster, worker)
    assert stood == [60.0, 30.0], "the first layer came as late as the turn and itself"
    assert worker.still_s == 0.0


def test_run_ends_when_it_is_stopped(worker: Worker) -> None:
    loop = threading.Thread(target=worker.run)
    loop.start()
    worker.update_membership(Membership(7, (), ()))
    worker.stop()
    loop.join(TIMEOUT_S)
    assert not loop.is_alive()


def test_what_a_turn_raises_ends_the_loop(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in doubt about its state does not go on."""
    def fail(now: float) -> None:
        raise AssertionError("in doubt")

    monkeypatch.setattr(worker, "tick", fail)
    with pytest.raises(AssertionError, match="in doubt"):
        worker.run()


class NeverReady:
    def is_ready(self) -> bool:
        return False


def test_a_step_that_the_device_does_not_end_ends_the_worker(
    cluster: FakeCluster, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine.runner, "launch", lambda plan, on_layer: NeverReady())
    ask(cluster, route_to(cluster, worker))
    cluster.step()
    for _ in range(3):
        cluster.now += STEP_LIMIT_S / 4
        worker.turn(0.0)
    cluster.now += STEP_LIMIT_S / 3
    with pytest.raises(StepStuck, match=r"8 prompt tokens and 0 decodes has not ended for \d+ s"):
        worker.turn(0.0)
