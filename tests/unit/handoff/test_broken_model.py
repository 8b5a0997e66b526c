"""A model whose logits are no numbers gives an error, never a token; what else runs in the same step is not disturbed."""

import pytest
from harness.fake_cluster import FakeCluster
from msgspec.structs import replace

from diptych.engine.fake_runner import FakeRunner
from diptych.messages.requests import FailureKind

POISON = 666


class BreaksOnPoison(FakeRunner):
    def execute(self, plan, on_layer):  # type: ignore[no-untyped-def]
        outputs = super().execute(plan, on_layer)
        return [
            replace(output, sampled=None, is_finite=False) if POISON in chunk.sequence.token_ids else output
            for chunk, output in zip(plan.chunks, outputs, strict=True)
        ]


@pytest.mark.parametrize("prefill", ["prefill-0", None])
def test_a_broken_request_fails_alone(prefill: str | None) -> None:
    cluster = FakeCluster()
    for worker in cluster.workers.values():
        worker.engine.runner = BreaksOnPoison(worker.replica.pool)
    broken = cluster.submit([1, 2, POISON, *range(20, 30)], 6, prefill)
    sound = cluster.submit([1, 2, 3, 4, 5], 6, prefill)
    cluster.settle()
    assert sound.complete
    assert not broken.tokens
    assert broken.failure is not None
    assert broken.failure.kind is FailureKind.INTERNAL
    assert not broken.failure.retryable
    cluster.assert_nothing_leaked()


