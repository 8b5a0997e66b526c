"""Handoffs between pools of different block sizes. What any history must keep, test_handoff_properties.py asks of them, too."""

import pytest
from harness.fake_cluster import TIMEOUT_S, FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.messages.ids import WorkerId
from diptych.prefill_worker.probe import Floor

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
PROMPT = list(range(20))


@settings(max_examples=60)
@given(
    prefill_block_size=st.integers(1, 20),
    staging_blocks=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    max_step_tokens=st.sampled_from([1, 5, 8, 64]),
)
def test_any_size_any_prompts_any_chunking(prefill_block_size: int, staging_blocks: int, lengths: list[int], max_step_tokens: int) -> None:
    """All at once, then again with warm prefix caches."""
    cluster = FakeCluster(
        num_blocks=40, max_step_tokens=max_step_tokens, prefill_block_size=prefill_block_size, staging_blocks=staging_blocks
    )
    for _ in range(2):
        answers = [cluster.submit(list(range(length)), max_tokens=4) for length in lengths]
        cluster.settle(20.0)
        assert all(answer.complete for answer in answers), [answer.failure for answer in answers]
    cluster.assert_nothing_leaked()


def test_the_receiver_skips_what_it_has_by_its_own_blocks() -> None:
    """Of 22 tokens 20 are five whole blocks there, although 16 alone are whole here."""
    cluster = FakeCluster(prefill_block_size=16)
    for _ in range(2):
        answer = cluster.submit([*PROMPT, 1, 2], max_tokens=3)
        cluster.settle()
        assert answer.complete
    assert [(span.num_skipped_blocks, span.num_pages) for span in cluster.spans] == [(0, 6 * 2), (5, 1 * 2)]


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
@pytest.mark.parametrize("end", ["death", "abort", "deadline"])
def test_an_end_at_any_step_leaks_no_staging_page(victim: WorkerId, end: str) -> None:
    for steps in range(0, 60, 2):
        cluster = FakeCluster(prefill_block_size=6, staging_blocks=1)
        answers = [cluster.submit([*PROMPT, i], max_tokens=3) for i in range(2)]
        cluster.one_thing_at_a_time(steps)
        match end:
            case "death":
                cluster.kill(victim)
                cluster.restart(victim)
            case "abort":
                cluster.abort(answers[0])
            case "deadline":
                cluster.now += TIMEOUT_S + 0.1
                cluster.turn(victim)
        cluster.settle(3 * TIMEOUT_S)
        cluster.give_up_unanswered()
        cluster.settle(3 * TIMEOUT_S)
        cluster.assert_nothing_leaked()


def test_links_are_measured_with_pages_of_the_receivers_size() -> None:
    cluster = FakeCluster(prefill_block_size=16, floor=Floor(0.0, refuse=True))
    for _ in range(50):
        cluster.step()
    [link] = cluster.links
    assert link.num_bytes % cluster.workers[DECODE].replica.pool.layout.page_bytes == 0
    assert link.num_bytes < cluster.workers[PREFILL].replica.pool.layout.page_bytes * cluster.staging_blocks * 2
    cluster.assert_nothing_leaked()
