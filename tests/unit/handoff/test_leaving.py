"""When pages leave within a step: after each group of layers, or late and together over links that are better left asleep."""

from typing import Any

import pytest
from harness.fake_cluster import FakeCluster

from diptych.messages.ids import WorkerId

NUM_LAYERS = 6
PREFILL = WorkerId("prefill-0")
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
