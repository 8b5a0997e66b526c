"""When pages leave: after each group of layers, or late and together over links that are better left asleep."""

from typing import Any

import pytest
from harness import fake_cluster
from harness.ahead_runner import AheadRunner
from harness.fake_cluster import BLOCK_SIZE, TIMEOUT_S, FakeCluster

from diptych.messages.errors import PeerGone
from diptych.messages.ids import WorkerId
from diptych.messages.requests import RequestFailed, StepTokens

NUM_LAYERS = 6
PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
EACH = [[layer] for layer in range(NUM_LAYERS)]
GATHERED = [[0, 1, 2, 3, 4], [5]]


@pytest.mark.parametrize(("gathers", "each_step"), [(False, EACH), (True, GATHERED)])
def test_layers_that_leave_together(gathers: bool, each_step: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=gathers, max_step_tokens=8)
    written = layers_written(cluster, monkeypatch)
    answer = cluster.submit(list(range(48)), max_tokens=3)
    cluster.settle()
    assert answer.complete
    assert written[-2 * len(each_step) :] == 2 * each_step           # of six steps; in the first ones it is being accepted
    cluster.assert_nothing_leaked()


def test_steps_that_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks in six steps: until a quarter is left."""
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=True, max_step_tokens=8)
    num_pages = pages_written(cluster, monkeypatch)
    answer = cluster.submit(list(range(12 * BLOCK_SIZE)), max_tokens=3)
    cluster.settle()
    assert answer.complete
    assert num_pages == [8 * 6, 2 * 5, 2, 2 * 5, 2], "of earlier steps in all layers; of this one in all but the last; those"
    cluster.assert_nothing_leaked()


def test_a_receiver_sees_pages_before_it_loses_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's steps are far apart, or others come first: what is ready leaves meanwhile."""
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=True, max_step_tokens=8)
    num_pages, answer = pages_written(cluster, monkeypatch), cluster.submit(list(range(12 * BLOCK_SIZE)), max_tokens=3)
    while cluster.workers[PREFILL].engine.sequences == [] or cluster.workers[PREFILL].engine.sequences[0].num_computed < 24:
        cluster.step()
    assert num_pages == []
    monkeypatch.setattr(cluster.workers[PREFILL], "_launch", lambda: False)
    for _ in range(3):
        cluster.now += TIMEOUT_S / 2
        cluster.step()
    assert num_pages == [6 * NUM_LAYERS]
    monkeypatch.undo()
    cluster.settle()
    assert answer.complete, answer.failure
    cluster.assert_nothing_leaked()


def test_pages_of_a_prompt_that_is_launched_whole_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accept came after the last step's layers, so no step will take them along."""
    monkeypatch.setattr(fake_cluster, "FakeRunner", AheadRunner)
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=True, max_step_tokens=16)
    num_pages, writer = pages_written(cluster, monkeypatch), cluster.workers[PREFILL]
    answer = cluster.submit(list(range(32)), max_tokens=3)
    cluster.network.deliver_all()
    with monkeypatch.context() as slow:
        slow.setattr(type(writer.engine), "is_ready", False)
        for _ in range(2):
            cluster.turn(PREFILL)                             # both steps are launched
        for worker_id in (DECODE, PREFILL):                  # the accept comes
            cluster.network.deliver_all()
            cluster.turn(worker_id)
        assert (len(writer.engine._under_way), num_pages) == (2, [])
        writer._collect()
    assert num_pages == [4 * NUM_LAYERS], "of the first step"
    cluster.settle()
    assert answer.complete
    cluster.assert_nothing_leaked()


def test_a_silence_is_counted_from_the_last_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from when somebody looked and found none: what becomes ready after a long silence leaves at once."""
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=True, max_step_tokens=8)
    num_pages, answer = pages_written(cluster, monkeypatch), cluster.submit(list(range(12 * BLOCK_SIZE)), max_tokens=3)
    writer = cluster.workers[PREFILL]
    while not writer.engine.sequences or writer.engine.sequences[0].num_computed < 24:
        cluster.step()
    launch = writer._launch
    for steps_left, silence_s in ((0, TIMEOUT_S / 2), (0, 0.6 * TIMEOUT_S), (1, 0.0), (0, 0.05)):
        end = cluster.now + silence_s
        monkeypatch.setattr(writer, "_launch", launch if steps_left else lambda: False)
        cluster.step()
        while cluster.now < end:
            cluster.step()
    assert num_pages == [6 * NUM_LAYERS, 2 * NUM_LAYERS]
    monkeypatch.setattr(writer, "_launch", launch)
    cluster.settle()
    assert answer.complete, answer.failure
    cluster.assert_nothing_leaked()


def test_a_first_token_whose_handoff_fails_with_its_step_is_told_before_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the gateway, which has begun anew, would not know it any more."""
    cluster = FakeCluster(num_layers=NUM_LAYERS, max_step_tokens=8)
    told, send, writer = list[type](), cluster.workers[PREFILL].post.send, cluster.workers[PREFILL]

    def watch(to: Any, message: Any) -> None:
        told.append(type(message))
        send(to, message)

    def broken(*_: Any) -> None:
        raise PeerGone("the link is down")

    answer = cluster.submit(list(range(44)), max_tokens=5)
    while not writer.engine.sequences or writer.engine.sequences[0].num_computed < 40:
        cluster.step()
    monkeypatch.setattr(writer.post, "send", watch)
    monkeypatch.setattr(cluster.transports[PREFILL], "write_pages", broken)
    cluster.settle()
    assert answer.failure is not None
    assert [each for each in told if each in (StepTokens, RequestFailed)] == [StepTokens, RequestFailed]


def test_what_is_converted_first_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages come out of a small pool."""
    cluster = FakeCluster(num_layers=NUM_LAYERS, gathers=True, max_step_tokens=8, prefill_block_size=8, staging_blocks=100)
    cluster.transports[PREFILL].gathers = True
    written = layers_written(cluster, monkeypatch)
    answer = cluster.submit(list(range(48)), max_tokens=3)
    cluster.settle()
    assert answer.complete
    assert [len(layers) for layers in written[-NUM_LAYERS:]] == [2] * NUM_LAYERS, "two of the receiver's blocks for each layer"
    cluster.assert_nothing_leaked()


def pages_written(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By each write from now on."""
    transport, num_pages = cluster.transports[PREFILL], list[int]()
    write = transport.write_pages

    def watch(*arguments: Any) -> None:
        num_pages.append(len(arguments[2]))
        write(*arguments)

    monkeypatch.setattr(transport, "write_pages", watch)
    return num_pages


def layers_written(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each write from now on: staging pages have none of their own."""
    transport, written = cluster.transports[PREFILL], list[list[int]]()
    write, is_staged = transport.write_pages, cluster.workers[PREFILL].replica.staging is not None

    def watch(*arguments: Any) -> None:
        layers = [int(page) % NUM_LAYERS for page in arguments[2]]
        written.append(layers if is_staged else sorted(set(layers)))
        write(*arguments)

    monkeypatch.setattr(transport, "write_pages", watch)
    return written
